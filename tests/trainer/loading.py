"""Load the batches of a run, given as a plain config tree, and compare them."""

from pathlib import Path
from typing import Any

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.trainer.config import parse
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.loader import TrainingBatches, training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.worker_plan import WorkerPlan


def open_run(tree: dict[str, Any]) -> SampleSet:
    """Return the samples of a run."""
    config = parse(tree)
    return open_samples(config, Path(config.output_dir))


def loader_of(
    tree: dict[str, Any],
    samples: SampleSet,
    *,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    stop: int,
    plan: WorkerPlan | None = None,
) -> TrainingBatches:
    """Return the batches of the steps start .. stop-1, before any is loaded."""
    config = parse(tree)
    tokenizer = load_named_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    return training_loader(config, samples, tokenizer, rank, world_size, start, stop, plan)


def load_batches(tree: dict[str, Any], rank: int = 0, world_size: int = 1, start: int = 0, *, stop: int) -> list[Batch]:
    """Return the batches of one rank for the steps start .. stop-1."""
    return list(loader_of(tree, open_run(tree), rank=rank, world_size=world_size, start=start, stop=stop))


def same(a: Batch, b: Batch) -> bool:
    """Return whether two batches are equal in every tensor and in their bad samples."""
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(a.inputs[name].equal(b.inputs[name]) for name in a.inputs)
        and a.groups_b.equal(b.groups_b)
        and a.bad == b.bad
    )
