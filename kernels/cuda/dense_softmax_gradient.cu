// As softmax_gradient.cu, from the dots of a library GEMM. One thread a pair.
#include "tile.h"

constexpr int kThreads = 256;

// dots and gradient (rows, columns).
KERNEL(kThreads, 1)
dense_softmax_gradient(In<float> dots, Tile tile, Weights of_rows, Weights of_columns, Out<float> gradient) {
  const int i = block_y(), j = block_x() * kThreads + thread();
  if (j >= tile.columns) return;
  const i64 at = static_cast<i64>(i) * tile.columns + j;
  const float logit = tile.logit(dots[at], i, j);
  gradient.put(at, of_rows[i].gradient(logit) + of_columns[j].gradient(logit));
}
