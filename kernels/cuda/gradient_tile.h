// Write a tile of gradients, held as a LogitTile, as 16-bit numbers: through shared memory, so that 16 lanes store a
// row's 256 bytes in one go. Two library GEMMs read it next.
#pragma once
#include "logit_tile.h"

constexpr int kTileChunks = kTile / kChunk;
constexpr int kGradientBytes = kTile * kTileChunks * static_cast<int>(sizeof(Chunk));

DEVICE int swizzled_tile(int row, int c) { return row * kTileChunks + (c ^ (row % 8)); }

// gradient (rows, stride): stride is the columns rounded up to a whole chunk. The tile is scaled by kGain.
DEVICE void write_gradient(const LogitTile& tile, Out<u16> gradient, int rows, int stride) {
  const Shared<u32> words = shared_memory<u32>(0);
  UNROLL for (int d = 0; d < kDown; ++d)
    UNROLL for (int a = 0; a < kAcross; ++a)
      UNROLL for (int e = 0; e < 4; e += 2) {
        const int chunk = swizzled_tile(tile.tile_row(d, e), tile.tile_column(a, e) / kChunk);
        words.put(chunk * 4 + lane() % 4, pack(tile.value[d][a][e] * kGain, tile.value[d][a][e + 1] * kGain));
      }
  barrier();

  const Shared<Chunk> chunks = shared_memory<Chunk>(0);
  const Out<Chunk> out = {reinterpret_cast<Chunk*>(gradient.at)};
  for (int t = thread(); t < kTile * kTileChunks; t += kThreads) {
    const int r = t / kTileChunks, c = t % kTileChunks;
    const int row = block_y() * kTile + r, chunk = block_x() * kTileChunks + c;
    if (row < rows && chunk < stride / kChunk)
      out.put(static_cast<i64>(row) * (stride / kChunk) + chunk, chunks[swizzled_tile(r, c)]);
  }
}
