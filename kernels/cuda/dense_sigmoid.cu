// As sigmoid.cu, from the dots of a library GEMM. One warp a row; dense_column_stats.cu has the columns' maxima.
#include "tile.h"

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// dots (rows, columns); gradient (rows, columns), or absent; loss, probability and max (rows), or absent, are updated.
KERNEL(kThreads, 1)
dense_sigmoid(In<float> dots, Tile tile, In<float> row_weight, Out<float> gradient, Out<float> loss,
              Out<float> probability, Out<float> max) {
  const int i = block_x() * kWarps + warp();
  if (i >= tile.rows) return;
  const float weight = row_weight.given() ? row_weight[i] : 0.0f;
  Sigmoid sum = {0.0f, 0.0f};
  float largest = -infinity();
  for (int j = lane(); j < tile.columns; j += kWarp) {
    const i64 at = static_cast<i64>(i) * tile.columns + j;
    const float logit = tile.logit(dots[at], i, j);
    const Sigmoid one = sigmoid_of(logit);
    sum = sum + one;
    largest = fmaxf(largest, logit);
    if (gradient.given()) gradient.put(at, weight * one.probability);
  }
  sum = {sum_of_lanes(sum.loss, 1, kWarp), sum_of_lanes(sum.probability, 1, kWarp)};
  largest = max_of_lanes(largest, 1, kWarp);
  if (lane() != 0 || !loss.given()) return;
  loss.put(i, loss[i] + sum.loss);
  probability.put(i, probability[i] + sum.probability);
  max.put(i, fmaxf(max[i], largest));
}
