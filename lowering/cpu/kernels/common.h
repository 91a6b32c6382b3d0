// Types, conversions and vector widths shared by the CPU kernels. No torch headers: a build takes some seconds.
//
// A build is for one storage type: -DSTORAGE_F32, -DSTORAGE_BF16 or -DSTORAGE_F16, and for one level of instructions, by compiler flags.
// Products run in `unit`s: floats, or pairs of bf16 where the machine multiplies them natively. Accumulation is always fp32; all
// addressing is 64 bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "args.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE_VECTORS
constexpr int VL = 16, ACC = 24;  // floats in a vector, accumulators a tile may hold
#elif defined(__AVX__)
constexpr int VL = 8, ACC = 12;
#else
constexpr int VL = 4, ACC = 16;
#endif
typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline float bits_to_float(uint32_t b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}

#if defined(STORAGE_BF16)
typedef uint16_t stored;
static inline float load(stored v) { return bits_to_float(uint32_t(v) << 16); }
static inline stored store(float f) {  // round to nearest even, a NaN stays one
  uint32_t b = float_to_bits(f);
  uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return stored((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded);
}
#elif defined(STORAGE_F16)
typedef _Float16 stored;
static inline float load(stored v) { return float(v); }
static inline stored store(float f) { return stored(f); }
#else
typedef float stored;
static inline float load(stored v) { return v; }
static inline stored store(float f) { return f; }
#endif

#if defined(STORAGE_BF16) && defined(__AVX512BF16__) && defined(WIDE_VECTORS)
#define PAIRS
typedef uint32_t unit;     // two bf16, the lower k in the lower half
typedef stored element;    // what a row of units is made of
constexpr int PER = 2;     // elements in a unit
static inline element to_element(float f) { return store(f); }
static inline float from_element(element e) { return load(e); }
#else
typedef float unit;
typedef float element;
constexpr int PER = 1;
static inline element to_element(float f) { return f; }
static inline float from_element(element e) { return e; }
#endif
constexpr bool DIRECT = sizeof(element) == sizeof(stored);  // stored rows can be multiplied where they lie
constexpr i64 STEP = VL * PER;                              // elements of one vector of units
constexpr i64 LINE = 64 / i64(sizeof(unit));                // units of a cache line

typedef element element_any __attribute__((may_alias));
typedef uint32_t pair_any __attribute__((may_alias, aligned(2)));

static inline i64 up_to(i64 n, i64 m) { return (n + m - 1) / m * m; }
static inline i64 units(i64 k) { return (k + PER - 1) / PER; }

// The matrix or bias of expert e: `list` holds one base per half (expert stride > 0) or one per half and expert.
template <class T>
static inline T* at(T* const* list, i64 experts, i64 expert_stride, i64 half, i64 e) {
  typedef typename std::conditional<std::is_const<T>::value, const stored, stored>::type S;
  if (!list) return nullptr;
  if (!expert_stride) return list[half * experts + e];
  return list[half] ? static_cast<T*>(static_cast<S*>(list[half]) + e * expert_stride) : nullptr;
}

static inline int thread_id() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
