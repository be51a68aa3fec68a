// The sigmoid loss of every logit and its gradient, in one pass: no statistics have to be finished first.
// G = row weight * sigmoid(z), 0 for excluded pairs.
#include "block_dots.h"
#include "block_gradient.h"
#include "sigmoid_parts.h"

// This thread's share of a row. Its logits become gradients on the way.
DEVICE RowPart sigmoid_row(BlockLogits& logits, int d, int half, float weight) {
  RowPart part = {{0.0f, 0.0f}, {-infinity()}};
  logits.in_row(d, half, [&](float& value) {
    const Sigmoid one = sigmoid_of(value);
    part = part + RowPart{one, {value}};
    value = weight * one.probability;
  });
  return part;
}

// row_parts (blocks across, rows) and column_max (blocks down, columns). The gradient is absent where none is wanted.
KERNEL(kThreads, kBlocksAtOnce)
sigmoid(Operands in, Tile tile, In<float> row_weight, Gradient gradient, Out<RowPart> row_parts, Out<Max> column_max) {
  BlockLogits logits = block_dots(in, tile);
  to_logits(logits, tile);

  const auto columns = ColumnParts<Max>::at(kGradientBytes);  // behind the gradient
  BlockLogits::each_column([&](int a, int side) {
    float max = -infinity();
    logits.in_column(a, side, [&](float t) { max = fmaxf(max, t); });
    max = max_of_lanes(max, 4, 32);
    if (lane() / 4 == 0) columns.put(warp_row(), logits.column(a, side), {max});
  });

  const auto rows = RowParts<RowPart>::at(kGradientBytes + columns.kBytes);
  BlockLogits::each_row([&](int d, int half) {
    const int row = first_row() + logits.row(d, half);
    RowPart part = sigmoid_row(logits, d, half, row_weight.given() && row < tile.rows ? row_weight[row] : 0.0f);
    part.sum = {sum_of_lanes(part.sum.loss, 1, 4), sum_of_lanes(part.sum.probability, 1, 4)};
    part.max = {max_of_lanes(part.max.value, 1, 4)};
    if (lane() % 4 == 0) rows.put(warp_column(), logits.row(d, half), part);
  });

  if (gradient.at.given()) write_gradient(logits, gradient, tile);
  barrier();
  write_parts(rows, row_parts, columns, column_max, tile);
}
