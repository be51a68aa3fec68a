// Backward of the softmax loss: the gradient of every logit t, recomputed from the finished log-sum-exps.
// G = row factor 2^(t - row shift) + column factor 2^(t - column shift), 0 for excluded pairs.
#include "block_dots.h"
#include "block_gradient.h"

KERNEL(kThreads, kBlocksAtOnce)
softmax_gradient(Operands in, Tile tile, Weights of_rows, Weights of_columns, Gradient gradient) {
  BlockLogits logits = block_dots(in, tile);
  to_logits(logits, tile);
  Weight column[kAcross][2];
  BlockLogits::each_column([&](int a, int side) {
    column[a][side] = of_columns[first_column() + logits.column(a, side)];
  });
  BlockLogits::each_row([&](int d, int half) {
    const Weight row = of_rows[first_row() + logits.row(d, half)];
    UNROLL for (int a = 0; a < kAcross; ++a)
      UNROLL for (int side = 0; side < 2; ++side) {
        float& value = logits.value[d][a][half + side];
        value = row.gradient(value) + column[a][side].gradient(value);
      }
  });
  write_gradient(logits, gradient, tile);
}
