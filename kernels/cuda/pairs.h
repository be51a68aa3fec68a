// A chunk of pairs (row i of x, row j of y), and what the losses make of the logit of one of its negatives.
// A pair that is no negative has logit -infinity everywhere: it adds nothing to a sum, a loss or a gradient.
#pragma once
#include "log_sum.h"

struct Pairs {
  In<i64> x_ids, y_ids;  // sample ids, or both absent: equal ids are never negatives of each other
  int rows, columns;
  int diagonal;  // (i, i + diagonal) are the positives; it points outside where the chunk holds none

  DEVICE bool negative(int i, int j) const { return i < rows && j < columns && j - i != diagonal; }
  DEVICE i64 x_id(int i) const { return i < rows ? x_ids[i] : 0; }
  DEVICE i64 y_id(int j) const { return j < columns ? y_ids[j] : 0; }
};

// A row (or column) of the softmax: its share of the gradient is weight 2^(logit - log_sum).
struct Softmax {
  float log_sum, weight;
  DEVICE float gradient(float logit) const { return weight * exp2_fast(logit - log_sum); }
};

struct Softmaxes {
  In<float> log_sum;  // base 2
  In<float> weight;   // of each row's loss, or absent: 1
  int count;

  DEVICE Softmax operator[](int i) const {
    if (i >= count) return {0.0f, 0.0f};
    return {pivot(log_sum[i]), weight.given() ? weight[i] : 1.0f};
  }
};

// softplus and its derivative. Both keep their relative accuracy where they are tiny.
struct Sigmoid {
  float loss, gradient;
  DEVICE Sigmoid operator+(Sigmoid other) const { return {loss + other.loss, gradient + other.gradient}; }
};

DEVICE Sigmoid sigmoid(float logit) {
  const float tail = exp2_fast(-fabsf(logit)), rest = 1.0f / (1.0f + tail);
  return {fmaxf(logit, 0.0f) / kLog2E + log1pf(tail), logit > 0.0f ? rest : tail * rest};
}
