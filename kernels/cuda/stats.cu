// Forward of the softmax loss. One block reduces a 128 x 128 tile of logits to the log-sum-exp over its negatives of each
// row and of each column: registers, then the lanes that share a row (or column), then the warps, always in one order.
#include "logit_tile.h"

// row_parts (tiles across, rows) and column_parts (tiles down, columns), in base 2.
KERNEL(kThreads, 2) stats(Logits in, Out<LogSum> row_parts, Out<LogSum> column_parts) {
  const LogitTile tile = logit_tile(in);

  const Shared<LogSum> row_share = shared_memory<LogSum>(0);  // (warps across, 128)
  const Shared<LogSum> column_share = shared_memory<LogSum>(kWarpsAcross * kTile * static_cast<int>(sizeof(LogSum)));

  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int e = 0; e < 4; e += 2) {
      float max = -infinity(), sum = 0.0f;
      UNROLL for (int a = 0; a < kAcross; ++a) max = fmaxf(max, fmaxf(tile.value[d][a][e], tile.value[d][a][e + 1]));
      max = max_of_lanes(max, 1, 4);  // the 4 lanes of a row
      UNROLL for (int a = 0; a < kAcross; ++a)
        sum += exp2_fast(tile.value[d][a][e] - pivot(max)) + exp2_fast(tile.value[d][a][e + 1] - pivot(max));
      sum = sum_of_lanes(sum, 1, 4);
      if (lane() % 4 == 0) row_share.put(warp() % kWarpsAcross * kTile + tile.tile_row(d, e), {max, sum});
    }

  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int e = 0; e < 2; ++e) {
      float max = -infinity(), sum = 0.0f;
      UNROLL for (int d = 0; d < kDown; ++d) max = fmaxf(max, fmaxf(tile.value[d][a][e], tile.value[d][a][e + 2]));
      max = max_of_lanes(max, 4, 32);  // the 8 lanes of a column
      UNROLL for (int d = 0; d < kDown; ++d)
        sum += exp2_fast(tile.value[d][a][e] - pivot(max)) + exp2_fast(tile.value[d][a][e + 2] - pivot(max));
      sum = sum_of_lanes(sum, 4, 32);
      if (lane() / 4 == 0) column_share.put(warp() / kWarpsAcross * kTile + tile.tile_column(a, e), {max, sum});
    }
  barrier();

  const int t = thread() % kTile;
  if (thread() < kTile) {
    LogSum whole = row_share[t];
    for (int w = 1; w < kWarpsAcross; ++w) whole = merged(whole, row_share[w * kTile + t]);
    const int row = block_y() * kTile + t;
    if (row < in.pairs.rows) row_parts.put(static_cast<i64>(block_x()) * in.pairs.rows + row, whole);
  } else {
    LogSum whole = column_share[t];
    for (int w = 1; w < kWarpsDown; ++w) whole = merged(whole, column_share[w * kTile + t]);
    const int column = block_x() * kTile + t;
    if (column < in.pairs.columns) column_parts.put(static_cast<i64>(block_y()) * in.pairs.columns + column, whole);
  }
}
