// The sigmoid distillation loss of every logit and its gradient, in one pass over dots in memory. A pair's target q is the
// teachers' weighted mean of sigmoid(t); G = row weight * (sigmoid(z) - q), 0 for excluded pairs.
#include "direct_gradient.h"
#include "sigmoid_parts.h"
#include "teachers.h"

struct Teacher {
  In<float> dots, scale_and_bias;
  float weight;
};

DEVICE BlockLogits targets(const Teachers<Teacher>& teachers, const Operands& student, const Tile& tile) {
  BlockLogits target = {};
  UNROLL for (int k = 0; k < TEACHERS; ++k) {
    const Teacher& teacher = teachers.of[k];
    const BlockLogits logits = teacher_logits(teacher.dots, teacher.scale_and_bias, student, tile);
    BlockLogits::each_row([&](int d, int half) {
      BlockLogits::each_column([&](int a, int side) {
        const float logit = logits.value[d][a][half + side];
        target.value[d][a][half + side] += teacher.weight * probability_of(logit, exp2_fast(-fabsf(logit)));
      });
    });
  }
  return target;
}

// Four lanes' share of a row. This thread's targets become gradients on the way.
DEVICE RowPart soft_row(const BlockLogits& logits, BlockLogits& target, int d, int half, float weight) {
  RowPart part = {{0.0f, 0.0f}, {-infinity()}};
  BlockLogits::each_column([&](int a, int side) {
    const float logit = logits.value[d][a][half + side];
    float& q = target.value[d][a][half + side];
    const Sigmoid one = sigmoid_of(logit, q);
    part = part + RowPart{one, {logit}};
    q = weight * one.probability;
  });
  part.sum = {sum_of_lanes(part.sum.loss, 1, 4), sum_of_lanes(part.sum.probability, 1, 4)};
  part.max = {max_of_lanes(part.max.value, 1, 4)};
  return part;
}

// row_parts (blocks across, rows) and column_max (blocks down, columns). The gradient is absent where none is wanted.
KERNEL(kThreads, kBlocksAtOnce)
distill_sigmoid(Operands student, Tile tile, In<float> row_weight, Teachers<Teacher> teachers, DirectGradient to,
                Out<RowPart> row_parts, Out<Max> column_max) {
  BlockLogits gradient = targets(teachers, student, tile);
  BlockLogits logits = block_dots(student, tile);
  to_logits(logits, tile);
  const auto of_row = [&](int d, int half) {
    const int row = first_row() + logits.row(d, half);
    return soft_row(logits, gradient, d, half, row_weight.given() && row < tile.rows ? row_weight[row] : 0.0f);
  };
  const auto of_column = [&](int a, int side) {
    float max = -infinity();
    logits.in_column(a, side, [&](float t) { max = fmaxf(max, t); });
    return Max{max_of_lanes(max, 4, 32)};
  };
  join_parts(of_row, row_parts, of_column, column_max, tile);
  if (to.at.given()) write_gradient(gradient, to, tile);
}
