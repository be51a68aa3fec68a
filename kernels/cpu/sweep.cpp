// Sweeps over a tile of dot products in memory: softmax statistics, gradient tiles, sigmoid sums; and the same of a
// student's tile together with its teachers'.
//
// Plain C interface, no torch. Tiles are row-major float32 without gaps. Rows are cut into bands of a fixed height, bands
// are divided among threads, and the bands' results for a column are merged by one thread in the order of the bands: the
// result has the same bits whatever the number of threads. The instruction set is chosen when the program runs.

#include <dlfcn.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <vector>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

namespace {

constexpr std::int64_t BAND = 32;     // rows a thread takes at once
constexpr std::int64_t BLOCK = 1024;  // columns: BAND x BLOCK floats stay in a core's second-level cache
constexpr int TOGETHER = 4;           // rows swept at once: what is a column's is then loaded once for all
constexpr std::int64_t PAD = 16;      // widest SIMD width: bands' column results are padded to complete vectors
constexpr float LOG2E = 1.44269504f;
// 2^f = 1 + f (C1 + f (C2 + ...)) on [-1/2, 1/2], minimax in relative error (9e-8 before rounding).
constexpr float EXP2_C1 = 0.69314700f, EXP2_C2 = 0.24022242f, EXP2_C3 = 0.05550734f, EXP2_C4 = 0.009671511f,
                EXP2_C5 = 0.0013264602f;
// How far apart a block's maxima may be (in t) to share a base. Of powers relative to it, those below 2^-127 are lost,
// which is below 2^-63 of any row's or column's largest; the others are rounded by at most 2^-18 in the exponent.
constexpr float SPREAD = 64.0f;

struct Tile {
  float* dots;
  std::int64_t rows, cols;
  float factor, offset;  // the logit is dot * factor + offset: t for softmax, z for sigmoid
  const std::int32_t* row_labels;
  const std::int32_t* col_labels;
  const float* row_limits = nullptr;  // dots above either of the two are excluded; none in distillation
  const float* col_limits = nullptr;
};

// Running results in base 2, each 2^max * sum; empty is (-inf, 0).
struct Statistics {
  float* max;
  float* sum;
  float* cross;  // 2^max * cross is the sum of 2^t times the student's dot; of teachers only
};

// Softmax along rows and along columns: in the gradient a power of t - shift is multiplied by its factor.
struct Weights {
  const float* row_shift;
  const float* row_factor;
  const float* col_shift;
  const float* col_factor;
};

struct Sweeps {
  void (*stats)(const Tile&, std::int64_t, std::int64_t, float*, float*, float*, float*);
  void (*merge_columns)(std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*, const Statistics&);
  void (*softmax_grad)(const Tile&, std::int64_t, std::int64_t, const Weights&, float*);
  void (*sigmoid)(const Tile&, std::int64_t, std::int64_t, float*, float*, float*, float*, const float*, float*);
  void (*merge_maxima)(std::int64_t, std::int64_t, std::int64_t, const float*, float*);
  void (*distill_stats)(const Tile*, std::int64_t, std::int64_t, std::int64_t, const Statistics*, float*, std::int64_t);
  void (*merge_cross_columns)(std::int64_t, std::int64_t, std::int64_t, std::int64_t, const float*, const Statistics&);
  void (*distill_grad)(const Tile*, std::int64_t, std::int64_t, std::int64_t, const Weights*, float*);
  void (*distill_sigmoid)(const Tile*, std::int64_t, const float*, std::int64_t, std::int64_t, float*, float*, float*,
                          float*, const float*, float*);
};

namespace baseline {
#define SIMD_WIDTH 4
#include "sweep_isa.h"
#undef SIMD_WIDTH
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define SIMD_WIDTH 8
#include "sweep_isa.h"
#undef SIMD_WIDTH
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define SIMD_WIDTH 16
#include "sweep_isa.h"
#undef SIMD_WIDTH
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// 0 baseline, 1 AVX2, 2 AVX-512: the best that this processor has.
int best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const Sweeps& sweeps(int isa) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::SWEEPS;
  if (isa == 1) return avx2::SWEEPS;
#endif
  (void)isa;
  return baseline::SWEEPS;
}

template <class Work>
struct Shared {
  const Work* work;
  std::atomic<std::int64_t> next;
  std::int64_t count;

