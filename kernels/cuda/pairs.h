// Which pairs (row i of x, row j of y) are negatives of each other, and the gradient of one of them.
#pragma once
#include "device.h"

struct Pairs {
  In<i64> x_ids, y_ids;           // sample ids, or both absent; equal ids are never negatives of each other
  i64 row_offset, column_offset;  // global index of the chunk's first row and column: the diagonal is never a negative
  int rows, columns;

  DEVICE bool inside(int i, int j) const { return i < rows && j < columns; }
  DEVICE bool diagonal(int i, int j) const { return row_offset + i == column_offset + j; }
  DEVICE i64 x_id(int i) const { return x_ids.given() && i < rows ? x_ids[i] : 0; }
  DEVICE i64 y_id(int j) const { return x_ids.given() && j < columns ? y_ids[j] : 1; }  // 1: differs from an absent x_id
};
