// The sweeps for one instruction set. sweep.cpp includes this once for each, inside a namespace and under its compiler
// target, with SIMD_WIDTH defined (floats in a vector): written once, in the compilers' vector types, without templates.
//
// "t" is a logit in base 2, "z" one in base e. Excluded entries are -inf, and 2^-inf is exactly 0 here.

typedef float vf __attribute__((vector_size(SIMD_WIDTH * 4)));
typedef std::int32_t vi __attribute__((vector_size(SIMD_WIDTH * 4)));

static inline vf splat(float value) { return value - vf{}; }

static inline vf load(const float* from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

static inline void store(float* to, vf v) { std::memcpy(to, &v, sizeof v); }

// The last vector of a row may extend beyond its end: those elements read as `fill` and are not written.
static inline vf load_some(const float* from, std::int64_t n, float fill) {
  if (n >= SIMD_WIDTH) return load(from);
  vf v = splat(fill);
  std::memcpy(&v, from, n * sizeof(float));
  return v;
}

static inline void store_some(float* to, vf v, std::int64_t n) {
  std::memcpy(to, &v, (n >= SIMD_WIDTH ? SIMD_WIDTH : n) * sizeof(float));
}

// a * b + c with one rounding where the processor can. Written out, and contraction switched off in the build, because
// statistics and gradients must round a logit in the same way: else probabilities no longer sum to 1.
static inline vf fused(vf a, vf b, vf c) {
#if SIMD_WIDTH == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SIMD_WIDTH == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

static inline vf above(vf a, float floor) { return larger(a, splat(floor)); }

static inline float sum(vf v) {
  float total = 0;
  for (int k = 0; k < SIMD_WIDTH; ++k) total += v[k];
  return total;
}

static inline float largest(vf v) {
  float top = v[0];
  for (int k = 1; k < SIMD_WIDTH; ++k) top = top > v[k] ? top : v[k];
  return top;
}

// 2^t for t <= about 0; below 2^-126 it is 0. Relative error 2e-7: a minimax polynomial on [-1/2, 1/2].
static inline vf exp2_of(vf t) {
  const vf clamped = above(t, -126.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat(EXP2_C6);
  p = fused(p, f, splat(EXP2_C5));
  p = fused(p, f, splat(EXP2_C4));
  p = fused(p, f, splat(EXP2_C3));
  p = fused(p, f, splat(EXP2_C2));
  p = fused(p, f, splat(EXP2_C1));
  p = fused(p, f, splat(EXP2_C0));
  const vi exponent = ((vi)shifted - (vi)magic) << 23;
  return t > splat(-126.0f) ? (vf)((vi)p + exponent) : vf{};
}

// log(1 + u) for u in [0, 1], accurate relative to u: 2 atanh(u / (2 + u)) as a series. Relative error 2e-7.
static inline vf log1p_of(vf u) {
  const vf w = u / (u + 2.0f), w2 = w * w;
  vf p = splat(1.0f / 13);
  p = fused(p, w2, splat(1.0f / 11));
  p = fused(p, w2, splat(1.0f / 9));
  p = fused(p, w2, splat(1.0f / 7));
  p = fused(p, w2, splat(1.0f / 5));
  p = fused(p, w2, splat(1.0f / 3));
  p = fused(p, w2, splat(1.0f));
  return 2.0f * w * p;
}

// The dots of one row from column j on, -inf where excluded by label or beyond the row's end.
static inline vf dots_at(const Tile& tile, std::int64_t i, std::int64_t j) {
  const std::int64_t n = tile.cols - j;
  const vf dot = load_some(tile.dots + i * tile.cols + j, n, -INFINITY);
  if (!tile.row_labels) return dot;
  vi labels = vi{};
  std::memcpy(&labels, tile.col_labels + j, (n >= SIMD_WIDTH ? SIMD_WIDTH : n) * sizeof(std::int32_t));
  return labels == tile.row_labels[i] ? splat(-INFINITY) : dot;
}

static inline float finite_or_zero(float value) { return value == -INFINITY ? 0.0f : value; }

// (max, sum) += (other_max, other_sum), each meaning 2^max * sum, empty being (-inf, 0).
static inline void merge(float& max, float& sum, float other_max, float other_sum) {
  const float top = max > other_max ? max : other_max;
  const float base = finite_or_zero(top);
  sum = sum * std::exp2(max - base) + other_sum * std::exp2(other_max - base);
  max = top;
}

// Statistics of one band of rows. Rows are merged into row_max/row_sum; columns are left in col_max/col_sum (this
// band's own, padded to complete vectors). Blocks of columns are read twice, the second time from the CPU's cache.
static void stats_band(const Tile& tile, std::int64_t first, std::int64_t last, float* row_max, float* row_sum,
                       float* col_max, float* col_sum) {
  const vf factor = splat(tile.factor);
  float top[BAND];
  for (std::int64_t block = 0; block < tile.cols; block += BLOCK) {
    const std::int64_t end = block + BLOCK < tile.cols ? block + BLOCK : tile.cols;
    for (std::int64_t j = block; j < end; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
    for (std::int64_t i = first; i < last; ++i) {
      vf row = splat(-INFINITY);
      for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
        const vf t = dots_at(tile, i, j) * factor;
        row = larger(row, t);
        store(col_max + j, larger(load(col_max + j), t));
      }
      top[i - first] = largest(row);
    }
    for (std::int64_t j = block; j < end; j += SIMD_WIDTH) store(col_sum + j, vf{});
    for (std::int64_t i = first; i < last; ++i) {
      const float base = finite_or_zero(top[i - first]);
      vf row = vf{};
      for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
        const vf dot = dots_at(tile, i, j);
        row += exp2_of(fused(dot, factor, splat(-base)));
        const vf col = load(col_max + j);
        const vf col_base = col == splat(-INFINITY) ? vf{} : col;
        store(col_sum + j, load(col_sum + j) + exp2_of(fused(dot, factor, -col_base)));
      }
      merge(row_max[i], row_sum[i], top[i - first], sum(row));
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
    const vf base = top == splat(-INFINITY) ? vf{} : top;
    vf total = load_some(col_sum + j, n, 0.0f) * exp2_of(old - base);
    for (std::int64_t band = 0; band < bands; ++band) {
      const float* part = partial + 2 * band * stride + j;
      total += load(part + stride) * exp2_of(load(part) - base);
    }
    store_some(col_max + j, top, n);
    store_some(col_sum + j, total, n);
  }
}

static void softmax_grad_band(const Tile& tile, std::int64_t first, std::int64_t last, const float* row_shift,
                              const float* row_factor, const float* col_shift, const float* col_factor, float* grad) {
  const vf factor = splat(tile.factor);
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const std::int64_t n = tile.cols - j;
      const vf dot = dots_at(tile, i, j);
      const vf by_row = exp2_of(fused(dot, factor, splat(-row_shift[i]))) * row_factor[i];
      const vf by_col = exp2_of(fused(dot, factor, -load_some(col_shift + j, n, 0.0f)));
      store_some(grad + i * tile.cols + j, fused(by_col, load_some(col_factor + j, n, 0.0f), by_row), n);
    }
  }
}

// Sums and maxima of one band of rows where loss is given (col_max: this band's own, padded), gradients where grad is.
static void sigmoid_band(const Tile& tile, std::int64_t first, std::int64_t last, float* loss, float* prob,
                         float* row_max, float* col_max, const float* weights, float* grad) {
  if (loss)
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
  for (std::int64_t i = first; i < last; ++i) {
    vf losses = vf{}, probs = vf{}, top = splat(-INFINITY);
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const vf z = fused(dots_at(tile, i, j), splat(tile.factor), splat(tile.offset));
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