  static void drain(void* self) {
    Shared& shared = *static_cast<Shared*>(self);
    for (std::int64_t item; (item = shared.next.fetch_add(1)) < shared.count;) (*shared.work)(item);
  }
};

// work(0) ... work(count - 1), in any order, on this many threads. If an OpenMP runtime of GCC's interface is loaded, as
// torch's is, its team does the work: a second team would compete with its waiting threads for the cores.
template <class Work>
void parallel(std::int64_t count, int threads, const Work& work) {
  Shared<Work> shared{&work, {0}, count};
  if (threads > count) threads = static_cast<int>(count);
  using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const auto team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads <= 1) {
    Shared<Work>::drain(&shared);
  } else if (team) {
    team(Shared<Work>::drain, &shared, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int k = 1; k < threads; ++k) others.emplace_back(Shared<Work>::drain, &shared);
    Shared<Work>::drain(&shared);
    for (auto& other : others) other.join();
  }
}

std::int64_t bands(std::int64_t rows) { return (rows + BAND - 1) / BAND; }
std::int64_t padded(std::int64_t cols) { return (cols + PAD - 1) / PAD * PAD; }

void exclude_diagonal(const Tile& tile, std::int64_t diagonal) {
  const std::int64_t first = diagonal < 0 ? -diagonal : 0;
  for (std::int64_t i = first; i < tile.rows && i + diagonal < tile.cols; ++i)
    tile.dots[i * tile.cols + i + diagonal] = -INFINITY;
}

// The student's tile and its teachers', the samples' own pairs excluded.
std::vector<Tile> student_and_teachers(float* dots, std::int64_t teachers, std::int64_t rows, std::int64_t cols,
                                       const float* factors, const float* offsets, std::int64_t diagonal,
                                       const std::int32_t* row_labels, const std::int32_t* col_labels) {
  std::vector<Tile> tiles;
  for (std::int64_t k = 0; k <= teachers; ++k) {
    const float offset = offsets ? offsets[k] : 0.0f;
    tiles.push_back({dots + k * rows * cols, rows, cols, factors[k], offset, row_labels, col_labels});
    exclude_diagonal(tiles.back(), diagonal);
  }
  return tiles;
}

template <class Work>
void over_bands(const Tile& tile, int threads, const Work& work) {
  parallel(bands(tile.rows), threads, [&](std::int64_t band) {
    const std::int64_t first = band * BAND;
    work(band, first, first + BAND < tile.rows ? first + BAND : tile.rows);
  });
}

}  // namespace

extern "C" {

// Increased with every change of this interface, so that a library of an older build is not used.
int threetowers_sweep_version() { return 6; }

int threetowers_sweep_isa() { return best_isa(); }

// Floats of scratch that the calls below need for a tile, and for those of this many teachers.
std::int64_t threetowers_sweep_scratch(std::int64_t rows, std::int64_t cols, std::int64_t teachers) {
  return 3 * (1 + teachers) * bands(rows) * padded(cols);
}

void threetowers_sweep_stats(int isa, int threads, float* dots, std::int64_t rows, std::int64_t cols, float factor,
                             std::int64_t diagonal, const std::int32_t* row_labels, const std::int32_t* col_labels,
                             const float* row_limits, const float* col_limits, float* row_max, float* row_sum,
                             float* col_max, float* col_sum, float* scratch) {
  const Tile tile{dots, rows, cols, factor, 0.0f, row_labels, col_labels, row_limits, col_limits};
  const Sweeps& sweep = sweeps(isa);
  const std::int64_t stride = padded(cols);
  exclude_diagonal(tile, diagonal);
  over_bands(tile, threads, [&](std::int64_t band, std::int64_t first, std::int64_t last) {
    float* own = scratch + 2 * band * stride;
    sweep.stats(tile, first, last, row_max, row_sum, own, own + stride);
  });
  sweep.merge_columns(cols, bands(rows), stride, 2 * stride, scratch, {col_max, col_sum, nullptr});
}

// grad may be dots.
void threetowers_sweep_softmax_grad(int isa, int threads, float* dots, std::int64_t rows, std::int64_t cols,
                                    float factor, std::int64_t diagonal, const std::int32_t* row_labels,
                                    const std::int32_t* col_labels, const float* row_limits, const float* col_limits,
                                    const float* row_shift, const float* row_factor, const float* col_shift,
                                    const float* col_factor, float* grad) {
  const Tile tile{dots, rows, cols, factor, 0.0f, row_labels, col_labels, row_limits, col_limits};
  const Weights weights{row_shift, row_factor, col_shift, col_factor};
  exclude_diagonal(tile, diagonal);
  over_bands(tile, threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    sweeps(isa).softmax_grad(tile, first, last, weights, grad);
  });
}

