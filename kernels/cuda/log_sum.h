// The sum of 2^t over a set of numbers t, kept as sum * 2^max so that no scale of logits overflows it.
#pragma once
#include "device.h"

struct alignas(8) LogSum {
  float max;  // -infinity for the empty set
  float sum;
};

// Subtracting this, not the maximum itself, keeps the empty set at 2^-infinity = 0 instead of NaN.
DEVICE float pivot(float max) { return max == -infinity() ? 0.0f : max; }

DEVICE LogSum merged(LogSum a, LogSum b) {
  const float max = larger(a.max, b.max), at = pivot(max);
  return {max, a.sum * exp2_fast(a.max - at) + b.sum * exp2_fast(b.max - at)};
}

// The union over the lanes that differ in the bits first, 2 first, ... up to (not including) `end`, in every lane.
DEVICE LogSum merged_lanes(LogSum own, int first, int end) {
  for (int bit = first; bit < end; bit *= 2)
    own = merged(own, {shuffle_xor(own.max, bit), shuffle_xor(own.sum, bit)});
  return own;
}
