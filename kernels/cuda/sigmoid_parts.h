// What the sigmoid loss leaves of a row: sums over its pairs, and its largest logit. Of a column, the latter.
#pragma once
#include "block_parts.h"

struct Max {
  float value;
  DEVICE Max operator+(Max other) const { return {fmaxf(value, other.value)}; }
};

struct RowPart {
  Sigmoid sum;
  Max max;  // of the logits, in base 2
  DEVICE RowPart operator+(RowPart other) const { return {sum + other.sum, max + other.max}; }
};
