// Distillation over a student's tile and its teachers', for one instruction set (see sweep.cpp). tiles[0] is the
// student's, those after it are the teachers'; all have the same excluded entries.
//
// A teacher's softmax weighs the student's dots: beside its sums of powers come cross sums, of powers times the
// student's dots. Its gradients are subtracted from the student's while the block is in the CPU's cache.

// The student's dots for products with a teacher's power, which is 0 where they are excluded: finite.
static inline vf finite_dots_at(const Tile& student, std::int64_t i, std::int64_t j, std::int64_t n) {
  return above(dots_at(student, i, j, n), -FLT_MAX);
}

ALWAYS_INLINE void cross_sums_at(const Tile& student, const Tile& teacher, std::int64_t i, int rows, std::int64_t j,
                                 std::int64_t n, vf factor, vf shift, vf* row_sum, vf* row_cross, float* col_sum,
                                 float* col_cross) {
  vf col = load(col_sum + j), cross = load(col_cross + j);
  for (int r = 0; r < rows; ++r) {
    const vf power = exp2_of(fused(dots_at(teacher, i + r, j, n), factor, shift));
    const vf dot = finite_dots_at(student, i + r, j, n);
    row_sum[r] += power;
    col += power;
    row_cross[r] = fused(power, dot, row_cross[r]);
    cross = fused(power, dot, cross);
  }
  store(col_sum + j, col);
  store(col_cross + j, cross);
}

// The sums and cross sums of 2^(t - base) of these rows, and the columns' added to theirs, within a block of columns.
ALWAYS_INLINE void cross_sums(const Tile& student, const Tile& teacher, std::int64_t i, int rows, std::int64_t block,
                              std::int64_t end, float base, float* row_sum, float* row_cross, float* col_sum,
                              float* col_cross) {
  const vf factor = splat(teacher.factor), shift = splat(-base);
  vf totals[TOGETHER], crosses[TOGETHER];
  for (int r = 0; r < rows; ++r) totals[r] = crosses[r] = vf{};
  std::int64_t j = block;
  for (; j + SIMD_WIDTH <= end; j += SIMD_WIDTH)
    cross_sums_at(student, teacher, i, rows, j, SIMD_WIDTH, factor, shift, totals, crosses, col_sum, col_cross);
  if (j < end)
    cross_sums_at(student, teacher, i, rows, j, end - j, factor, shift, totals, crosses, col_sum, col_cross);
  for (int r = 0; r < rows; ++r) {
    row_sum[r] = sum(totals[r]);
    row_cross[r] = sum(crosses[r]);
  }
}

// The same where a row's maximum may be far from a column's: relative to row_top, and to col_top.
static void cross_sums_apart(const Tile& student, const Tile& teacher, std::int64_t i, std::int64_t block,
                             std::int64_t end, float row_top, const float* col_top, float* row_sum, float* row_cross,
                             float* col_sum, float* col_cross) {
  const vf factor = splat(teacher.factor), row_shift = splat(-finite_or_zero(row_top));
  vf total = vf{}, cross = vf{};
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    const vf t_dot = dots_at(teacher, i, j, teacher.cols - j), dot = finite_dots_at(student, i, j, teacher.cols - j);
    const vf by_row = exp2_of(fused(t_dot, factor, row_shift));
    const vf by_col = exp2_of(fused(t_dot, factor, -finite_or(load(col_top + j), vf{})));
    total += by_row;
    cross = fused(by_row, dot, cross);
    store(col_sum + j, load(col_sum + j) + by_col);
    store(col_cross + j, fused(by_col, dot, load(col_cross + j)));
  }
  *row_sum = sum(total);
  *row_cross = sum(cross);
}

// The sums and cross sums, relative to the maxima, of a band's rows (total and cross, one each) and columns within a
// block of columns.
static void block_cross_sums(const Tile& student, const Tile& teacher, std::int64_t first, std::int64_t rows,
                             std::int64_t block, std::int64_t end, const float* top, const float* col_max,
                             float* total, float* cross, float* col_sum, float* col_cross) {
  for (std::int64_t j = block; j < end; j += SIMD_WIDTH) {
    store(col_sum + j, vf{});
    store(col_cross + j, vf{});
  }
  float least = INFINITY, most = -INFINITY;
  extend_range(top, rows, least, most);
  extend_range(col_max + block, end - block, least, most);
  std::int64_t i = 0;
  if (!(most - least <= SPREAD)) {
    for (; i < rows; ++i)
      cross_sums_apart(student, teacher, first + i, block, end, top[i], col_max, total + i, cross + i, col_sum,
                       col_cross);
    return;
  }

  const float base = finite_or_zero(most);
  for (; i + TOGETHER <= rows; i += TOGETHER)
    cross_sums(student, teacher, first + i, TOGETHER, block, end, base, total + i, cross + i, col_sum, col_cross);
  for (; i < rows; ++i)
    cross_sums(student, teacher, first + i, 1, block, end, base, total + i, cross + i, col_sum, col_cross);
  for (float* row_part : {total, cross}) to_maxima(row_part, top, rows, base);
  for (float* col_part : {col_sum, col_cross}) to_maxima(col_part + block, col_max + block, end - block, base);
}

