// Vectors of floats and what is computed on them, for one instruction set: SIMD_WIDTH floats each (see sweep.cpp).

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
  if (n >= SIMD_WIDTH) return store(to, v);
  std::memcpy(to, &v, n * sizeof(float));
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

// a > b ? a : b, in one instruction: not all compilers see it.
static inline vf larger(vf a, vf b) {
#if SIMD_WIDTH == 16
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // all 16: without a mask GCC warns
#elif SIMD_WIDTH == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif SIMD_WIDTH == 4 && defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

static inline vf smaller(vf a, vf b) { return -larger(-a, -b); }

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

static inline float smallest(vf v) { return -largest(-v); }

// 2^t for t < 127, 0 for t <= -127 and a little less than 2^t between -127 and -126. Relative error 2e-7 elsewhere: a
// minimax polynomial on [-1/2, 1/2], 1 at 0, so that 2^-127 loses its exponent and has no digits.
static inline vf exp2_of(vf t) {
  const vf clamped = above(t, -127.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const vf shifted = clamped + magic;
  const vf f = clamped - (shifted - magic);
  vf p = splat(EXP2_C5);
  p = fused(p, f, splat(EXP2_C4));
  p = fused(p, f, splat(EXP2_C3));
  p = fused(p, f, splat(EXP2_C2));
  p = fused(p, f, splat(EXP2_C1));
  p = fused(p, f, splat(1.0f));
  return (vf)((vi)p + ((vi)shifted << 23));
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
