// As softmax_gradient.cu, from dots in memory: those of a library GEMM, or those that stats.cu cached. One thread a pair.
#include "tile.h"

#ifdef FP32
using Element = float;
DEVICE Element element(float value) { return value; }
#else
#include "tensor_core.h"
using Element = u16;
DEVICE Element element(float value) { return static_cast<u16>(pack(kGain * value, 0.0f)); }
#endif

constexpr int kThreads = 256;

// dots (rows, columns), gradient (rows, stride).
KERNEL(kThreads, 1)
dense_softmax_gradient(In<float> dots, Tile tile, Weights of_rows, Weights of_columns, Out<Element> gradient,
                       int stride) {
  const int i = block_y(), j = block_x() * kThreads + thread();
  if (j >= tile.columns) return;
  const float logit = tile.logit(dots[static_cast<i64>(i) * tile.columns + j], i, j);
  const float value = of_rows[i].gradient(logit) + of_columns[j].gradient(logit);
  gradient.put(static_cast<i64>(i) * stride + j, element(value));
}
