// What the softmax makes of a block's logits in backward: row factor 2^(t - row shift) + column factor 2^(t - column shift).
#pragma once
#include "block_logits.h"

DEVICE void to_gradients(BlockLogits& logits, Weights of_rows, Weights of_columns) {
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
}
