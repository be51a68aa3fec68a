// The sigmoid loss of every logit and its gradient, in one pass: no statistics have to be finished first.
// G = row weight * sigmoid(z), 0 for excluded pairs.
#include "block_gradient.h"

struct SigmoidPart {  // of a row
  Sigmoid sum;
  float max;  // of the logits, in base 2
  DEVICE SigmoidPart operator+(SigmoidPart other) const { return {sum + other.sum, fmaxf(max, other.max)}; }
};

constexpr int kRowShare = kGradientBytes;  // byte offset of (warps across, 128) parts, past the gradient
constexpr int kColumnShare = kRowShare + kWarpsAcross * kBlock * static_cast<int>(sizeof(SigmoidPart));

DEVICE void share_column_max(const BlockLogits& logits) {
  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int side = 0; side < 2; ++side) {
      float max = -infinity();
      UNROLL for (int d = 0; d < kDown; ++d) max = fmaxf(max, fmaxf(logits.value[d][a][side], logits.value[d][a][side + 2]));
      max = max_of_lanes(max, 4, 32);  // the 8 lanes of a column
      if (lane() / 4 == 0) shared_memory<float>(kColumnShare).put(warp_row() * kBlock + logits.column(a, side), max);
    }
}

// Logits become gradients, one row a turn.
DEVICE void share_row_parts(BlockLogits& logits, const Tile& tile, In<float> row_weight) {
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int half = 0; half < 4; half += 2) {
      const int row = first_row() + logits.row(d, half);
      const float weight = row_weight.given() && row < tile.rows ? row_weight[row] : 0.0f;
      SigmoidPart part = {{0.0f, 0.0f}, -infinity()};
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = half; e < half + 2; ++e) {
          float& value = logits.value[d][a][e];
          const Sigmoid one = sigmoid_of(value);
          part = part + SigmoidPart{one, value};
          value = weight * one.probability;
        }
      part = {{sum_of_lanes(part.sum.loss, 1, 4), sum_of_lanes(part.sum.probability, 1, 4)}, max_of_lanes(part.max, 1, 4)};
      if (lane() % 4 == 0)
        shared_memory<SigmoidPart>(kRowShare).put(warp_column() * kBlock + logits.row(d, half), part);
    }
}

// row_parts (blocks across, rows) and column_max (blocks down, columns). The gradient is absent where nobody needs it.
KERNEL(kThreads, 2)
sigmoid(Operands in, Tile tile, In<float> row_weight, Gradient gradient, Out<SigmoidPart> row_parts, Out<float> column_max) {
  BlockLogits logits = block_dots(in, tile);
  to_logits(logits, tile);
  share_column_max(logits);
  share_row_parts(logits, tile, row_weight);
  if (gradient.at.given()) write_gradient(logits, gradient, tile);
  barrier();

  const int t = thread() % kBlock, row = first_row() + t, column = first_column() + t;
  if (thread() < kBlock) {
    const Shared<SigmoidPart> share = shared_memory<SigmoidPart>(kRowShare);
    SigmoidPart whole = share[t];
    for (int w = 1; w < kWarpsAcross; ++w) whole = whole + share[w * kBlock + t];
    if (row < tile.rows) row_parts.put(static_cast<i64>(block_x()) * tile.rows + row, whole);
  } else {
    const Shared<float> share = shared_memory<float>(kColumnShare);
    float max = share[t];
    for (int w = 1; w < kWarpsDown; ++w) max = fmaxf(max, share[w * kBlock + t]);
    if (column < tile.columns) column_max.put(static_cast<i64>(block_y()) * tile.columns + column, max);
  }
}
