"""Runs that teach: finished runs of the plan, whose embeddings of images and captions are cached for others."""

from pathlib import Path

from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import THIRD_TOWER, Plan
from reproduce.teachers import is_built
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import Side
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.load import load_encoder

SIDES: tuple[Side, ...] = ("image", "text")


def cache_run(name: str, plan: Plan, folder: Folder) -> None:
    """Cache what a finished run of the plan embeds of the contrastive tar, and write the temperature it learned."""
    experiment = plan.teaching_experiment(name)
    embed_run(name, folder["runs"] / experiment.name, experiment.teacher, folder)


def embed_run(name: str, run: Path, third: str | None, folder: Folder) -> None:
    """Build the caches NAME-image and NAME-text of a run, in one reading, and write its temperature.

    Args:
        name: Of the caches.
        run: The folder of the run.
        third: The teacher whose cache is the run's third tower, None where no deployed head stands on one.
        folder: The folder of the reproduction.
    """
    caches = {} if third is None else {THIRD_TOWER: folder[f"caches/{third}"]}
    scale = load_encoder(run, LoadOptions(caches, workers=0)).logit_scale
    write_json(_facts(name, folder), {"run": run.name, "temperature": 1 / scale})
    config = BuildConfig(
        tars=[str(folder["data/train.tar"])],
        output_dir=_caches(name, folder),
        encoder=f"run:{run}",
        of=SIDES,
        feature="projected",
        threads=1,
        batch_size=64,
        on_bad="error",
    )
    build_caches(config)


def is_run_cached(name: str, folder: Folder) -> bool:
    """Return whether both caches of a run are complete."""
    return all(map(is_built, _caches(name, folder)))


def learned_temperatures(plan: Plan, folder: Folder) -> dict[str, float]:
    """Return the temperatures of the runs that teach and are cached, by their names."""
    return {
        name: float(read_json(_facts(name, folder))["temperature"])
        for name in plan.teacher_runs
        if _facts(name, folder).exists()
    }


def _caches(name: str, folder: Folder) -> list[Path]:
    return [folder[f"caches/{name}-{side}"] for side in SIDES]


def _facts(name: str, folder: Folder) -> Path:
    return folder[f"teachers/{name}.json"]
