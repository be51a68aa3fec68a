"""The loop over tiles: own rows against a block of columns, tile by tile, in memory linear in the batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from threetowers.kernels.distributed.columns import ColumnBlock
from threetowers.kernels.operator.pair_state import PairState
from threetowers.kernels.tiles.statistics import PairWeights, SigmoidSums, SoftmaxStatistics
from threetowers.kernels.tiles.tile_backend import StudentTile, TeacherTile, Tile, TileBackend, spans


class CachedTiles:
    """The logit cache of one pair: dots of its first tiles, as many as fit, in the order in which they come.

    A tile has as many layers as there are dots at each of its places: the student's and each teacher's.
    """

    def __init__(self, flat_n: Tensor, layers: int) -> None:
        self._flat_n = flat_n
        self._layers = layers
        self._next = 0

    def take(self, rows: int, cols: int) -> Tensor | None:
        """Return the memory of the next tile, (layers, rows, cols); None once it is used up."""
        start = self._next
        self._next += self._layers * rows * cols
        if self._next > len(self._flat_n):
            return None
        return self._flat_n[start : self._next].view(self._layers, rows, cols)

    def rows_with_tiles(self, rows: int, cols: int, backend: TileBackend) -> int:
        """Return how many of these rows, in whole strips of tiles, the memory that is left has any tile of."""
        left = (len(self._flat_n) - self._next) // self._layers
        for i in spans(rows, backend.rows):
            first_j = next(spans(cols, backend.cols), slice(0, 0))
            if not 0 < (i.stop - i.start) * first_j.stop <= left:
                return int(i.start)
            left -= (i.stop - i.start) * cols
        return rows

    @staticmethod
    def size_within(budget_bytes: int, backend: TileBackend, rows: int, block_sizes: Sequence[int], layers: int) -> int:
        """Return how many elements to allocate: complete tiles only, within the budget.

        Args:
            budget_bytes: the most memory to use.
            backend: what computes the tiles.
            rows: own rows.
            block_sizes: how many columns each block has, in the order in which they come.
            layers: of a tile.
        """
        limit = budget_bytes // backend.cache_dtype.itemsize
        used = 0
        for cols in block_sizes:
            for i in spans(rows, backend.rows):
                for j in spans(cols, backend.cols):
                    size = layers * (i.stop - i.start) * (j.stop - j.start)
                    if used + size > limit:
                        return used
                    used += size
        return used


@dataclass(frozen=True, slots=True)
class PlacedTile:
    """A tile, its rows (counted within x_bD) and its columns (within the block)."""

    i: slice
    j: slice
    student: StudentTile


def iter_tiles(
    pair: PairState, block: ColumnBlock, rows: slice, most_rows: int, most_cols: int
) -> Iterator[PlacedTile]:
    """Yield the tiles of these own rows against a block of columns, none larger than most_rows x most_cols."""
    features = pair.backend.features
    row_start = pair.row_layout.own.start
    col_start = block.positions.start
    for span in spans(rows.stop - rows.start, most_rows):
        i = slice(rows.start + span.start, rows.start + span.stop)
        x_rD = features(pair.x_bD[i])
        u_KrE = [features(teacher.u_bE[i]) for teacher in pair.teachers]
        for j in spans(len(block.y_sD), most_cols):
            y_cD = features(block.y_sD[j])
            global_i = slice(row_start + i.start, row_start + i.stop)
            global_j = slice(col_start + j.start, col_start + j.stop)
            has_owners = pair.owners.owner_m is not None
            tile = Tile(
                pair.logit_map,
                diagonal=len(y_cD) if has_owners else global_i.start - global_j.start,
                row_labels_r=_part(pair.exclusions.row_labels_B, global_i),
                col_labels_c=_part(pair.exclusions.col_labels_B, global_j),
                row_limits_r=_part(pair.exclusions.row_limits_b, i),
                col_limits_c=_part(pair.exclusions.col_limits_B, global_j),
            )
            teachers = [
                TeacherTile(u_rE, features(v_sE[j]), replace(tile, logit_map=teacher.logit_map), teacher.weight)
                for teacher, u_rE, v_sE in zip(pair.teachers, u_KrE, block.teachers_sE, strict=True)
            ]
            yield PlacedTile(i, j, StudentTile(x_rD, y_cD, tile, teachers))


def _part(vector_n: Tensor | None, positions: slice) -> Tensor | None:
    return None if vector_n is None else vector_n[positions]


def softmax_statistics(
    pair: PairState, block: ColumnBlock, rows_b: SoftmaxStatistics, cols_B: SoftmaxStatistics, cache: CachedTiles
) -> None:
    """Merge the statistics of these tiles into rows_b and cols_B: one pass, and one of each teacher.

    Tiles to be cached are cut as backward will ask for them, which needs memory for their gradients; the others may be
    larger.
    """
    backend = pair.backend
    cols_s = cols_B.part(block.positions)
    batch = len(pair.x_bD)
    cached = cache.rows_with_tiles(batch, len(block.y_sD), backend)
    for placed in iter_tiles(pair, block, slice(0, cached), backend.rows, backend.cols):
        cache_Krc = cache.take(len(placed.student.x_rD), len(placed.student.y_cD))
        _tile_statistics(backend, placed, rows_b, cols_s, cache_Krc)
    for placed in iter_tiles(pair, block, slice(cached, batch), *_most_for_statistics(pair)):
        _tile_statistics(backend, placed, rows_b, cols_s, None)


def _most_for_statistics(pair: PairState) -> tuple[int, int]:
    """Return the most rows and columns of a tile that leaves nothing but statistics; dots of teachers lie in memory."""
    backend = pair.backend
    return (backend.rows, backend.cols) if pair.teachers else (backend.stats_rows, backend.stats_cols)


def _tile_statistics(
    backend: TileBackend,
    placed: PlacedTile,
    rows_b: SoftmaxStatistics,
    cols_s: SoftmaxStatistics,
    cache_Krc: Tensor | None,
) -> None:
    student, rows, cols = placed.student, rows_b.part(placed.i), cols_s.part(placed.j)
    if student.teachers:
        backend.distill_stats(student, rows, cols, cache_Krc)
    else:
        cache_rc = None if cache_Krc is None else cache_Krc[0]
        backend.stats(student.x_rD, student.y_cD, student.tile, rows.student, cols.student, cache_rc)


def softmax_gradients(
    pair: PairState,
    block: ColumnBlock,
    rows_b: PairWeights,
    cols_B: PairWeights,
    cache: CachedTiles,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Add ``G @ y`` to dx and ``G.T @ x`` to dy where wanted, one pass each; G takes one and one of each teacher.

    G takes none where it is cached.
    """
    backend = pair.backend
    cols_s = cols_B.part(block.positions)
    all_rows = slice(0, len(pair.x_bD))
    for placed in iter_tiles(pair, block, all_rows, backend.rows, backend.cols):
        cache_Krc = cache.take(len(placed.student.x_rD), len(placed.student.y_cD))
        grad_rc = _tile_gradient(backend, placed, rows_b, cols_s, cache_Krc)
        _add_products(backend, placed, grad_rc, dx_bD, dy_sD)


