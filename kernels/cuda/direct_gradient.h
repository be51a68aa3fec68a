// Write a block's gradients, as 16-bit numbers or (-DFP32) as float. Where dots come from memory, a thread has four neighbours
// of a row at least, and four lanes have whole sectors: nothing is gained by a way through shared memory.
#pragma once
#include "block_logits.h"

#ifdef FP32
using Element = float;
using FourElements = FourFloats;
DEVICE FourElements four_elements(float a, float b, float c, float d) { return {{a, b, c, d}}; }
#else
#include "tensor_core.h"
using Element = u16;
struct alignas(8) FourElements {
  u32 words[2];
};
DEVICE FourElements four_elements(float a, float b, float c, float d) {
  return {{pack(kGain * a, kGain * b), pack(kGain * c, kGain * d)}};
}
#endif

struct DirectGradient {
  Out<Element> at;  // (rows, stride), starting at a multiple of 16 bytes; 16-bit numbers hold kGain times the gradient
  int stride;       // the columns rounded up to a whole chunk
};

DEVICE void write_gradient(const BlockLogits& gradient, const DirectGradient& to, const Tile& tile) {
  const Out<FourElements> out = {reinterpret_cast<FourElements*>(to.at.at)};
  BlockLogits::each_row([&](int d, int half) {
    const int i = first_row() + gradient.row(d, half);
    UNROLL for (int a = 0; a < kAcross; a += 2) {
      const int j = first_column() + gradient.column(a, 0);
      if (i >= tile.rows || j >= to.stride) continue;
      const float *left = &gradient.value[d][a][half], *right = &gradient.value[d][a + 1][half];
      const FourElements four = four_elements(left[0], left[1], right[0], right[1]);
      out.put((static_cast<i64>(i) * to.stride + j) / 4, four);
    }
  });
}
