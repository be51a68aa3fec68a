// Fold the parts of a chunk's tiles into the running log-sum-exps, one thread a row (or column), in the tiles' order.
#include "log_sum.h"

KERNEL(256, 1) merge(In<LogSum> parts, int count, int length, Out<LogSum> running) {
  const int i = block_x() * 256 + thread();
  if (i >= length) return;
  LogSum whole = running[i];
  for (int p = 0; p < count; ++p) whole = merged(whole, parts[static_cast<i64>(p) * length + i]);
  running.put(i, whole);
}
