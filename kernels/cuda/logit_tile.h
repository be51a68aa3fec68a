// One block computes a 128 x 128 tile of logits x y^T: 8 warps as 2 x 4, each a 64 x 32 piece held in registers.
//
// The inner dimension is cut in slices of 32. A ring of kStages slices in shared memory lets the copies of later slices
// run under the multiplication of the current one; one barrier a slice says both "everybody's copies of this slice have
// landed" and "everybody has left the slice before", whose stage is filled next.
#pragma once
#include "pairs.h"
#include "tensor_core.h"

#ifndef STAGES
#define STAGES 3
#endif

constexpr int kTile = 128, kThreads = 256, kStages = STAGES;
constexpr int kChunk = 8;                             // elements in a Chunk
constexpr int kSliceChunks = 4;                       // chunks in a row of a slice
constexpr int kSlice = kSliceChunks * kChunk;         // 32 elements
constexpr int kStageChunks = 2 * kTile * kSliceChunks;  // 128 rows of x, then 128 rows of y

constexpr int kWarpsAcross = 4, kWarpsDown = 2;
constexpr int kWarpRows = kTile / kWarpsDown, kWarpColumns = kTile / kWarpsAcross;
constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // 16 x 8 fragments of a warp's piece

struct Logits {
  In<u16> x, y;  // (rows, depth) and (columns, depth), 16-byte aligned
  In<float> scale, bias;  // one number each; bias may be absent
  Pairs pairs;
  int depth;  // a multiple of 8
};

using Fragment = float[4];

// What one thread holds of the tile: fragment (d, a), element e is pair (row(d, e), column(a, e)).
struct LogitTile {
  Fragment value[kDown][kAcross];

  static DEVICE int tile_row(int d, int e) { return warp() / kWarpsAcross * kWarpRows + d * 16 + e / 2 * 8 + lane() / 4; }
  static DEVICE int tile_column(int a, int e) { return warp() % kWarpsAcross * kWarpColumns + a * 8 + lane() % 4 * 2 + e % 2; }
  static DEVICE int row(int d, int e) { return block_y() * kTile + tile_row(d, e); }
  static DEVICE int column(int a, int e) { return block_x() * kTile + tile_column(a, e); }

  template <class Visit>  // visit(value, d, a, e)
  DEVICE void each(Visit visit) {
    UNROLL for (int d = 0; d < kDown; ++d)
      UNROLL for (int a = 0; a < kAcross; ++a)
        UNROLL for (int e = 0; e < 4; ++e) visit(value[d][a][e], d, a, e);
  }
};

// Where chunk c of a slice's row lies. The exclusive or spreads 8 neighbouring rows over all 32 banks.
DEVICE int swizzled(int row, int c) { return row * kSliceChunks + (c ^ (row / 2 % kSliceChunks)); }

DEVICE Shared<Chunk> stage_of(int slice) {
  return shared_memory<Chunk>(slice % kStages * kStageChunks * static_cast<int>(sizeof(Chunk)));
}

// Start copying 128 rows of one slice; rows past the end and elements past the depth become zeros.
DEVICE void fetch_rows(Shared<Chunk> stage, int stage_row, In<u16> from, int first_row, int rows, int slice, int depth) {
  for (int t = thread(); t < kTile * kSliceChunks; t += kThreads) {
    const int r = t / kSliceChunks, c = t % kSliceChunks;
    const int row = first_row + r, k = slice * kSlice + c * kChunk;
    copy_async(stage, swizzled(stage_row + r, c), from, static_cast<i64>(row) * depth + k, row < rows && k < depth);
  }
}

DEVICE void fetch(const Logits& in, int slice) {
  const Shared<Chunk> stage = stage_of(slice);
  fetch_rows(stage, 0, in.x, block_y() * kTile, in.pairs.rows, slice, in.depth);
  fetch_rows(stage, kTile, in.y, block_x() * kTile, in.pairs.columns, slice, in.depth);
}

// Add one slice's products to the tile.
DEVICE void accumulate(LogitTile& tile, Shared<Chunk> stage) {
  const int x_row = warp() / kWarpsAcross * kWarpRows, y_row = kTile + warp() % kWarpsAcross * kWarpColumns;
  UNROLL for (int k = 0; k < kSliceChunks; k += 2) {  // 16 elements of the inner dimension
    u32 x[kDown][4], y[kAcross / 2][4];
    UNROLL for (int d = 0; d < kDown; ++d)
      load_matrices(x[d], stage, swizzled(x_row + d * 16 + lane() % 16, k + lane() / 16));
    UNROLL for (int a = 0; a < kAcross / 2; ++a)
      load_matrices(y[a], stage, swizzled(y_row + a * 16 + lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2));
    UNROLL for (int d = 0; d < kDown; ++d)
      UNROLL for (int a = 0; a < kAcross; ++a)
        multiply_add(tile.value[d][a], x[d], y[a / 2][a % 2 * 2], y[a / 2][a % 2 * 2 + 1]);
  }
}

DEVICE void mask(LogitTile& tile, const Pairs& pairs) {
  tile.each([&](float& logit, int d, int a, int e) {
    if (!pairs.negative(tile.row(d, e), tile.column(a, e))) logit = -infinity();
  });
  if (!pairs.x_ids.given()) return;
  UNROLL for (int a = 0; a < kAcross; ++a)
    UNROLL for (int e = 0; e < 2; ++e) {
      const i64 y_id = pairs.y_id(tile.column(a, e));
      UNROLL for (int d = 0; d < kDown; ++d)
        UNROLL for (int half = 0; half < 4; half += 2)
          if (pairs.x_id(tile.row(d, half)) == y_id) tile.value[d][a][half + e] = -infinity();
    }
}

// This block's tile of scale x y^T + bias in base 2 (e^z = 2^logit), -infinity where the pair is no negative.
// On return the shared memory is free.
DEVICE LogitTile logit_tile(const Logits& in) {
  LogitTile tile = {};
  const int slices = (in.depth + kSlice - 1) / kSlice;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < slices) fetch(in, s);
    commit_copies();
  }
  for (int s = 0; s < slices; ++s) {
    wait_copies<kStages - 2>();
    barrier();
    if (s + kStages - 1 < slices) fetch(in, s + kStages - 1);
    commit_copies();
    accumulate(tile, stage_of(s));
  }
  barrier();

  const float scale = in.scale[0] * kLog2E, bias = in.bias.given() ? in.bias[0] * kLog2E : 0.0f;
  tile.each([&](float& logit, int, int, int) { logit = logit * scale + bias; });
  mask(tile, in.pairs);
  return tile;
}
