// One thread block's piece of a tile's logits, in registers: 8 warps as 2 x 4, each 64 x 32. Where a block has 256 columns
// (-DCOLUMNS=256), a warp has 64 x 64: twice the work on 1.5 times the operands, for devices whose shared memory or L2
// cannot feed their tensor cores otherwise. Distillation (-DROWS=64 -DCOLUMNS=64), where a thread
// holds two pieces at once, the student's and a teacher's, has blocks of 64 x 64.
#pragma once
#include "tile.h"

#ifndef ROWS
#define ROWS 128
#endif
#ifndef COLUMNS
#define COLUMNS 128
#endif

constexpr int kBlockRows = ROWS, kBlockColumns = COLUMNS, kThreads = 256;
constexpr int kBlocksAtOnce = kBlockColumns <= 128 ? 2 : 1;  // on one processor: what its registers allow

constexpr int kWarpsDown = 2, kWarpsAcross = 4;
constexpr int kWarpRows = kBlockRows / kWarpsDown, kWarpColumns = kBlockColumns / kWarpsAcross;
constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // 16 x 8 fragments of a warp's piece

DEVICE int warp_row() { return warp() / kWarpsAcross; }
DEVICE int warp_column() { return warp() % kWarpsAcross; }
DEVICE int first_row() { return block_y() * kBlockRows; }
DEVICE int first_column() { return block_x() * kBlockColumns; }

// What one thread holds of the block's piece: fragment (d, a) has four numbers, those of row `half` = 0 and of row
// `half` = 2, eight rows below, each in column `side` = 0 and its right neighbour, `side` = 1.
struct BlockLogits {
  float value[kDown][kAcross][4];  // the last index is half + side

  static DEVICE int row(int d, int half) { return warp_row() * kWarpRows + d * 16 + half * 4 + lane() / 4; }
#ifdef LIBRARY_DOTS  // all that a thread has of a row lies together, for wide loads
  static DEVICE int column(int a, int side) { return warp_column() * kWarpColumns + (lane() % 4 * kAcross + a) * 2 + side; }
#else  // as the tensor cores leave it
  static DEVICE int column(int a, int side) { return warp_column() * kWarpColumns + a * 8 + lane() % 4 * 2 + side; }
#endif

  // visit(d, half) the thread's rows, visit(a, side) its columns: row(d, half) and column(a, side).
  template <class Visit>
  static DEVICE void each_row(Visit visit) {
    UNROLL for (int d = 0; d < kDown; ++d)
      UNROLL for (int half = 0; half < 4; half += 2) visit(d, half);
  }
  template <class Visit>
  static DEVICE void each_column(Visit visit) {
    UNROLL for (int a = 0; a < kAcross; ++a)
      UNROLL for (int side = 0; side < 2; ++side) visit(a, side);
  }

  // visit(value) what the thread holds of one row, or of one column.
  template <class Visit>
  DEVICE void in_row(int d, int half, Visit visit) {
    UNROLL for (int a = 0; a < kAcross; ++a)
      UNROLL for (int side = 0; side < 2; ++side) visit(value[d][a][half + side]);
  }
  template <class Visit>
  DEVICE void in_column(int a, int side, Visit visit) {
    UNROLL for (int d = 0; d < kDown; ++d)
      UNROLL for (int half = 0; half < 4; half += 2) visit(value[d][a][half + side]);
  }

  // visit(value, i, j) everything, by its place in the tile.
  template <class Visit>
  DEVICE void each(Visit visit) {
    each_row([&](int d, int half) {
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int side = 0; side < 2; ++side)
          visit(value[d][a][half + side], first_row() + row(d, half), first_column() + column(a, side));
    });
  }
};

DEVICE void exclude_equal_labels(BlockLogits& logits, const Tile& tile) {
  BlockLogits::each_column([&](int a, int side) {
    const int label = tile.column_label(first_column() + logits.column(a, side));
    BlockLogits::each_row([&](int d, int half) {
      float& value = logits.value[d][a][half + side];
      if (tile.row_label(first_row() + logits.row(d, half)) == label) value = -infinity();
    });
  });
}

#ifdef DOT_LIMITS  // compiled apart: the wide blocks have no register left for it
DEVICE void exclude_above_limits(BlockLogits& dots, const Tile& tile) {
  BlockLogits::each_column([&](int a, int side) {
    const float limit = tile.column_limit(first_column() + dots.column(a, side));
    BlockLogits::each_row([&](int d, int half) {
      float& dot = dots.value[d][a][half + side];
      if (dot > fminf(tile.row_limit(first_row() + dots.row(d, half)), limit)) dot = -infinity();
    });
  });
}
#endif

// Dots to logits in base 2, -infinity where the pair is excluded or outside the tile.
DEVICE void to_logits(BlockLogits& dots, const Tile& tile) {
#ifdef DOT_LIMITS
  exclude_above_limits(dots, tile);
#endif
  const LogitMap logit = tile.logit_map();
  dots.each([&](float& value, int i, int j) { value = tile.holds(i, j) ? logit(value) : -infinity(); });
  if (tile.row_labels.given()) exclude_equal_labels(dots, tile);
}
