// A block's dots, computed on the tensor cores.
//
// The inner dimension is cut in slices of 32. A ring of kStages slices in shared memory lets the copies of later slices
// run under the multiplication of the current one. One barrier a slice ensures both that all threads' copies of this slice
// have landed and that all threads have left the slice before, whose stage is filled next.
#pragma once
#include "block_logits.h"
#include "tensor_core.h"

#ifndef STAGES
#define STAGES 3
#endif

constexpr int kStages = STAGES;
constexpr int kSliceChunks = 4;                                            // chunks in a row of a slice
constexpr int kSlice = kSliceChunks * kChunk;                              // elements of the inner dimension
constexpr int kStageChunks = (kBlockRows + kBlockColumns) * kSliceChunks;  // the rows of x, then those of y

struct Operands {
  In<u16> x, y;  // (rows, depth) and (columns, depth), both starting at a multiple of 16 bytes
  int depth;     // a multiple of 8
};

// Where chunk c of a slice's row lies. The exclusive or spreads 8 neighbouring rows over all 32 banks.
DEVICE int swizzled(int row, int c) { return row * kSliceChunks + (c ^ (row / 2 % kSliceChunks)); }

DEVICE Shared<Chunk> stage_of(int slice) {
  return shared_memory<Chunk>(slice % kStages * kStageChunks * static_cast<int>(sizeof(Chunk)));
}

// Start copying kRows rows of a slice. Rows past the end and elements past the depth become zeros.
template <int kRows>
DEVICE void fetch_rows(Shared<Chunk> stage, int stage_row, In<u16> from, int first, int count, int slice, int depth) {
  UNROLL for (int t = 0; t < kRows * kSliceChunks; t += kThreads) {
    const int r = t / kSliceChunks + thread() / kSliceChunks, c = thread() % kSliceChunks;
    const int k = slice * kSlice + c * kChunk;
    const i64 offset = static_cast<i64>(first + r) * depth + k;
    copy_async(stage, swizzled(stage_row + r, c), from, offset, first + r < count && k < depth);
  }
}

DEVICE void fetch(const Operands& in, const Tile& tile, int slice) {
  const Shared<Chunk> stage = stage_of(slice);
  fetch_rows<kBlockRows>(stage, 0, in.x, first_row(), tile.rows, slice, in.depth);
  fetch_rows<kBlockColumns>(stage, kBlockRows, in.y, first_column(), tile.columns, slice, in.depth);
}

// What a warp multiplies at once: its rows of x and of y, 16 elements of the inner dimension.
struct Fragments {
  u32 x[kDown][4], y[kAcross / 2][4];
};

DEVICE void load(Fragments& to, Shared<Chunk> stage, int k) {
  const int x_row = warp_row() * kWarpRows, y_row = kBlockRows + warp_column() * kWarpColumns;
  UNROLL for (int d = 0; d < kDown; ++d)
    load_matrices(to.x[d], stage, swizzled(x_row + d * 16 + lane() % 16, k + lane() / 16));
  UNROLL for (int a = 0; a < kAcross / 2; ++a)
    load_matrices(to.y[a], stage, swizzled(y_row + a * 16 + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2));
}

DEVICE void add_products(BlockLogits& dots, const Fragments& from) {
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int a = 0; a < kAcross; ++a)
      multiply_add(dots.value[d][a], from.x[d], from.y[a / 2][a % 2 * 2], from.y[a / 2][a % 2 * 2 + 1]);
}

// Once all threads are here, all their copies of a slice have landed, and all have loaded what they need of the one before.
DEVICE void enter_slice() {
  wait_copies<kStages - 2>();
  barrier();
}

// Start copying the slice that takes the stage of the one before slice s.
DEVICE void refill(const Operands& in, const Tile& tile, int s, int slices) {
  if (s + kStages - 1 < slices) fetch(in, tile, s + kStages - 1);
  commit_copies();
}

// Two blocks share a processor: one multiplies while the other waits, and fragments need not be loaded ahead.
DEVICE void add_slices_in_turn(BlockLogits& dots, const Operands& in, const Tile& tile, int slices) {
  Fragments now;
  for (int s = 0; s < slices; ++s) {
    enter_slice();
    refill(in, tile, s, slices);
    UNROLL for (int k = 0; k < kSliceChunks; k += 2) {
      load(now, stage_of(s), k);
      add_products(dots, now);
    }
  }
  barrier();  // before the stages are used for something else
}

// A block alone: the next fragments are loaded under the products of the current ones, over the barrier, too.
DEVICE void add_slices_ahead(BlockLogits& dots, const Operands& in, const Tile& tile, int slices) {
  static_assert(kSliceChunks == 4, "a slice is two fragments deep");
  Fragments first, second;
  enter_slice();
  refill(in, tile, 0, slices);
  load(first, stage_of(0), 0);
  for (int s = 0; s < slices; ++s) {
    load(second, stage_of(s), 2);
    add_products(dots, first);
    enter_slice();  // after the last slice: before the stages are used for something else
    if (s + 1 < slices) load(first, stage_of(s + 1), 0);
    refill(in, tile, s + 1, slices);
    add_products(dots, second);
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
  if (kBlocksAtOnce > 1)
    add_slices_in_turn(dots, in, tile, slices);
  else
    add_slices_ahead(dots, in, tile, slices);
  return dots;
}
