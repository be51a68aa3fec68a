"""The cost of a run's terms, by arithmetic: products and bytes."""

from dataclasses import dataclass

from threetowers.trainer.config import Term
from threetowers.trainer.grad_cache import learning_heads
from threetowers.trainer.model.model import TowerModel

FLOAT32 = 4  # bytes of an accumulated gradient's element, and of a kept dot


@dataclass(frozen=True)
class TermCost:
    """The cost of one term.

    Attributes:
        passes: Products of 2 · B · B · D operations, forward and backward, with D the width of the term's heads; those
            of a teacher of width E count E / D, those of K captions a sample K, or K² where both sides are text. A
            teacher counts for its share of the steps, as some may be left out. 0 for a term without negatives.
        flops: Of one sample.
        feature_bytes: Of the columns of all ranks, or under `loss.ring` of those on their way, and of the gradients of
            rows and columns, on one rank.
        tile_bytes: Of the tiles that are kept from forward to backward, on one rank.
    """

    passes: float
    flops: int
    feature_bytes: int
    tile_bytes: int


def term_costs(model: TowerModel, world_size: int) -> dict[str, TermCost]:
    """Return the cost of each term of a run on `world_size` ranks, by name."""
    learning = learning_heads(model)
    return {name: _term_cost(model, term, learning, world_size) for name, term in model.config.terms.items()}


def _term_cost(model: TowerModel, term: Term, learning: set[str], world_size: int) -> TermCost:
    if not term.has_scale:
        return TermCost(0, 0, 0, 0)
    config = model.config
    pairing, captions = config.pairing(term), config.data.captions_per_sample
    rows, columns_a_sample = {"samples": (1, 1), "captions": (1, captions), "texts": (captions, captions)}[pairing]
    batch = config.global_batch_size * columns_a_sample
    local_rows = config.global_batch_size // world_size * rows
    local = batch // world_size
    width = model.widths[term.x]
    teachers = term.teachers if term.hard_weight < 1 else {}  # without a share of the target they are not computed
    teacher_widths = [model.widths[teacher.x] for teacher in teachers.values()]
    # products that give the logits of the student and of its teachers
    logits = 1 + (1 - term.left_out_share) * sum(teacher_widths) / width
    sides = len({term.x, term.y} & learning)

    # A softmax has its logits forward and again backward, but for kept tiles; a sigmoid has all it needs forward. Each
    # side that learns has a product of its own, and the scale needs one in any case.
    tile_bytes = 0
    passes = logits + max(1, sides)
    if config.loss.kind == "softmax":
        all_tiles = (1 + len(teacher_widths)) * local_rows * batch * FLOAT32
        tile_bytes = min(config.loss.logit_cache_mib * 2**20, all_tiles)
        passes += logits * (1 - tile_bytes / all_tiles)

    # With several captions of a sample columns are the captions, else the side that does not learn, where there is one.
    columns_learn = sides == 2
    if pairing == "captions":
        columns_learn = any(config.side_of(config.root_of(head)) == "text" for head in {term.x, term.y} & learning)
    element = 4 if model.precision == "float32" else 2
    columns = 0 if world_size == 1 else (2 * local if config.loss.ring else batch)
    feature_bytes = columns * (width + sum(teacher_widths)) * element
    if sides == 2 or not columns_learn:  # the scale's gradient needs one of a side in any case
        feature_bytes += local_rows * width * FLOAT32
    if columns_learn:
        feature_bytes += (2 * local if config.loss.ring else batch) * width * FLOAT32
    passes *= rows * columns_a_sample
    flops = round(passes * 2 * config.global_batch_size * width)
    return TermCost(passes, flops, feature_bytes, tile_bytes)
