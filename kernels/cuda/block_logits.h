// One thread block computes a 128 x 128 piece of a tile's logits: 8 warps as 2 x 4, each 64 x 32 in its registers.
//
// The inner dimension is cut in slices of 32. A ring of kStages slices in shared memory lets the copies of later slices
// run under the multiplication of the current one. One barrier a slice ensures both that all threads' copies of this slice
// have landed and that all threads have left the slice before, whose stage is filled next.
#pragma once
#include "tensor_core.h"
#include "tile.h"

#ifndef STAGES
#define STAGES 3
#endif

constexpr int kBlock = 128, kThreads = 256, kStages = STAGES;
constexpr int kChunk = 8;                                // elements in a Chunk
constexpr int kSliceChunks = 4;                          // chunks in a row of a slice
constexpr int kSlice = kSliceChunks * kChunk;            // elements of the inner dimension
constexpr int kStageChunks = 2 * kBlock * kSliceChunks;  // 128 rows of x, then 128 rows of y

constexpr int kWarpsDown = 2, kWarpsAcross = 4;
constexpr int kWarpRows = kBlock / kWarpsDown, kWarpColumns = kBlock / kWarpsAcross;
constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // 16 x 8 fragments of a warp's piece

struct Operands {
  In<u16> x, y;  // (rows, depth) and (columns, depth), both starting at a multiple of 16 bytes
  int depth;     // a multiple of 8
};

DEVICE int warp_row() { return warp() / kWarpsAcross; }
DEVICE int warp_column() { return warp() % kWarpsAcross; }
DEVICE int first_row() { return block_y() * kBlock; }
DEVICE int first_column() { return block_x() * kBlock; }

// What one thread holds of the block's piece: fragment (d, a) has four numbers, those of row `half` = 0 and of row
// `half` = 2, eight rows below, each in column `side` = 0 and its right neighbour, `side` = 1.
struct BlockLogits {
  float value[kDown][kAcross][4];  // the last index is half + side

  static DEVICE int row(int d, int half) { return warp_row() * kWarpRows + d * 16 + half * 4 + lane() / 4; }
  static DEVICE int column(int a, int side) { return warp_column() * kWarpColumns + a * 8 + lane() % 4 * 2 + side; }

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

// Where chunk c of a slice's row lies. The exclusive or spreads 8 neighbouring rows over all 32 banks.
DEVICE int swizzled(int row, int c) { return row * kSliceChunks + (c ^ (row / 2 % kSliceChunks)); }

DEVICE Shared<Chunk> stage_of(int slice) {
  return shared_memory<Chunk>(slice % kStages * kStageChunks * static_cast<int>(sizeof(Chunk)));
}

// Start copying 128 rows of a slice. Rows past the end and elements past the depth become zeros.
DEVICE void fetch_rows(Shared<Chunk> stage, int stage_row, In<u16> from, int first, int count, int slice, int depth) {
  UNROLL for (int t = 0; t < kBlock * kSliceChunks; t += kThreads) {
    const int r = (t + thread()) / kSliceChunks, c = thread() % kSliceChunks, k = slice * kSlice + c * kChunk;
    const i64 offset = static_cast<i64>(first + r) * depth + k;
    copy_async(stage, swizzled(stage_row + r, c), from, offset, first + r < count && k < depth);
  }
}

DEVICE void fetch(const Operands& in, const Tile& tile, int slice) {
  const Shared<Chunk> stage = stage_of(slice);
  fetch_rows(stage, 0, in.x, first_row(), tile.rows, slice, in.depth);
  fetch_rows(stage, kBlock, in.y, first_column(), tile.columns, slice, in.depth);
}

// Add one slice's products.
DEVICE void accumulate(BlockLogits& dots, Shared<Chunk> stage) {
  const int x_row = warp_row() * kWarpRows, y_row = kBlock + warp_column() * kWarpColumns;
  UNROLL for (int k = 0; k < kSliceChunks; k += 2) {  // 16 elements of the inner dimension
    u32 x[kDown][4], y[kAcross / 2][4];
    UNROLL for (int d = 0; d < kDown; ++d)
      load_matrices(x[d], stage, swizzled(x_row + d * 16 + lane() % 16, k + lane() / 16));
    UNROLL for (int a = 0; a < kAcross / 2; ++a)
      load_matrices(y[a], stage, swizzled(y_row + a * 16 + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2));
    UNROLL for (int d = 0; d < kDown; ++d)
      UNROLL for (int a = 0; a < kAcross; ++a)
        multiply_add(dots.value[d][a], x[d], y[a / 2][a % 2 * 2], y[a / 2][a % 2 * 2 + 1]);
  }
}

// This block's piece of x y^T. On return the shared memory is free for other use.
DEVICE BlockLogits block_dots(const Operands& in, const Tile& tile) {
  BlockLogits dots = {};
  const int slices = (in.depth + kSlice - 1) / kSlice;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < slices) fetch(in, tile, s);
    commit_copies();
  }
  for (int s = 0; s < slices; ++s) {
    wait_copies<kStages - 2>();
    barrier();
    if (s + kStages - 1 < slices) fetch(in, tile, s + kStages - 1);
    commit_copies();
    accumulate(dots, stage_of(s));
  }
  barrier();
  return dots;
}

DEVICE void exclude_equal_labels(BlockLogits& logits, const Tile& tile) {
  BlockLogits::each_column([&](int a, int side) {
    const int label = tile.column_label(first_column() + logits.column(a, side));
    BlockLogits::each_row([&](int d, int half) {
      float& value = logits.value[d][a][half + side];
      if (tile.row_label(first_row() + logits.row(d, half)) == label) value = -infinity();
    });
  });
}

// Dots to logits in base 2, -infinity where the pair is excluded or outside the tile.
DEVICE void to_logits(BlockLogits& dots, const Tile& tile) {
  const LogitMap logit = tile.logit_map();
  dots.each([&](float& value, int i, int j) { value = tile.holds(i, j) ? logit(value) : -infinity(); });
  if (tile.row_labels.given()) exclude_equal_labels(dots, tile);
}
