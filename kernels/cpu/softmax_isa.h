// The softmax over a tile's rows and columns, for one instruction set (see sweep.cpp): statistics and gradients.
//
// Softmax needs two powers of every t: relative to its row's maximum, and to its column's. Where a block's maxima are
// close to each other, one power relative to a base common to the block serves both, corrected in O(rows + columns).

// What sums of 2^(t - max) are multiplied by where their maxima rise: the running ones, and those that are merged.
struct Rescale {
  vf running, other;
};

// max = larger(max, other_max) for n elements; -inf is that of an empty sum.
static inline Rescale raise_at(float* max, std::int64_t n, vf other_max) {
  const vf old_max = load_some(max, n, -INFINITY);
  const vf top = larger(old_max, other_max);
  const vf base = finite_or(top, vf{});
  store_some(max, top, n);
  return {exp2_of(old_max - base), exp2_of(other_max - base)};
}

static inline void merge_at(float* sum, std::int64_t n, const Rescale& by, vf other_sum) {
  store_some(sum, load_some(sum, n, 0.0f) * by.running + other_sum * by.other, n);
}

// What follows is done for TOGETHER rows at once, and for one at a time where fewer are left. Functions named ..._at do
// it for one vector of columns from j on, of which n are within the tile. All are inlined where these are constants.

ALWAYS_INLINE void maxima_at(const Tile& tile, std::int64_t i, int rows, std::int64_t j, std::int64_t n, vf* row_top,
                             float* col_top) {
  vf col = load(col_top + j);
  for (int r = 0; r < rows; ++r) {
    const vf dot = dots_at(tile, i + r, j, n);
    row_top[r] = larger(row_top[r], dot);
    col = larger(col, dot);
  }
  store(col_top + j, col);
}

// The largest dots of these rows, and the columns', within a block of columns.
ALWAYS_INLINE void maxima(const Tile& tile, std::int64_t i, int rows, std::int64_t block, std::int64_t end,
                          float* row_top, float* col_top) {
  vf tops[TOGETHER];
  for (int r = 0; r < rows; ++r) tops[r] = splat(-INFINITY);
  std::int64_t j = block;
  for (; j + SIMD_WIDTH <= end; j += SIMD_WIDTH) maxima_at(tile, i, rows, j, SIMD_WIDTH, tops, col_top);
  if (j < end) maxima_at(tile, i, rows, j, end - j, tops, col_top);
  for (int r = 0; r < rows; ++r) row_top[r] = largest(tops[r]);
}

ALWAYS_INLINE void sums_at(const Tile& tile, std::int64_t i, int rows, std::int64_t j, std::int64_t n, vf factor,
                           vf shift, vf* row_sum, float* col_sum) {
  vf col = load(col_sum + j);
  for (int r = 0; r < rows; ++r) {
    const vf power = exp2_of(fused(dots_at(tile, i + r, j, n), factor, shift));
    row_sum[r] += power;
    col += power;
  }
  store(col_sum + j, col);
}

// The sums of 2^(t - base) of these rows, and the columns' added to col_sum, within a block of columns.
ALWAYS_INLINE void sums(const Tile& tile, std::int64_t i, int rows, std::int64_t block, std::int64_t end, float base,
                        float* row_sum, float* col_sum) {
  const vf factor = splat(tile.factor), shift = splat(-base);
  vf totals[TOGETHER];
  for (int r = 0; r < rows; ++r) totals[r] = vf{};
  std::int64_t j = block;
  for (; j + SIMD_WIDTH <= end; j += SIMD_WIDTH) sums_at(tile, i, rows, j, SIMD_WIDTH, factor, shift, totals, col_sum);
  if (j < end) sums_at(tile, i, rows, j, end - j, factor, shift, totals, col_sum);
  for (int r = 0; r < rows; ++r) row_sum[r] = sum(totals[r]);
}

// The same where a row's maximum may be far from a column's: sums of 2^(t - row_top) and of 2^(t - col_top).
static void sums_apart(const Tile& tile, std::int64_t i, std::int64_t block, std::int64_t end, float row_top,
                       const float* col_top, float* row_sum, float* col_sum) {
  const vf factor = splat(tile.factor), row_shift = splat(-finite_or_zero(row_top));
  vf total = vf{};
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    const vf dot = dots_at(tile, i, j, tile.cols - j);
    total += exp2_of(fused(dot, factor, row_shift));
    const vf col_shift = -finite_or(load(col_top + j), vf{});
    store(col_sum + j, load(col_sum + j) + exp2_of(fused(dot, factor, col_shift)));
  }
  *row_sum = sum(total);
}

// The least and the largest of n values, -inf not counted.
static inline void extend_range(const float* values, std::int64_t n, float& least, float& most) {
  vf low = splat(least), high = splat(most);
  for (std::int64_t k = 0; k < n; k += SIMD_WIDTH) {
    const vf value = load_some(values + k, n - k, -INFINITY);
    low = smaller(low, finite_or(value, low));
    high = larger(high, value);
  }
  least = smallest(low);
  most = largest(high);
}

