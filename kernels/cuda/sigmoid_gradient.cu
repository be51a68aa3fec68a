// The sigmoid loss of every negative and the gradient of its logit, in one pass: no statistics have to be known first.
// G = row weight * sigmoid(z); the diagonal and masked pairs are 0.
#include "gradient_tile.h"

// row_parts (tiles across, rows): sums of the loss and of its gradient, without weights, over a row's negatives.
KERNEL(kThreads, 2)
sigmoid_gradient(Logits in, In<float> row_weight, Out<u16> gradient, int stride, Out<Sigmoid> row_parts) {
  LogitTile tile = logit_tile(in);
  const Shared<Sigmoid> row_share = shared_memory<Sigmoid>(kGradientBytes);  // (warps across, 128)
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int half = 0; half < 4; half += 2) {
      const int row = tile.row(d, half);
      const float weight = row_weight.given() && row < in.pairs.rows ? row_weight[row] : 1.0f;
      Sigmoid sum = {};
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = half; e < half + 2; ++e) {
          const Sigmoid one = sigmoid(tile.value[d][a][e]);
          sum = sum + one;
          tile.value[d][a][e] = weight * one.gradient;
        }
      sum = {sum_of_lanes(sum.loss, 1, 4), sum_of_lanes(sum.gradient, 1, 4)};
      if (lane() % 4 == 0) row_share.put(warp() % kWarpsAcross * kTile + tile.tile_row(d, half), sum);
    }
  write_gradient(tile, gradient, in.pairs.rows, stride);  // its barrier publishes row_share too

  const int t = thread(), row = block_y() * kTile + t;
  if (t < kTile && row < in.pairs.rows) {
    Sigmoid whole = row_share[t];
    for (int w = 1; w < kWarpsAcross; ++w) whole = whole + row_share[w * kTile + t];
    row_parts.put(static_cast<i64>(block_x()) * in.pairs.rows + row, whole);
  }
}
