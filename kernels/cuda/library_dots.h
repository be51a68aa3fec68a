// A block's dots, read from a tile in memory: a library GEMM's, or those that an earlier pass kept.
#pragma once
#include "block_logits.h"

struct Operands {
  In<float> dots;  // (rows, columns)
  int aligned;     // whether all rows start at a multiple of 16 bytes
};

// What one thread reads of a row: two columns of each of its fragments, neighbours all of them.
DEVICE void read_row(BlockLogits& dots, int d, int half, const Operands& in, const Tile& tile) {
  const int i = first_row() + dots.row(d, half), first = first_column() + dots.column(0, 0);
  if (i >= tile.rows) return;
  const i64 start = static_cast<i64>(i) * tile.columns + first;
  UNROLL for (int a = 0; a < kAcross; a += 2) {
    FourFloats four = {};
    if (in.aligned) {
      if (first + 2 * a < tile.columns)
        four = In<FourFloats>{reinterpret_cast<const FourFloats*>(in.dots.at)}[(start + 2 * a) / 4];
    } else {
      UNROLL for (int n = 0; n < 4; ++n)
        if (first + 2 * a + n < tile.columns) four.value[n] = in.dots[start + 2 * a + n];
    }
    UNROLL for (int n = 0; n < 4; ++n) dots.value[d][a + n / 2][half + n % 2] = four.value[n];
  }
}

DEVICE BlockLogits block_dots(const Operands& in, const Tile& tile) {
  BlockLogits dots = {};
  BlockLogits::each_row([&](int d, int half) { read_row(dots, d, half, in, tile); });
  return dots;
}
