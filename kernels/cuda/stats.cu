// Forward of the softmax loss: the log-sum-exp of every row and column over a block's piece of the tile. Registers
// first, then the lanes that share a row (or column), then the warps: always in one order, so always the same bits.
#include "block_dots.h"
#include "block_parts.h"

DEVICE void cache_dots(BlockLogits& dots, const Tile& tile, Out<float> cache) {
  dots.each([&](float& dot, int i, int j) {
    if (i < tile.rows && j < tile.columns) cache.put(static_cast<i64>(i) * tile.columns + j, dot);
  });
}

// row_parts (blocks across, rows), column_parts (blocks down, columns); cache (rows, columns), or absent, gets the dots.
KERNEL(kThreads, kBlocksAtOnce)
stats(Operands in, Tile tile, Out<LogSum> row_parts, Out<LogSum> column_parts, Out<float> cache) {
  BlockLogits logits = block_dots(in, tile);
  if (cache.given()) cache_dots(logits, tile, cache);
  to_logits(logits, tile);

  const auto rows = RowParts<LogSum>::at(0);
  BlockLogits::each_row([&](int d, int half) {
    const LogSum part = log_sum_over([&](auto visit) { logits.in_row(d, half, visit); }, 1, 4);  // 4 lanes share a row
    if (lane() % 4 == 0) rows.put(warp_column(), logits.row(d, half), part);
  });

  const auto columns = ColumnParts<LogSum>::at(rows.kBytes);
  BlockLogits::each_column([&](int a, int side) {
    const LogSum part = log_sum_over([&](auto visit) { logits.in_column(a, side, visit); }, 4, 32);  // 8 share a column
    if (lane() / 4 == 0) columns.put(warp_row(), logits.column(a, side), part);
  });

  barrier();
  write_parts(rows, row_parts, columns, column_parts, tile);
}
