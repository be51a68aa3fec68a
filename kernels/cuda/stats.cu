// Forward of the softmax loss: the log-sum-exp of every row and column over a 128 x 128 piece of the tile. Registers
// first, then the lanes that share a row (or column), then the warps: always in one order, so always the same bits.
#include "block_logits.h"

// row_parts (blocks across, rows), column_parts (blocks down, columns); kept (rows, columns), or absent, gets the dots.
KERNEL(kThreads, 2)
stats(Operands in, Tile tile, Out<LogSum> row_parts, Out<LogSum> column_parts, Out<float> kept) {
  BlockLogits logits = block_dots(in, tile);
  if (kept.given())
    logits.each([&](float dot, int i, int j) {
      if (i < tile.rows && j < tile.columns) kept.put(static_cast<i64>(i) * tile.columns + j, dot);
    });
  to_logits(logits, tile);

  const Shared<LogSum> row_share = shared_memory<LogSum>(0);  // (warps across, 128), then (warps down, 128)
  const Shared<LogSum> column_share = shared_memory<LogSum>(kWarpsAcross * kBlock * static_cast<int>(sizeof(LogSum)));

  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int half = 0; half < 4; half += 2) {
      float max = -infinity(), sum = 0.0f;
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = half; e < half + 2; ++e) max = fmaxf(max, logits.value[d][a][e]);
      max = max_of_lanes(max, 1, 4);  // the 4 lanes of a row
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = half; e < half + 2; ++e) sum += exp2_fast(logits.value[d][a][e] - pivot(max));
      sum = sum_of_lanes(sum, 1, 4);
      if (lane() % 4 == 0) row_share.put(warp_column() * kBlock + logits.row(d, half), {max, sum});
    }

  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int side = 0; side < 2; ++side) {
      float max = -infinity(), sum = 0.0f;
      UNROLL for (int d = 0; d < kDown; ++d)
        UNROLL for (int e = side; e < 4; e += 2) max = fmaxf(max, logits.value[d][a][e]);
      max = max_of_lanes(max, 4, 32);  // the 8 lanes of a column
      UNROLL for (int d = 0; d < kDown; ++d)
        UNROLL for (int e = side; e < 4; e += 2) sum += exp2_fast(logits.value[d][a][e] - pivot(max));
      sum = sum_of_lanes(sum, 4, 32);
      if (lane() / 4 == 0) column_share.put(warp_row() * kBlock + logits.column(a, side), {max, sum});
    }
  barrier();

  const int t = thread() % kBlock, row = first_row() + t, column = first_column() + t;
  if (thread() < kBlock) {
    LogSum whole = row_share[t];
    for (int w = 1; w < kWarpsAcross; ++w) whole = merged(whole, row_share[w * kBlock + t]);
    if (row < tile.rows) row_parts.put(static_cast<i64>(block_x()) * tile.rows + row, whole);
  } else {
    LogSum whole = column_share[t];
    for (int w = 1; w < kWarpsDown; ++w) whole = merged(whole, column_share[w * kBlock + t]);
    if (column < tile.columns) column_parts.put(static_cast<i64>(block_y()) * tile.columns + column, whole);
  }
}
