// Write a block's gradients as 16-bit numbers, for two library GEMMs to read. They go through shared memory, so that 16
// neighbouring lanes store 256 bytes of a row together.
#pragma once
#include "block_logits.h"
#include "tensor_core.h"

struct Gradient {
  Out<u16> at;  // (rows, stride), starting at a multiple of 16 bytes; holds kGain times the gradient
  int stride;   // the columns rounded up to a whole chunk
};

constexpr int kBlockChunks = kBlockColumns / kChunk;
constexpr int kGradientBytes = kBlockRows * kBlockChunks * static_cast<int>(sizeof(Chunk));

DEVICE int swizzled_gradient(int row, int c) { return row * kBlockChunks + (c ^ (row % 8)); }

DEVICE void write_gradient(const BlockLogits& gradient, const Gradient& to, const Tile& tile) {
  const Shared<u32> words = shared_memory<u32>(0);
  BlockLogits::each_row([&](int d, int half) {
    UNROLL for (int a = 0; a < kAcross; ++a) {
      const int column = gradient.column(a, 0), chunk = swizzled_gradient(gradient.row(d, half), column / kChunk);
      const float* pair = &gradient.value[d][a][half];
      words.put(chunk * 4 + column % kChunk / 2, pack(kGain * pair[0], kGain * pair[1]));
    }
  });
  barrier();

  const Shared<Chunk> chunks = shared_memory<Chunk>(0);
  const Out<Chunk> out = {reinterpret_cast<Chunk*>(to.at.at)};
  const int stride = to.stride / kChunk;
  UNROLL for (int t = 0; t < kBlockRows * kBlockChunks; t += kThreads) {
    const int r = (t + thread()) / kBlockChunks, c = thread() % kBlockChunks;
    const int row = first_row() + r, chunk = block_x() * kBlockChunks + c;
    if (row >= tile.rows || chunk >= stride) continue;
    out.put(static_cast<i64>(row) * stride + chunk, chunks[swizzled_gradient(r, c)]);
  }
}
