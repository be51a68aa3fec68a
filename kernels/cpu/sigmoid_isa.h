// The sigmoid of a tile's logits, for one instruction set (see sweep.cpp): sums, maxima and gradients.

static inline vf exp_of_minus_abs(vf z) { return exp2_of((z > vf{} ? -z : z) * LOG2E); }

// The sigmoid of z, u being exp(-|z|).
static inline vf sigmoid_of(vf z, vf u) { return (z > vf{} ? splat(1.0f) : u) / (u + 1.0f); }

// Sums and maxima of one band of rows where loss is given (col_max: this band's own, padded), gradients where grad is.
static void sigmoid_band(const Tile& tile, std::int64_t first, std::int64_t last, float* loss, float* prob,
                         float* row_max, float* col_max, const float* weights, float* grad) {
  exclude(tile, first, last);
  if (loss)
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
  for (std::int64_t i = first; i < last; ++i) {
    vf losses = vf{}, probs = vf{}, top = splat(-INFINITY);
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const vf z = fused(dots_at(tile, i, j, tile.cols - j), splat(tile.factor), splat(tile.offset));
      const vf u = exp_of_minus_abs(z);
      const vf sigma = sigmoid_of(z, u);
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
