// The log-sum-exp of every row and column of a block's logits. Registers first, then the lanes that share a row (or
// column), then the warps: always in one order, so always the same bits.
#pragma once
#include "block_parts.h"

DEVICE void write_log_sums(BlockLogits& logits, Out<LogSum> row_parts, Out<LogSum> column_parts, const Tile& tile) {
  join_parts(
      [&](int d, int half) { return log_sum_over([&](auto visit) { logits.in_row(d, half, visit); }, 1, 4); },
      row_parts,
      [&](int a, int side) { return log_sum_over([&](auto visit) { logits.in_column(a, side, visit); }, 4, 32); },
      column_parts, tile);
}
