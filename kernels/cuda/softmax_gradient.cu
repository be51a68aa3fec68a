// Backward of the softmax loss: the gradient of every logit t, recomputed from the finished log-sum-exps.
// G = row factor 2^(t - row shift) + column factor 2^(t - column shift), 0 for excluded pairs.
#include "block_dots.h"
#include "block_gradient.h"
#include "block_weights.h"

KERNEL(kThreads, kBlocksAtOnce)
softmax_gradient(Operands in, Tile tile, Weights of_rows, Weights of_columns, Gradient gradient) {
  BlockLogits logits = block_dots(in, tile);
  to_logits(logits, tile);
  to_gradients(logits, of_rows, of_columns);
  write_gradient(logits, gradient, tile);
}
