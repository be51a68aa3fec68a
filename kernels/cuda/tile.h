// A tile of pairs (row i of x, column j of y), as described in kernels/tiles/tile_backend.py, and the losses of one logit.
// An excluded pair has logit -infinity everywhere: it adds nothing to a sum, a loss or a gradient.
#pragma once
#include "log_sum.h"

// How dots become logits in base 2. Rounded once, here: forward and backward then take the same differences, and a row's
// probabilities sum to 1.
struct LogitMap {
  float scale, bias;
  DEVICE float operator()(float dot) const { return fmaf(dot, scale, bias); }
};

struct Tile {
  In<int> row_labels, column_labels;  // or both absent: pairs of equal labels are excluded
  In<float> row_limits, column_limits;  // or both absent: pairs whose dot is above either are excluded
  In<float> scale_and_bias;           // of the logit map
  int rows, columns;
  int diagonal;  // pairs (i, i + diagonal) are excluded: the samples' own

  DEVICE LogitMap logit_map() const { return {scale_and_bias[0], scale_and_bias[1]}; }  // read it once a thread

  DEVICE bool holds(int i, int j) const { return i < rows && j < columns && j - i != diagonal; }
  DEVICE bool same_label(int i, int j) const { return row_labels.given() && row_labels[i] == column_labels[j]; }
  DEVICE int row_label(int i) const { return i < rows ? row_labels[i] : 0; }
  DEVICE int column_label(int j) const { return j < columns ? column_labels[j] : 0; }
  DEVICE float row_limit(int i) const { return i < rows ? row_limits[i] : infinity(); }
  DEVICE float column_limit(int j) const { return j < columns ? column_limits[j] : infinity(); }
  DEVICE bool above_limit(float dot, int i, int j) const {
    return row_limits.given() && dot > fminf(row_limits[i], column_limits[j]);
  }
  DEVICE float logit(float dot, int i, int j) const {
    return holds(i, j) && !same_label(i, j) && !above_limit(dot, i, j) ? logit_map()(dot) : -infinity();
  }
};

// One row (or column) of the softmax: how much a logit of it adds to the gradient.
struct Weight {
  float shift, factor;
  DEVICE float gradient(float logit) const { return factor * exp2_fast(logit - shift); }
};

struct Weights {
  In<float> shift, factor;
  int count;
  DEVICE Weight operator[](int i) const { return i < count ? Weight{shift[i], factor[i]} : Weight{0.0f, 0.0f}; }
};

// softplus and its derivative, summed over pairs. Both keep their relative accuracy where they are tiny.
struct Sigmoid {
  float loss, probability;
  DEVICE Sigmoid operator+(Sigmoid other) const { return {loss + other.loss, probability + other.probability}; }
};

// log(1 + u) for u in [0, 1] as 2 artanh(u / (2 + u)): no branch, and right for tiny u, which 1 + u would round away.
DEVICE float log1p_unit(float u) {
  const float s = u * reciprocal_fast(2.0f + u), s2 = s * s;
  float series = 1.0f / 15;
  UNROLL for (int n = 13; n > 0; n -= 2) series = series * s2 + 1.0f / n;
  return 2.0f * s * series;
}

DEVICE float probability_of(float logit, float tail) {
  const float rest = reciprocal_fast(1.0f + tail);
  return logit > 0.0f ? rest : tail * rest;
}

DEVICE Sigmoid sigmoid_of(float logit) {
  const float tail = exp2_fast(-fabsf(logit));
  return {fmaxf(logit, 0.0f) * kLn2 + log1p_unit(tail), probability_of(logit, tail)};
}

// The same against a target: softplus(z) - target z, without cancellation where a large z meets a target near 1, and its
// derivative. The target of an excluded pair is 0, and its logit must not make that NaN.
DEVICE Sigmoid sigmoid_of(float logit, float target) {
  const float tail = exp2_fast(-fabsf(logit));
  const float missed = logit > 0.0f ? (1.0f - target) * logit : target * fminf(-logit, kLargest);
  return {missed * kLn2 + log1p_unit(tail), probability_of(logit, tail) - target};
}