// Sums of 2^(t - base) become sums of 2^(t - top), n of them; those of an empty row stay.
static inline void to_maxima(float* total, const float* top, std::int64_t n, float base) {
  for (std::int64_t k = 0; k < n; k += SIMD_WIDTH) {
    const vf own = finite_or(load_some(top + k, n - k, base), splat(base));
    store_some(total + k, load_some(total + k, n - k, 0.0f) * exp2_of(base - own), n - k);
  }
}

// The maxima of t of a band's rows (top, one each) and columns (col_max) within a block of columns.
static void block_maxima(const Tile& tile, std::int64_t first, std::int64_t rows, std::int64_t block, std::int64_t end,
                         float* top, float* col_max) {
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
  std::int64_t i = 0;
  for (; i + TOGETHER <= rows; i += TOGETHER) maxima(tile, first + i, TOGETHER, block, end, top + i, col_max);
  for (; i < rows; ++i) maxima(tile, first + i, 1, block, end, top + i, col_max);
  for (i = 0; i < rows; ++i) top[i] *= tile.factor;
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) store(col_max + j, load(col_max + j) * tile.factor);
}

// The sums of 2^(t - maximum) of a band's rows (total, one each) and columns (col_sum) within a block of columns.
static void block_sums(const Tile& tile, std::int64_t first, std::int64_t rows, std::int64_t block, std::int64_t end,
                       const float* top, const float* col_max, float* total, float* col_sum) {
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) store(col_sum + j, vf{});
  float least = INFINITY, most = -INFINITY;
  extend_range(top, rows, least, most);
  extend_range(col_max + block, end - block, least, most);
  std::int64_t i = 0;
  if (!(most - least <= SPREAD)) {
    for (; i < rows; ++i) sums_apart(tile, first + i, block, end, top[i], col_max, total + i, col_sum);
    return;
  }

  const float base = finite_or_zero(most);
  for (; i + TOGETHER <= rows; i += TOGETHER) sums(tile, first + i, TOGETHER, block, end, base, total + i, col_sum);
  for (; i < rows; ++i) sums(tile, first + i, 1, block, end, base, total + i, col_sum);
  to_maxima(total, top, rows, base);
  to_maxima(col_sum + block, col_max + block, end - block, base);
}

// Statistics of one band of rows. Rows are merged into row_max/row_sum; columns are left in col_max/col_sum (this
// band's own, padded to complete vectors). Blocks of columns are read twice, the second time from the CPU's cache.
static void stats_band(const Tile& tile, std::int64_t first, std::int64_t last, float* row_max, float* row_sum,
                       float* col_max, float* col_sum) {
  float top[BAND], total[BAND];
  const std::int64_t rows = last - first;
  exclude(tile, first, last);
  for (std::int64_t block = 0; block < tile.cols; block += BLOCK) {
    const std::int64_t end = block_end(tile, block);
    block_maxima(tile, first, rows, block, end, top, col_max);
    block_sums(tile, first, rows, block, end, top, col_max, total, col_sum);
    for (std::int64_t i = 0; i < rows; i += SIMD_WIDTH) {
      const std::int64_t n = rows - i;
      const Rescale by = raise_at(row_max + first + i, n, load_some(top + i, n, -INFINITY));
      merge_at(row_sum + first + i, n, by, load_some(total + i, n, 0.0f));
    }
  }
}

// Merge the bands' column statistics, in the order of the bands: a maximum and this many kinds of sums, `stride` floats
// from one to the next, and `step` floats from band to band.
ALWAYS_INLINE void merge_bands(std::int64_t cols, std::int64_t bands, std::int64_t stride, std::int64_t step, int kinds,
                               const float* partial, float* col_max, float* const* col_sums) {
  for (std::int64_t j = 0; j < cols; j += SIMD_WIDTH) {
    const std::int64_t n = cols - j;
    vf top = load_some(col_max + j, n, -INFINITY);
    const vf old = top;
    for (std::int64_t band = 0; band < bands; ++band) top = larger(top, load(partial + band * step + j));
    const vf base = finite_or(top, vf{});
    vf totals[2];
    for (int k = 0; k < kinds; ++k) totals[k] = load_some(col_sums[k] + j, n, 0.0f) * exp2_of(old - base);
    for (std::int64_t band = 0; band < bands; ++band) {
      const float* part = partial + band * step + j;
      const vf power = exp2_of(load(part) - base);
      for (int k = 0; k < kinds; ++k) totals[k] += load(part + (1 + k) * stride) * power;
    }
    store_some(col_max + j, top, n);
    for (int k = 0; k < kinds; ++k) store_some(col_sums[k] + j, totals[k], n);
  }
}

