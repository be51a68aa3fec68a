// The sweeps for one instruction set. sweep.cpp includes this once for each, inside a namespace and under its compiler
// target, with SIMD_WIDTH defined (floats in a vector): written once, in compilers' vector types, without templates.
//
// "t" is a logit in base 2, "z" one in base e. Excluded entries are -inf, and 2^-inf is exactly 0 here.
//
// Softmax needs two powers of every t: relative to its row's maximum, and to its column's. Where a block's maxima are
// close to each other, one power relative to a base common to the block serves both, corrected in O(rows + columns).

#include "vector_isa.h"

// The dots of one row from column j on, n columns of it, -inf beyond.
static inline vf dots_at(const Tile& tile, std::int64_t i, std::int64_t j, std::int64_t n) {
  return load_some(tile.dots + i * tile.cols + j, n, -INFINITY);
}

// Write -inf over the dots of equal labels.
static void exclude_equal_labels(const Tile& tile, std::int64_t first, std::int64_t last) {
  if (!tile.row_labels) return;
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const std::int64_t n = tile.cols - j;
      vi labels = vi{};
      std::memcpy(&labels, tile.col_labels + j, (n >= SIMD_WIDTH ? SIMD_WIDTH : n) * sizeof(std::int32_t));
      const vf dot = labels == tile.row_labels[i] ? splat(-INFINITY) : dots_at(tile, i, j, n);
      store_some(tile.dots + i * tile.cols + j, dot, n);
    }
  }
}

static inline float finite_or_zero(float value) { return value == -INFINITY ? 0.0f : value; }

static inline vf finite_or(vf value, vf replacement) { return value == splat(-INFINITY) ? replacement : value; }

// (max, sum) += (other_max, other_sum) for n elements, each meaning 2^max * sum, empty being (-inf, 0).
static inline void merge_at(float* max, float* sum, std::int64_t n, vf other_max, vf other_sum) {
  const vf old_max = load_some(max, n, -INFINITY);
  const vf top = larger(old_max, other_max);
  const vf base = finite_or(top, vf{});
  const vf total = load_some(sum, n, 0.0f) * exp2_of(old_max - base) + other_sum * exp2_of(other_max - base);
  store_some(max, top, n);
  store_some(sum, total, n);
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
  for (i = 0; i < rows; i += SIMD_WIDTH) {
    const vf row_top = finite_or(load_some(top + i, rows - i, base), splat(base));
    store_some(total + i, load_some(total + i, rows - i, 0.0f) * exp2_of(base - row_top), rows - i);
  }
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    const vf col_top = finite_or(load(col_max + j), splat(base));
    store(col_sum + j, load(col_sum + j) * exp2_of(base - col_top));
  }
}

// Statistics of one band of rows. Rows are merged into row_max/row_sum; columns are left in col_max/col_sum (this
// band's own, padded to complete vectors). Blocks of columns are read twice, the second time from the CPU's cache.
static void stats_band(const Tile& tile, std::int64_t first, std::int64_t last, float* row_max, float* row_sum,
                       float* col_max, float* col_sum) {
  float top[BAND], total[BAND];
  const std::int64_t rows = last - first;
  exclude_equal_labels(tile, first, last);
  for (std::int64_t block = 0; block < tile.cols; block += BLOCK) {
    const std::int64_t end = block + BLOCK < tile.cols ? block + BLOCK : tile.cols;
    block_maxima(tile, first, rows, block, end, top, col_max);
    block_sums(tile, first, rows, block, end, top, col_max, total, col_sum);
    for (std::int64_t i = 0; i < rows; i += SIMD_WIDTH) {
      const vf row_top = load_some(top + i, rows - i, -INFINITY), row_total = load_some(total + i, rows - i, 0.0f);
      merge_at(row_max + first + i, row_sum + first + i, rows - i, row_top, row_total);
    }
  }
}

// Merge the bands' column statistics, in the order of the bands.
static void merge_columns(std::int64_t cols, std::int64_t bands, std::int64_t stride, const float* partial,
                          float* col_max, float* col_sum) {
  for (std::int64_t j = 0; j < cols; j += SIMD_WIDTH) {
    const std::int64_t n = cols - j;
    vf top = load_some(col_max + j, n, -INFINITY);
    const vf old = top;
    for (std::int64_t band = 0; band < bands; ++band) top = larger(top, load(partial + 2 * band * stride + j));
    const vf base = finite_or(top, vf{});
    vf total = load_some(col_sum + j, n, 0.0f) * exp2_of(old - base);
    for (std::int64_t band = 0; band < bands; ++band) {
      const float* part = partial + 2 * band * stride + j;
      total += load(part + stride) * exp2_of(load(part) - base);
    }
    store_some(col_max + j, top, n);
    store_some(col_sum + j, total, n);
  }
}

ALWAYS_INLINE void softmax_grads_at(const Tile& tile, std::int64_t i, int rows, std::int64_t j, std::int64_t n,
                                    vf factor, vf shift, const float* row_weight, vf col_weight, float* grad) {
  for (int r = 0; r < rows; ++r) {
    const vf power = exp2_of(fused(dots_at(tile, i + r, j, n), factor, shift));
    store_some(grad + (i + r) * tile.cols + j, power * (col_weight + row_weight[r]), n);
  }
}

