// A teacher's softmax over a set of pairs, and the student's expected dot under it: the sums of 2^t and of 2^t dot, t the
// teacher's logit, both kept over 2^max so that no scale of logits overflows them.
#pragma once
#include "log_sum.h"

struct Expectation {
  float max;  // -infinity for the empty set
  float sum, cross;

  DEVICE Expectation operator+(Expectation other) const {
    const float larger = fmaxf(max, other.max), at = pivot(larger);
    const float own = exp2_fast(max - at), others = exp2_fast(other.max - at);
    return {larger, sum * own + other.sum * others, cross * own + other.cross * others};
  }
};

// Over the pairs (t, dot) that each(visit) visits in this thread and in the lanes that differ in the bits first ... below end.
template <class Each>
DEVICE Expectation expectation_over(Each each, int first, int end) {
  float max = -infinity(), sum = 0.0f, cross = 0.0f;
  each([&](float t, float) { max = fmaxf(max, t); });
  max = max_of_lanes(max, first, end);
  const float at = pivot(max);
  each([&](float t, float dot) {
    const float power = exp2_fast(t - at);
    sum += power;
    cross += power * dot;
  });
  return {max, sum_of_lanes(sum, first, end), sum_of_lanes(cross, first, end)};
}
