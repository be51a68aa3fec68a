"""The loop over tiles: own rows against a block of columns, tile by tile, in memory linear in the batch."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from threetowers.kernels.distributed.columns import ColumnBlock
from threetowers.kernels.pair_state import PairState
from threetowers.kernels.tiles import OnlineLogSumExp, SigmoidSums, SoftmaxWeights, Tile, TileBackend, spans


class CachedTiles:
    """The logit cache of one pair: dots of its first tiles, as many as fit, in the order in which they come."""

    def __init__(self, flat_n: Tensor) -> None:
        self._flat_n = flat_n
        self._next = 0

    def take(self, rows: int, cols: int) -> Tensor | None:
        """Return the memory of the next tile; None once it is used up."""
        start = self._next
        self._next += rows * cols
        return self._flat_n[start : self._next].view(rows, cols) if self._next <= len(self._flat_n) else None

    def rows_with_tiles(self, rows: int, cols: int, backend: TileBackend) -> int:
        """Return how many of these rows, in whole strips of tiles, the memory that is left has any tile of."""
        left = len(self._flat_n) - self._next
        for i in spans(rows, backend.rows):
            first_j = next(spans(cols, backend.cols), slice(0, 0))
            if not 0 < (i.stop - i.start) * first_j.stop <= left:
                return int(i.start)
            left -= (i.stop - i.start) * cols
        return rows

    @staticmethod
    def size_within(budget_bytes: int, backend: TileBackend, rows: int, block_sizes: Sequence[int]) -> int:
        """Return how many elements to allocate: complete tiles only, within the budget.

        Args:
            budget_bytes: the most memory to use.
            backend: what computes the tiles.
            rows: own rows.
            block_sizes: how many columns each block has, in the order in which they come.
        """
        limit = budget_bytes // backend.cache_dtype.itemsize
        used = 0
        for cols in block_sizes:
            for i in spans(rows, backend.rows):
                for j in spans(cols, backend.cols):
                    size = (i.stop - i.start) * (j.stop - j.start)
                    if used + size > limit:
                        return used
                    used += size
        return used


def iter_tiles(
    pair: PairState, block: ColumnBlock, rows: slice, most_rows: int, most_cols: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tile]]:
    """Yield the tiles of these own rows against a block of columns, none larger than most_rows x most_cols.

    Each comes as its rows, its columns (counted within x_bD and within the block), their features, and the tile.
    """
    row_start = pair.layout.own.start
    col_start = block.positions.start
    for span in spans(rows.stop - rows.start, most_rows):
        i = slice(rows.start + span.start, rows.start + span.stop)
        x_rD = pair.backend.features(pair.x_bD[i])
        for j in spans(len(block.y_sD), most_cols):
            y_cD = pair.backend.features(block.y_sD[j])
            diagonal = (row_start + i.start) - (col_start + j.start)
            tile = Tile(pair.logit_map, diagonal)
            if pair.labels_B is not None:
                row_labels_r = pair.labels_B[row_start + i.start : row_start + i.stop]
                col_labels_c = pair.labels_B[col_start + j.start : col_start + j.stop]
                tile = Tile(pair.logit_map, diagonal, row_labels_r, col_labels_c)
            yield i, j, x_rD, y_cD, tile


def softmax_statistics(
    pair: PairState, block: ColumnBlock, rows_b: OnlineLogSumExp, cols_B: OnlineLogSumExp, cache: CachedTiles
) -> None:
    """Merge the statistics of these tiles into rows_b and cols_B: one pass.

    Tiles to be cached are cut as backward will ask for them, which needs memory for their gradients; the others may be
    larger.
    """
    backend = pair.backend
    cols_s = cols_B.part(block.positions)
    batch = len(pair.x_bD)
    cached = cache.rows_with_tiles(batch, len(block.y_sD), backend)
    for i, j, x_rD, y_cD, tile in iter_tiles(pair, block, slice(0, cached), backend.rows, backend.cols):
        cache_rc = cache.take(len(x_rD), len(y_cD))
        backend.stats(x_rD, y_cD, tile, rows_b.part(i), cols_s.part(j), cache_rc)
    largest = backend.stats_rows, backend.stats_cols
    for i, j, x_rD, y_cD, tile in iter_tiles(pair, block, slice(cached, batch), *largest):
        backend.stats(x_rD, y_cD, tile, rows_b.part(i), cols_s.part(j), None)


def softmax_gradients(
    pair: PairState,
    block: ColumnBlock,
    rows_b: SoftmaxWeights,
    cols_B: SoftmaxWeights,
    cache: CachedTiles,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Add ``G @ y`` to dx and ``G.T @ x`` to dy where wanted: one pass for G unless it is cached, and one each."""
    backend = pair.backend
    cols_s = cols_B.part(block.positions)
    all_rows = slice(0, len(pair.x_bD))
    for i, j, x_rD, y_cD, tile in iter_tiles(pair, block, all_rows, backend.rows, backend.cols):
        cache_rc = cache.take(len(x_rD), len(y_cD))
        grad_rc = backend.softmax_grad(x_rD, y_cD, tile, rows_b.part(i), cols_s.part(j), cache_rc)
        if dx_bD is not None:
            backend.add_rows(dx_bD[i], grad_rc, y_cD)
        if dy_sD is not None:
            backend.add_cols(dy_sD[j], grad_rc, x_rD)


def sigmoid_sums_and_gradients(
    pair: PairState,
    block: ColumnBlock,
    sums: SigmoidSums,
    weights_b: Tensor | None,
    dx_bD: Tensor | None,
    dy_sD: Tensor | None,
) -> None:
    """Merge into sums (rows b, columns B), and add gradient products where wanted: one pass, and one each.

    weights_b: what each row's gradient is multiplied by; None where no gradient is wanted.
    """
    backend = pair.backend
    col_max_s = sums.col_max_c[block.positions]
    largest = (backend.rows, backend.cols) if weights_b is not None else (backend.stats_rows, backend.stats_cols)
    for i, j, x_rD, y_cD, tile in iter_tiles(pair, block, slice(0, len(pair.x_bD)), *largest):
        part = SigmoidSums(sums.loss_r[i], sums.prob_r[i], sums.row_max_r[i], col_max_s[j])
        weights_r = None if weights_b is None else weights_b[i]
        grad_rc = backend.sigmoid(x_rD, y_cD, tile, part, weights_r)
        if grad_rc is not None and dx_bD is not None:
            backend.add_rows(dx_bD[i], grad_rc, y_cD)
        if grad_rc is not None and dy_sD is not None:
            backend.add_cols(dy_sD[j], grad_rc, x_rD)