// loss, prob, row_max and col_max: all or none. weights and grad: both or none; grad may be dots.
void threetowers_sweep_sigmoid(int isa, int threads, float* dots, std::int64_t rows, std::int64_t cols, float factor,
                               float offset, std::int64_t diagonal, const std::int32_t* row_labels,
                               const std::int32_t* col_labels, const float* row_limits, const float* col_limits,
                               float* loss, float* prob, float* row_max, float* col_max, const float* weights,
                               float* grad, float* scratch) {
  const Tile tile{dots, rows, cols, factor, offset, row_labels, col_labels, row_limits, col_limits};
  const Sweeps& sweep = sweeps(isa);
  const std::int64_t stride = padded(cols);
  exclude_diagonal(tile, diagonal);
  over_bands(tile, threads, [&](std::int64_t band, std::int64_t first, std::int64_t last) {
    sweep.sigmoid(tile, first, last, loss, prob, row_max, scratch + band * stride, weights, grad);
  });
  if (loss) sweep.merge_maxima(cols, bands(rows), stride, scratch, col_max);
}

// Of a student and its teachers. In dots a tile follows the other, the student's first; factors, offsets, row_results,
// col_results and weights have one element for each, too.
void threetowers_sweep_distill_stats(int isa, int threads, float* dots, std::int64_t teachers, std::int64_t rows,
                                     std::int64_t cols, const float* factors, std::int64_t diagonal,
                                     const std::int32_t* row_labels, const std::int32_t* col_labels,
                                     const Statistics* row_results, const Statistics* col_results, float* scratch) {
  const auto tiles =
      student_and_teachers(dots, teachers, rows, cols, factors, nullptr, diagonal, row_labels, col_labels);
  const Sweeps& sweep = sweeps(isa);
  const std::int64_t stride = padded(cols), step = 3 * (1 + teachers) * stride;
  over_bands(tiles[0], threads, [&](std::int64_t band, std::int64_t first, std::int64_t last) {
    sweep.distill_stats(tiles.data(), teachers, first, last, row_results, scratch + band * step, stride);
  });
  sweep.merge_columns(cols, bands(rows), stride, step, scratch, col_results[0]);
  for (std::int64_t k = 1; k <= teachers; ++k)
    sweep.merge_cross_columns(cols, bands(rows), stride, step, scratch + 3 * k * stride, col_results[k]);
}

// grad may be dots: the student's.
void threetowers_sweep_distill_grad(int isa, int threads, float* dots, std::int64_t teachers, std::int64_t rows,
                                    std::int64_t cols, const float* factors, std::int64_t diagonal,
                                    const std::int32_t* row_labels, const std::int32_t* col_labels,
                                    const Weights* weights, float* grad) {
  const auto tiles =
      student_and_teachers(dots, teachers, rows, cols, factors, nullptr, diagonal, row_labels, col_labels);
  over_bands(tiles[0], threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    sweeps(isa).distill_grad(tiles.data(), teachers, first, last, weights, grad);
  });
}

// shares: of each teacher in the target. weights and grad: both or none; grad may be dots: the student's.
void threetowers_sweep_distill_sigmoid(int isa, int threads, float* dots, std::int64_t teachers, std::int64_t rows,
                                       std::int64_t cols, const float* factors, const float* offsets,
                                       std::int64_t diagonal, const std::int32_t* row_labels,
                                       const std::int32_t* col_labels, const float* shares, float* loss, float* prob,
                                       float* row_max, float* col_max, const float* weights, float* grad,
                                       float* scratch) {
  const auto tiles =
      student_and_teachers(dots, teachers, rows, cols, factors, offsets, diagonal, row_labels, col_labels);
  const Sweeps& sweep = sweeps(isa);
  const std::int64_t stride = padded(cols);
  over_bands(tiles[0], threads, [&](std::int64_t band, std::int64_t first, std::int64_t last) {
    sweep.distill_sigmoid(tiles.data(), teachers, shares, first, last, loss, prob, row_max, scratch + band * stride,
                          weights, grad);
  });
  sweep.merge_maxima(cols, bands(rows), stride, scratch, col_max);
}

}  // extern "C"