static void merge_columns(std::int64_t cols, std::int64_t bands, std::int64_t stride, std::int64_t step,
                          const float* partial, const Statistics& columns) {
  merge_bands(cols, bands, stride, step, 1, partial, columns.max, &columns.sum);
}

// Gradients are written to grad, or subtracted from what is there: `subtract` is a constant wherever this is inlined.

ALWAYS_INLINE void softmax_grads_at(const Tile& tile, std::int64_t i, int rows, std::int64_t j, std::int64_t n,
                                    vf factor, vf shift, const float* row_weight, vf col_weight, bool subtract,
                                    float* grad) {
  for (int r = 0; r < rows; ++r) {
    float* to = grad + (i + r) * tile.cols + j;
    const vf power = exp2_of(fused(dots_at(tile, i + r, j, n), factor, shift));
    const vf weight = col_weight + row_weight[r];
    store_some(to, subtract ? fused(-power, weight, load_some(to, n, 0.0f)) : power * weight, n);
  }
}

// The gradients 2^(t - base) * (row_weight + col_weight) of these rows, within a block of columns; col_weight is the
// block's.
ALWAYS_INLINE void softmax_grads(const Tile& tile, std::int64_t i, int rows, std::int64_t block, std::int64_t end,
                                 float base, const float* row_weight, const float* col_weight, bool subtract,
                                 float* grad) {
  const vf factor = splat(tile.factor), shift = splat(-base);
  float weights[TOGETHER];
  std::memcpy(weights, row_weight, rows * sizeof(float));
  std::int64_t j = block;
  for (; j + SIMD_WIDTH <= end; j += SIMD_WIDTH)
    softmax_grads_at(tile, i, rows, j, SIMD_WIDTH, factor, shift, weights, load(col_weight + j - block), subtract,
                     grad);
  if (j < end)
    softmax_grads_at(tile, i, rows, j, end - j, factor, shift, weights, load(col_weight + j - block), subtract, grad);
}

// The same where a row's shift may be far from a column's.
ALWAYS_INLINE void softmax_grads_apart(const Tile& tile, std::int64_t i, std::int64_t block, std::int64_t end,
                                       const Weights& weights, bool subtract, float* grad) {
  const vf factor = splat(tile.factor), row_shift = splat(-weights.row_shift[i]);
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    const std::int64_t n = tile.cols - j;
    float* to = grad + i * tile.cols + j;
    const vf dot = dots_at(tile, i, j, n);
    const vf by_row = exp2_of(fused(dot, factor, row_shift)) * weights.row_factor[i];
    const vf by_col = exp2_of(fused(dot, factor, -load_some(weights.col_shift + j, n, 0.0f)));
    const vf both = fused(by_col, load_some(weights.col_factor + j, n, 0.0f), by_row);
    store_some(to, subtract ? load_some(to, n, 0.0f) - both : both, n);
  }
}

// The factors that belong to base where those given belong to the shifts: factor * 2^(base - shift).
static void rebase(const float* shift, const float* factor, std::int64_t n, float base, float* weight) {
  for (std::int64_t k = 0; k < n; k += SIMD_WIDTH) {
    const vf power = exp2_of(base - load_some(shift + k, n - k, base));
    store_some(weight + k, load_some(factor + k, n - k, 0.0f) * power, n - k);
  }
}

// The gradients of a band's rows within a block of columns.
ALWAYS_INLINE void block_softmax_grads(const Tile& tile, std::int64_t first, std::int64_t last, std::int64_t block,
                                       std::int64_t end, const Weights& weights, bool subtract, float* grad) {
  float row_weight[BAND], col_weight[BLOCK];
  float base = INFINITY, most = -INFINITY;
  extend_range(weights.row_shift + first, last - first, base, most);
  extend_range(weights.col_shift + block, end - block, base, most);
  std::int64_t i = first;
  if (most - base <= SPREAD) {
    rebase(weights.row_shift + first, weights.row_factor + first, last - first, base, row_weight);
    rebase(weights.col_shift + block, weights.col_factor + block, end - block, base, col_weight);
    for (; i + TOGETHER <= last; i += TOGETHER)
      softmax_grads(tile, i, TOGETHER, block, end, base, row_weight + i - first, col_weight, subtract, grad);
    for (; i < last; ++i)
      softmax_grads(tile, i, 1, block, end, base, row_weight + i - first, col_weight, subtract, grad);
  }
  for (; i < last; ++i) softmax_grads_apart(tile, i, block, end, weights, subtract, grad);
}

static void softmax_grad_band(const Tile& tile, std::int64_t first, std::int64_t last, const Weights& weights,
                              float* grad) {
  exclude(tile, first, last);
  for (std::int64_t block = 0; block < tile.cols; block += BLOCK)
    block_softmax_grads(tile, first, last, block, block_end(tile, block), weights, false, grad);
}
