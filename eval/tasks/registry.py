"""The tasks by name, as the commands and the `tasks` section of a data-set config name them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.fewshot import fewshot, fit_fewshot
from threetowers.eval.tasks.knn import fit_knn, knn
from threetowers.eval.tasks.ood import fit_ood, ood
from threetowers.eval.tasks.probe import fit_probe, probe
from threetowers.eval.tasks.retrieval import retrieval
from threetowers.eval.tasks.settings import (
    FewShotSettings,
    KnnSettings,
    OodSettings,
    ProbeSettings,
    RetrievalSettings,
    ShiftSettings,
    ZeroShotSettings,
)
from threetowers.eval.tasks.shift import fit_shift, shift
from threetowers.eval.tasks.zeroshot import zeroshot


@dataclass(frozen=True)
class EvalTask:
    """A task.

    Attributes:
        run: Computes the result of a model on a data set.
        settings: Class of its settings.
        headline: Endings of the names of the metrics that tables lead with; `{metric}` is the data set's own.
        fit: Returns the settings with defaults that fit the data set, and how they differ from the usual ones; raises
            ValueError for what `run` would refuse after the embeddings are computed.
        needs_text: Whether the model must see text.
    """

    run: Callable[[Encoder, EvalDataset, Any, ThumbnailStore], EvalResult]
    settings: type
    headline: tuple[str, ...]
    fit: Callable[[EvalDataset, Any], tuple[Any, list[str]]] = lambda dataset, settings: (settings, [])
    needs_text: bool = False


TASKS = {
    "retrieval": EvalTask(retrieval, RetrievalSettings, ("/recall@1",), needs_text=True),
    "zeroshot": EvalTask(zeroshot, ZeroShotSettings, ("{metric}",), needs_text=True),
    "fewshot": EvalTask(fewshot, FewShotSettings, ("-shot/top1",), fit_fewshot),
    "probe": EvalTask(probe, ProbeSettings, ("{metric}",), fit_probe),
    "knn": EvalTask(knn, KnnSettings, ("/{metric}",), fit_knn),
    "shift": EvalTask(
        shift,
        ShiftSettings,
        ("/{metric}", "/{metric}_drop", "/recall@1", "/recall@1_drop"),
        fit_shift,
        needs_text=True,
    ),
    "ood": EvalTask(ood, OodSettings, ("/auroc",), fit_ood),
}
