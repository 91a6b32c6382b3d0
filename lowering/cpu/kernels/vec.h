// Vectors of units: loads, conversions from what is stored, multiply-add, sums across lanes.
#pragma once
#include "common.h"

typedef unit unit_any __attribute__((may_alias, aligned(sizeof(element))));

#ifdef PAIRS
typedef __m512i vu;
static inline vf madd(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
static inline vu load_units(const void* p) { return _mm512_loadu_si512(p); }
static inline vu spread(const unit_any* p) { return _mm512_set1_epi32(int(*p)); }
#else
typedef vf vu;
static inline vf madd(vf acc, vu a, vu b) { return acc + a * b; }
static inline vu load_units(const void* p) { return *(const vf_any*)p; }
static inline vu spread(const unit_any* p) { return *p - vf{}; }
#endif

// f(0), ..., f(N - 1) with constants for arguments: arrays that are only indexed by them live in registers, also from loop to loop.
template <class F, int... I>
__attribute__((always_inline)) static inline void each_of(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
__attribute__((always_inline)) static inline void each(F&& f) {
  each_of(f, std::make_integer_sequence<int, N>());
}
#define EACH_OF(i) [&](auto i) __attribute__((always_inline))

// Keeps the compiler from loading a value again at each of its uses.
static inline vu in_register(vu v) {
#if defined(WIDE_VECTORS) && defined(__GNUC__)
  asm("" : "+v"(v));
#endif
  return v;
}

// STEP stored elements as units.
static inline vu load_stored(const stored* p) {
#if defined(PAIRS) || defined(STORAGE_F32)
  return load_units(p);
#elif defined(STORAGE_F16) && defined(WIDE_VECTORS)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(STORAGE_F16) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(STORAGE_BF16) && defined(WIDE_VECTORS)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(STORAGE_BF16) && defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf v;
  for (int i = 0; i < VL; i++) v[i] = load(p[i]);
  return v;
#endif
}

// The first n < STEP elements, zeros behind them; nothing past them is read.
static inline vu load_part(const element* p, i64 n) {
#if defined(PAIRS)
  return _mm512_maskz_loadu_epi16((__mmask32)((uint32_t(1) << n) - 1), p);
#elif defined(WIDE_VECTORS)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  alignas(64) element part[STEP] = {};
  memcpy(part, p, size_t(n) * sizeof(element));
  return load_units(part);
#endif
}

static inline vu load_part_stored(const stored* p, i64 n) {
  if constexpr (DIRECT) return load_part(reinterpret_cast<const element*>(p), n);
  alignas(64) stored part[STEP] = {};
  memcpy(part, p, size_t(n) * sizeof(stored));
  return load_stored(part);
}

// What a panel holds: units, or (packed weights that are widened as they are read) stored elements.
static inline vu load_panel(const unit* p) { return load_units(p); }
#if !defined(PAIRS) && !defined(STORAGE_F32)
static inline vu load_panel(const stored* p) { return load_stored(p); }
#endif

// Floats to stored elements or units' elements, n at a time.
static inline void store_row(const float* from, i64 n, stored* to) {
  i64 j = 0;
#if defined(PAIRS)
  for (; j + 16 <= n; j += 16) _mm256_storeu_si256((__m256i*)(to + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + j)));
#elif defined(STORAGE_F16) && defined(WIDE_VECTORS)
  for (; j + 16 <= n; j += 16) _mm256_storeu_si256((__m256i*)(to + j), _mm512_cvtps_ph(_mm512_loadu_ps(from + j), 0));
#elif defined(STORAGE_F16) && defined(__F16C__)
  for (; j + 8 <= n; j += 8) _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
#endif
  for (; j < n; j++) to[j] = store(from[j]);
}
static inline void element_row(const float* from, i64 n, element* to) {
#if defined(PAIRS)
  store_row(from, n, to);
#else
  memcpy(to, from, size_t(n) * sizeof(float));
#endif
}

#if defined(PAIRS)
// Two rows of floats as one row of pairs.
static inline void put_pairs(const float* even, const float* odd, i64 n, unit* to) {
  for (i64 l = 0; l + 16 <= n; l += 16) {
    __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + l)));
    __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + l)));
    _mm512_storeu_si512(to + l, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
}
#endif

// The sum of one vector.
static inline float sum_lanes(vf v) {
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
}

// Sums of four vectors into out[0..4).
static inline void sum4(vf a, vf b, vf c, vf d, float* out) {
#if defined(WIDE_VECTORS)
  typedef float v4 __attribute__((vector_size(16)));
  typedef float v8 __attribute__((vector_size(32)));
#define LO(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HI(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
  vf ab = LO(a, b) + HI(a, b), cd = LO(c, d) + HI(c, d);  // a0+a2 b0+b2 a1+a3 b1+b3 in each 128-bit part
  vf t = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  v8 h = __builtin_shufflevector(t, t, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(t, t, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  memcpy(out, &q, 16);
#undef LO
#undef HI
#elif defined(__AVX__)
  __m256 t = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
  out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
#endif
}
