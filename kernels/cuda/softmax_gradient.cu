// Backward of the softmax loss: the gradient of every logit t, recomputed from the finished log-sum-exps.
// G = row factor 2^(t - row shift) + column factor 2^(t - column shift), 0 for excluded pairs.
#include "block_gradient.h"

KERNEL(kThreads, 2) softmax_gradient(Operands in, Tile tile, Weights of_rows, Weights of_columns, Gradient gradient) {
  BlockLogits logits = block_dots(in, tile);
  to_logits(logits, tile);
  Weight column[kAcross][2];
  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int e = 0; e < 2; ++e) column[a][e] = of_columns[first_column() + logits.column(a, e)];
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int half = 0; half < 4; half += 2) {
      const Weight row = of_rows[first_row() + logits.row(d, half)];
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = 0; e < 2; ++e) {
          float& value = logits.value[d][a][half + e];
          value = row.gradient(value) + column[a][e].gradient(value);
        }
    }
  write_gradient(logits, gradient, tile);
}
