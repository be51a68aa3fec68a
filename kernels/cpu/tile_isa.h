// A tile's dots, read vector by vector, for one instruction set (see sweep.cpp).
//
// "t" is a logit in base 2, "z" one in base e. Excluded entries are -inf, and 2^-inf is exactly 0 here.

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

// Write -inf over the dots above the limit of their row or of their column.
static void exclude_above_limits(const Tile& tile, std::int64_t first, std::int64_t last) {
  if (!tile.row_limits) return;
  for (std::int64_t i = first; i < last; ++i) {
    const vf row_limit = splat(tile.row_limits[i]);
    for (std::int64_t j = 0; j < tile.cols; j += SIMD_WIDTH) {
      const std::int64_t n = tile.cols - j;
      const vf limit = smaller(row_limit, load_some(tile.col_limits + j, n, INFINITY)), dot = dots_at(tile, i, j, n);
      store_some(tile.dots + i * tile.cols + j, dot > limit ? splat(-INFINITY) : dot, n);
    }
  }
}

static void exclude(const Tile& tile, std::int64_t first, std::int64_t last) {
  exclude_equal_labels(tile, first, last);
  exclude_above_limits(tile, first, last);
}

static inline float finite_or_zero(float value) { return value == -INFINITY ? 0.0f : value; }

static inline vf finite_or(vf value, vf replacement) { return value == splat(-INFINITY) ? replacement : value; }

// The end of the block of columns that starts here.
static inline std::int64_t block_end(const Tile& tile, std::int64_t block) {
  return block + BLOCK < tile.cols ? block + BLOCK : tile.cols;
}
