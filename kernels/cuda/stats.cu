// Forward of the softmax loss: the log-sum-exp of every row and column over a block's piece of the tile.
#include "block_dots.h"
#include "block_log_sums.h"

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

  write_log_sums(logits, row_parts, column_parts, tile);
}
