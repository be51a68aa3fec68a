// The sum of 2^t over a set of numbers t, kept as sum * 2^max so that no scale of logits overflows it.
#pragma once
#include "device.h"

// What to subtract before exponentiation. The empty set then gives 2^-infinity = 0, where its maximum would give NaN.
DEVICE float pivot(float max) { return max == -infinity() ? 0.0f : max; }

struct alignas(8) LogSum {
  float max;  // -infinity for the empty set
  float sum;

  DEVICE LogSum operator+(LogSum other) const {
    const float larger = fmaxf(max, other.max), at = pivot(larger);
    return {larger, sum * exp2_fast(max - at) + other.sum * exp2_fast(other.max - at)};
  }
};

// Over the numbers that each(visit) visits in this thread and in the lanes that differ in the bits first ... below end.
template <class Each>
DEVICE LogSum log_sum_over(Each each, int first, int end) {
  float max = -infinity(), sum = 0.0f;
  each([&](float t) { max = fmaxf(max, t); });
  max = max_of_lanes(max, first, end);
  const float at = pivot(max);
  each([&](float t) { sum += exp2_fast(t - at); });
  return {max, sum_of_lanes(sum, first, end)};
}