def _tile_gradient(
    backend: TileBackend, placed: PlacedTile, rows_b: PairWeights, cols_s: PairWeights, cache_Krc: Tensor | None
) -> Tensor:
    student, rows, cols = placed.student, rows_b.part(placed.i), cols_s.part(placed.j)
    if student.teachers:
        return backend.distill_grad(student, rows, cols, cache_Krc)
    cache_rc = None if cache_Krc is None else cache_Krc[0]
    return backend.softmax_grad(student.x_rD, student.y_cD, student.tile, rows.student, cols.student, cache_rc)


def _add_products(
    backend: TileBackend, placed: PlacedTile, grad_rc: Tensor, dx_bD: Tensor | None, dy_sD: Tensor | None
) -> None:
    if dx_bD is not None:
        backend.add_rows(dx_bD[placed.i], grad_rc, placed.student.y_cD)
    if dy_sD is not None:
        backend.add_cols(dy_sD[placed.j], grad_rc, placed.student.x_rD)


def sigmoid_sums_and_gradients(
    pair: PairState,
    block: ColumnBlock,
    sums: SigmoidSums,
    weights_b: Tensor | None,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Merge into sums (rows b, columns B): one pass, one of each teacher. Add gradient products where wanted: one each.

    weights_b: what each row's gradient is multiplied by; None where no gradient is wanted.
    """
    backend = pair.backend
    col_max_s = sums.col_max_c[block.positions]
    largest = _most_for_statistics(pair) if weights_b is None else (backend.rows, backend.cols)
    for placed in iter_tiles(pair, block, slice(0, len(pair.x_bD)), *largest):
        i, j = placed.i, placed.j
        part = SigmoidSums(sums.loss_r[i], sums.prob_r[i], sums.row_max_r[i], col_max_s[j])
        weights_r = None if weights_b is None else weights_b[i]
        student = placed.student
        if student.teachers:
            grad_rc = backend.distill_sigmoid(student, part, weights_r)
        else:
            grad_rc = backend.sigmoid(student.x_rD, student.y_cD, student.tile, part, weights_r)
        if grad_rc is not None:
            _add_products(backend, placed, grad_rc, dx_bD, dy_sD)
