// As merge.cu, for a teacher's running expectations.
#include "expectation.h"

constexpr int kThreads = 256;

// parts (count, length); max, sum and cross (length) are updated in place.
KERNEL(kThreads, 1)
merge_expectations(In<Expectation> parts, int count, int length, Out<float> max, Out<float> sum, Out<float> cross) {
  const int i = block_x() * kThreads + thread();
  if (i >= length) return;
  Expectation whole = {max[i], sum[i], cross[i]};
  for (int p = 0; p < count; ++p) whole = whole + parts[static_cast<i64>(p) * length + i];
  max.put(i, whole.max);
  sum.put(i, whole.sum);
  cross.put(i, whole.cross);
}
