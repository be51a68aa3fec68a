// Backward of the softmax loss: the gradient of every negative's logit t, recomputed from the finished log-sum-exps.
// G = row weight 2^(t - row log_sum) + column weight 2^(t - column log_sum); the diagonal and masked pairs are 0.
#include "gradient_tile.h"

KERNEL(kThreads, 2) softmax_gradient(Logits in, Softmaxes of_rows, Softmaxes of_columns, Out<u16> gradient, int stride) {
  LogitTile tile = logit_tile(in);
  Softmax columns[kAcross][2];
  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int e = 0; e < 2; ++e) columns[a][e] = of_columns[tile.column(a, e)];
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int half = 0; half < 4; half += 2) {
      const Softmax row = of_rows[tile.row(d, half)];
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = 0; e < 2; ++e) {
          float& value = tile.value[d][a][half + e];
          value = row.gradient(value) + columns[a][e].gradient(value);
        }
    }
  write_gradient(tile, gradient, in.pairs.rows, stride);
}
