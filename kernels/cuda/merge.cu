// Fold the parts of a tile into the running log-sum-exps of its rows (or columns), in order. One thread each.
#include "log_sum.h"

constexpr int kThreads = 256;

// parts (count, length); max and sum (length) are updated in place.
KERNEL(kThreads, 1) merge(In<LogSum> parts, int count, int length, Out<float> max, Out<float> sum) {
  const int i = block_x() * kThreads + thread();
  if (i >= length) return;
  LogSum whole = {max[i], sum[i]};
  for (int p = 0; p < count; ++p) whole = whole + parts[static_cast<i64>(p) * length + i];
  max.put(i, whole.max);
  sum.put(i, whole.sum);
}
