// The log-sum-exp of every column over a band of rows of a tile whose dots a library GEMM left in memory. One thread a
// column: neighbouring lanes read neighbouring dots. merge.cu joins the bands.
#include "tile.h"

constexpr int kThreads = 256, kBand = 128;

// dots (rows, columns); parts (bands, columns).
KERNEL(kThreads, 1) dense_column_stats(In<float> dots, Tile tile, Out<LogSum> parts) {
  const int j = block_x() * kThreads + thread(), first = block_y() * kBand;
  if (j >= tile.columns) return;
  LogSum own = {-infinity(), 0.0f};
  for (int i = first; i < first + kBand && i < tile.rows; ++i)
    own = own + LogSum{tile.logit(dots[static_cast<i64>(i) * tile.columns + j], i, j), 1.0f};
  parts.put(static_cast<i64>(block_y()) * tile.columns + j, own);
}
