"""torch.compile of a model in place: parameters keep their names, and where the compiler gave up is said.

Random numbers are drawn as without the compiler, so that a micro-batch that runs twice draws the same dropout: once it
is compiled without and once with a backward pass.
"""

import logging
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.towers.cached_tower import CachedTower

logger = logging.getLogger(__name__)

Parts = Literal[False, "blocks", "model"]
OPTIONS: dict[str, str | int | bool] = {"fallback_random": True}
# Of one function: blocks share theirs among towers, with and without gradients, in training and in evaluation.
MAX_GRAPHS = 64


def compile_model(model: TowerModel, parts: Parts) -> None:
    """Let parts of a model be compiled when they first run: its blocks, or all of `forward` at once."""
    if not parts:
        return
    import torch._dynamo  # slow to import

    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for module in _blocks(model) if parts == "blocks" else [model]:
        module.compile(options=OPTIONS)


def _blocks(model: TowerModel) -> Iterator[nn.Module]:
    """Yield the transformer blocks of the towers; a tower without such blocks as a whole."""
    for tower in model.towers.values():
        if isinstance(tower, CachedTower):
            continue
        blocks: Any = tower.blocks
        yield from blocks or [tower]


def log_graph_breaks(parts: Parts) -> None:
    """Log how many graphs the compiler has made in this process, and where and why it ended one early."""
    if not parts:
        return
    from torch._dynamo.utils import counters

    graphs = counters["stats"]["unique_graphs"]
    breaks = counters["graph_break"]
    logger.info("compiled: %d graphs, %d graph breaks", graphs, breaks.total())
    for reason, count in breaks.most_common():
        logger.info("graph break (%d times): %s", count, " ".join(reason.split()))