// The gradients 2^(t - base) * (row_weight + col_weight) of these rows, within a block of columns; col_weight is the
// block's.
ALWAYS_INLINE void softmax_grads(const Tile& tile, std::int64_t i, int rows, std::int64_t block, std::int64_t end,
                                 float base, const float* row_weight, const float* col_weight, float* grad) {
  const vf factor = splat(tile.factor), shift = splat(-base);
  float weights[TOGETHER];
  std::memcpy(weights, row_weight, rows * sizeof(float));
  std::int64_t j = block;
  for (; j + SIMD_WIDTH <= end; j += SIMD_WIDTH)
    softmax_grads_at(tile, i, rows, j, SIMD_WIDTH, factor, shift, weights, load(col_weight + j - block), grad);
  if (j < end) softmax_grads_at(tile, i, rows, j, end - j, factor, shift, weights, load(col_weight + j - block), grad);
}

// The same where a row's shift may be far from a column's.
static void softmax_grads_apart(const Tile& tile, std::int64_t i, std::int64_t block, std::int64_t end, float row_shift,
                                float row_factor, const float* col_shift, const float* col_factor, float* grad) {
  const vf factor = splat(tile.factor);
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    const std::int64_t n = tile.cols - j;
    const vf dot = dots_at(tile, i, j, tile.cols - j);
    const vf by_row = exp2_of(fused(dot, factor, splat(-row_shift))) * row_factor;
    const vf by_col = exp2_of(fused(dot, factor, -load_some(col_shift + j, n, 0.0f)));
    store_some(grad + i * tile.cols + j, fused(by_col, load_some(col_factor + j, n, 0.0f), by_row), n);
  }
}

// The factors that belong to base where those given belong to the shifts: factor * 2^(base - shift).
static void rebase(const float* shift, const float* factor, std::int64_t n, float base, float* weight) {
  for (std::int64_t k = 0; k < n; k += SIMD_WIDTH) {
    const vf power = exp2_of(base - load_some(shift + k, n - k, base));
    store_some(weight + k, load_some(factor + k, n - k, 0.0f) * power, n - k);
  }
}

static void softmax_grad_band(const Tile& tile, std::int64_t first, std::int64_t last, const float* row_shift,
                              const float* row_factor, const float* col_shift, const float* col_factor, float* grad) {
  float row_weight[BAND], col_weight[BLOCK];
  exclude_equal_labels(tile, first, last);
  for (std::int64_t block = 0; block < tile.cols; block += BLOCK) {
    const std::int64_t end = block + BLOCK < tile.cols ? block + BLOCK : tile.cols;
    float base = INFINITY, most = -INFINITY;
    extend_range(row_shift + first, last - first, base, most);
    extend_range(col_shift + block, end - block, base, most);
    std::int64_t i = first;
    if (most - base <= SPREAD) {
      rebase(row_shift + first, row_factor + first, last - first, base, row_weight);
      rebase(col_shift + block, col_factor + block, end - block, base, col_weight);
      for (; i + TOGETHER <= last; i += TOGETHER)
        softmax_grads(tile, i, TOGETHER, block, end, base, row_weight + i - first, col_weight, grad);
      for (; i < last; ++i) softmax_grads(tile, i, 1, block, end, base, row_weight + i - first, col_weight, grad);
    }
    for (; i < last; ++i)
      softmax_grads_apart(tile, i, block, end, row_shift[i], row_factor[i], col_shift, col_factor, grad);
  }
}

// Sums and maxima of one band of rows where loss is given (col_max: this band's own, padded), gradients where grad is.
static void sigmoid_band(const Tile& tile, std::int64_t first, std::int64_t last, float* loss, float* prob,
                         float* row_max, float* col_max, const float* weights, float* grad) {
  exclude_equal_labels(tile, first, last);
  if (loss)
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
  for (std::int64_t i = first; i < last; ++i) {
    vf losses = vf{}, probs = vf{}, top = splat(-INFINITY);
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const vf z = fused(dots_at(tile, i, j, tile.cols - j), splat(tile.factor), splat(tile.offset));
      const vf u = exp2_of((z > vf{} ? -z : z) * LOG2E);
      const vf sigma = (z > vf{} ? splat(1.0f) : u) / (u + 1.0f);
      if (loss) {
        losses += above(z, 0.0f) + log1p_of(u);
        probs += sigma;
        top = larger(top, z * LOG2E);
        store(col_max + j, larger(load(col_max + j), z * LOG2E));
      }
      if (grad) store_some(grad + i * tile.cols + j, sigma * weights[i], tile.cols - j);
    }
    if (!loss) continue;
    loss[i] += sum(losses);
    prob[i] += sum(probs);
    const float found = largest(top);
    row_max[i] = row_max[i] > found ? row_max[i] : found;
  }
}

static void merge_maxima(std::int64_t cols, std::int64_t bands, std::int64_t stride, const float* partial,
                         float* col_max) {
  for (std::int64_t j = 0; j < cols; j += SIMD_WIDTH) {
    vf top = load_some(col_max + j, cols - j, -INFINITY);
    for (std::int64_t band = 0; band < bands; ++band) top = larger(top, load(partial + band * stride + j));
    store_some(col_max + j, top, cols - j);
  }
}

static const Sweeps SWEEPS = {stats_band, merge_columns, softmax_grad_band, sigmoid_band, merge_maxima};
