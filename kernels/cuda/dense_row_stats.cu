// The log-sum-exp of every row of a tile whose dots a library GEMM left in memory. One warp a row.
#include "tile.h"

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// dots (rows, columns); max and sum (rows) are updated in place.
KERNEL(kThreads, 1) dense_row_stats(In<float> dots, Tile tile, Out<float> max, Out<float> sum) {
  const int i = block_x() * kWarps + warp();
  if (i >= tile.rows) return;
  LogSum own = {-infinity(), 0.0f};
  for (int j = lane(); j < tile.columns; j += kWarp)
    own = own + LogSum{tile.logit(dots[static_cast<i64>(i) * tile.columns + j], i, j), 1.0f};
  for (int bit = 1; bit < kWarp; bit *= 2) own = own + LogSum{shuffle_xor(own.max, bit), shuffle_xor(own.sum, bit)};
  if (lane() != 0) return;
  own = LogSum{max[i], sum[i]} + own;
  max.put(i, own.max);
  sum.put(i, own.sum);
}
