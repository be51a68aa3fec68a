// The sum of 2^t over a set of numbers t, kept as sum * 2^max so that no scale of logits overflows it.
#pragma once
#include "device.h"

struct alignas(8) LogSum {
  float max;  // -infinity for the empty set
  float sum;
};

// What to subtract before exponentiation. The empty set then gives 2^-infinity = 0, where its maximum would give NaN.
DEVICE float pivot(float max) { return max == -infinity() ? 0.0f : max; }

DEVICE LogSum merged(LogSum a, LogSum b) {
  const float max = fmaxf(a.max, b.max), at = pivot(max);
  return {max, a.sum * exp2_fast(a.max - at) + b.sum * exp2_fast(b.max - at)};
}