// Statistics of one band of rows, merged into rows (one for each tile); the columns' are left in `columns`: maxima,
// sums and cross sums of each tile in turn, `stride` floats each, padded to complete vectors. The student has no cross
// sum.
static void distill_stats_band(const Tile* tiles, std::int64_t teachers, std::int64_t first, std::int64_t last,
                               const Statistics* rows, float* columns, std::int64_t stride) {
  float top[BAND], total[BAND], cross[BAND];
  const std::int64_t height = last - first;
  for (std::int64_t k = 0; k <= teachers; ++k) exclude_equal_labels(tiles[k], first, last);
  for (std::int64_t block = 0; block < tiles->cols; block += BLOCK) {
    const std::int64_t end = block_end(*tiles, block);
    for (std::int64_t k = 0; k <= teachers; ++k) {
      float *col_max = columns + 3 * k * stride, *col_sum = col_max + stride, *col_cross = col_sum + stride;
      block_maxima(tiles[k], first, height, block, end, top, col_max);
      if (k == 0)
        block_sums(tiles[k], first, height, block, end, top, col_max, total, col_sum);
      else
        block_cross_sums(tiles[0], tiles[k], first, height, block, end, top, col_max, total, cross, col_sum, col_cross);
      for (std::int64_t i = 0; i < height; i += SIMD_WIDTH) {
        const std::int64_t n = height - i;
        const Rescale by = raise_at(rows[k].max + first + i, n, load_some(top + i, n, -INFINITY));
        merge_at(rows[k].sum + first + i, n, by, load_some(total + i, n, 0.0f));
        if (k > 0) merge_at(rows[k].cross + first + i, n, by, load_some(cross + i, n, 0.0f));
      }
    }
  }
}

static void merge_cross_columns(std::int64_t cols, std::int64_t bands, std::int64_t stride, std::int64_t step,
                                const float* partial, const Statistics& columns) {
  float* const sums[] = {columns.sum, columns.cross};
  merge_bands(cols, bands, stride, step, 2, partial, columns.max, sums);
}

static void distill_grad_band(const Tile* tiles, std::int64_t teachers, std::int64_t first, std::int64_t last,
                              const Weights* weights, float* grad) {
  for (std::int64_t k = 0; k <= teachers; ++k) exclude_equal_labels(tiles[k], first, last);
  for (std::int64_t block = 0; block < tiles->cols; block += BLOCK) {
    const std::int64_t end = block_end(*tiles, block);
    block_softmax_grads(tiles[0], first, last, block, end, weights[0], false, grad);
    for (std::int64_t k = 1; k <= teachers; ++k)
      block_softmax_grads(tiles[k], first, last, block, end, weights[k], true, grad);
  }
}

// Sums and maxima of one band of rows (col_max: this band's own, padded), gradients where grad is given. The target q
// is the teachers' sum of share times sigmoid. The loss softplus(z) - q z is a sum of two terms, neither negative.
static void distill_sigmoid_band(const Tile* tiles, std::int64_t teachers, const float* shares, std::int64_t first,
                                 std::int64_t last, float* loss, float* prob, float* row_max, float* col_max,
                                 const float* weights, float* grad) {
  const Tile& student = tiles[0];
  for (std::int64_t k = 0; k <= teachers; ++k) exclude_equal_labels(tiles[k], first, last);
  for (std::int64_t j = 0; j < student.cols; j += SIMD_WIDTH) store(col_max + j, splat(-INFINITY));
  for (std::int64_t i = first; i < last; ++i) {
    vf losses = vf{}, probs = vf{}, top = splat(-INFINITY);
    for (std::int64_t j = 0; j < student.cols; j += SIMD_WIDTH) {
      const std::int64_t n = student.cols - j;
      vf q = vf{};
      for (std::int64_t k = 1; k <= teachers; ++k) {
        const vf z = fused(dots_at(tiles[k], i, j, n), splat(tiles[k].factor), splat(tiles[k].offset));
        q = fused(sigmoid_of(z, exp_of_minus_abs(z)), splat(shares[k - 1]), q);
      }
      const vf z = fused(dots_at(student, i, j, n), splat(student.factor), splat(student.offset));
      const vf u = exp_of_minus_abs(z);
      const vf residual = sigmoid_of(z, u) - q;
      const vf finite_z = above(z, -FLT_MAX);  // times q, 0 where excluded
      losses += (z > vf{} ? finite_z * (1.0f - q) : -finite_z * q) + log1p_of(u);
      probs += residual;
      top = larger(top, z * LOG2E);
      store(col_max + j, larger(load(col_max + j), z * LOG2E));
      if (grad) store_some(grad + i * student.cols + j, residual * weights[i], n);
    }
    loss[i] += sum(losses);
    prob[i] += sum(probs);
    const float found = largest(top);
    row_max[i] = row_max[i] > found ? row_max[i] : found;
  }
}
