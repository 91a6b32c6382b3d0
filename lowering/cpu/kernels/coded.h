// The phases on weights that lie as codes of few bits with scales: a few rows at a time become floats in the first-level cache, and are
// multiplied there by all tokens of their expert. No more of a matrix is ever floats; memory is read once, as codes.
#pragma once
#include "forward.h"

// How codes of a projection lie (../coded.py mirrors the struct). Bases and strides of the codes, in bytes, are those of `Args`.
struct Coding {
  const void* const* scales;  // or null; like the codes' bases
  const void* const* zeros;   // or null
  const float* table;         // what codes stand for: of 16, or of 256
  i64 scale_expert, scale_n, scale_k;  // strides of scales and zero points, in elements
  i64 rows, columns;          // of a block that shares a scale; 0: all
  i64 step, second;           // output i of the second half is row i * step + second of the matrix as stored, of the first i * step
  i64 kind, scale_kind, zero_kind;
  i64 order[16];              // bit at which code j of a run of 16 begins, in the run's 32 bits that it lies in
};

struct CodedArgs {
  Args args;
  Coding up, down;
};

enum Kind : i64 { HALVES, INT8, E4M3, BYTES };                  // half bytes by table, ..., bytes by table
enum NumberKind : i64 { NO_NUMBER, FLOAT32, BFLOAT16, FLOAT16, EXPONENT };

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
  if (!e) return (sign ? -1.f : 1.f) * std::ldexp(float(m), -24);
  return bits_to_float(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
#endif
}

static inline float number_at(const void* base, i64 i, i64 kind) {
  if (kind == FLOAT32) return static_cast<const float*>(base)[i];
  if (kind == BFLOAT16) return bits_to_float(uint32_t(static_cast<const uint16_t*>(base)[i]) << 16);
  if (kind == FLOAT16) return half_to_float(static_cast<const uint16_t*>(base)[i]);
  const uint8_t b = static_cast<const uint8_t*>(base)[i];
  return b == 255 ? NAN : b ? bits_to_float(uint32_t(b) << 23) : 5.877471754111438e-39f;
}

// One matrix of codes [n, k].
struct CodedMatrix {
  const Coding& c;
  const uint8_t* base;
  const void *scales, *zeros;
  i64 stride, first, k;
  const stored* operator()(i64, i64) const { return nullptr; }

  i64 place(i64 row, i64 at) const {
    const i64 i = row * c.step + first;
    return (c.rows ? i / c.rows : 0) * c.scale_n + (c.columns ? at / c.columns : 0) * c.scale_k;
  }
};

// One code of a row.
static inline float code_value(const Coding& c, const uint8_t* row, i64 k) {
  if (c.kind == INT8) return int8_t(row[k]);
  if (c.kind != HALVES) return c.table[row[k]];
  uint32_t word;
  memcpy(&word, row + k / 8 * 4, 4);
  return c.table[word >> c.order[k % 16] & 15];
}

// VL codes of a row, from a multiple of VL on. E4M3 comes smaller by a factor of 2^8: bits of a half float.
#if defined(__AVX2__) && defined(__F16C__)
#define CODED_VECTORS
template <i64 KIND>
static inline vf code_vector(const Coding& c, const uint8_t* row, i64 k) {
#if defined(WIDE_VECTORS)
  if constexpr (KIND == INT8) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + k))));
  if constexpr (KIND == E4M3) {
    __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k)));
    __m256i h = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16(short(0x8000))),
                                _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f80)));
    __m256i digits = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    __m256i nan = _mm256_cmpeq_epi16(digits, _mm256_set1_epi16(0x7f));
    return (vf)_mm512_cvtph_ps(_mm256_or_si256(h, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00))));
  }
  if constexpr (KIND == HALVES) {
    uint32_t word[2];
    memcpy(word, row + k / 2, 8);
    __m512i w = _mm512_inserti64x4(_mm512_set1_epi32(int(word[0])), _mm256_set1_epi32(int(word[1])), 1);
    __m512i shift = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(_mm512_loadu_si512(c.order))),
                                       _mm512_cvtepi64_epi32(_mm512_loadu_si512(c.order + 8)), 1);
    return (vf)_mm512_permutexvar_ps(_mm512_srlv_epi32(w, shift), _mm512_loadu_ps(c.table));
  }
#else
  if constexpr (KIND == INT8) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + k))));
  if constexpr (KIND == E4M3) {
    __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(row + k)));
    __m128i h = _mm_or_si128(_mm_and_si128(_mm_slli_epi16(x, 8), _mm_set1_epi16(short(0x8000))),
                             _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(0x3f80)));
    __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
    return (vf)_mm256_cvtph_ps(_mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))));
  }
  if constexpr (KIND == HALVES) {
    uint32_t word;
    memcpy(&word, row + k / 2, 4);
    const i64* order = c.order + k % 16;
    __m256i shift = _mm256_setr_epi32(
        int(order[0]), int(order[1]), int(order[2]), int(order[3]), int(order[4]), int(order[5]), int(order[6]), int(order[7]));
    __m256i i = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shift);
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(c.table), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(c.table + 8), i);
    return (vf)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(i, 28));
  }
#endif
  vf v;
  for (int i = 0; i < VL; i++) v[i] = c.table[row[k + i]];
  return v;
}
#endif

static inline void put_vector(vf v, element* to) {
#if defined(PAIRS)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  *(vf_any*)to = v;
#endif
}

// Row i of a matrix as elements, zeros up to a whole unit.
template <i64 KIND>
static void decode_row(const CodedMatrix& m, i64 i, element* to) {
  const Coding& c = m.c;
  const uint8_t* row = m.base + i * m.stride;
  const i64 span = c.columns ? c.columns : m.k;
  for (i64 k0 = 0; k0 < m.k; k0 += span) {
    const i64 k1 = std::min(m.k, k0 + span), at = m.place(i, k0);
    const float s = c.scale_kind ? number_at(m.scales, at, c.scale_kind) : 1.f;
    const float z = c.zero_kind ? number_at(m.zeros, at, c.zero_kind) : 0.f;
    i64 k = k0;
#if defined(CODED_VECTORS)
    if (k0 % VL == 0) {
      const vf by = vf{} + (KIND == E4M3 ? 256.f : 1.f), less = vf{} + z, times = vf{} + s;
      for (; k + VL <= k1; k += VL) {
        __builtin_prefetch(row + (KIND == HALVES ? k / 2 : k) + AHEAD / 4, 0, 2);
        put_vector((code_vector<KIND>(c, row, k) * by - less) * times, to + k);
      }
    }
#endif
    for (; k < k1; k++) to[k] = to_element((code_value(c, row, k) - z) * s);
  }
  for (i64 k = m.k; k < units(m.k) * PER; k++) to[k] = element(0);
}

static void decode_rows(const CodedMatrix& m, i64 n, i64 nb, element* to, i64 stride) {
  typedef void (*Decode)(const CodedMatrix&, i64, element*);
  static constexpr Decode kinds[] = {decode_row<HALVES>, decode_row<INT8>, decode_row<E4M3>, decode_row<BYTES>};
  for (i64 r = 0; r < nb; r++) kinds[m.c.kind](m, n + r, to + r * stride);
}

struct CodedForward : Phases<CodedForward> {
  const CodedArgs& coded;
  explicit CodedForward(const CodedArgs& args) : Phases(args.args), coded(args) {}

  static constexpr i64 TOGETHER = 2 * DOT_SET;  // rows that are floats at a time

  CodedMatrix matrix(const Coding& c, const void* const* bases, i64 expert_stride, i64 scale_expert, i64 stride, i64 half, i64 e, i64 k) const {
    auto of = [&](const void* const* list, i64 bytes) -> const void* {
      if (!list) return nullptr;
      return expert_stride ? static_cast<const uint8_t*>(list[half]) + e * bytes : list[half * a.experts + e];
    };
    auto width = [](i64 kind) { return kind == FLOAT32 ? 4 : kind == EXPONENT ? 1 : 2; };
    return {c, static_cast<const uint8_t*>(of(bases, expert_stride)), of(c.scales, scale_expert * width(c.scale_kind)),
            of(c.zeros, scale_expert * width(c.zero_kind)), stride, half ? c.second : 0, k};
  }
  CodedMatrix up(i64 half, i64 e) const { return matrix(coded.up, a.up, a.up_expert, coded.up.scale_expert, a.up_n, half, e, a.hidden); }
  CodedMatrix down(i64 e) const { return matrix(coded.down, a.down, a.down_expert, coded.down.scale_expert, a.down_n, 0, e, a.inter); }

  // As `Forward::product`. Rows that floats are made of for `dots` are stored ones: what is stored is what an element is made of.
  static void product(
      const Strip& p, const CodedMatrix& m, i64 n, i64 nb, const unit* panel, const element** rows, bool, const stored*, Scratch& s,
      float* out, i64 os) {
    const i64 depth = units(m.k) * PER;
    if (p.lanes) {
      const element* w[MAX_BLOCK];
      decode_rows(m, n, nb, s.w_rows, depth);
      for (i64 r = 0; r < nb; r++) w[r] = s.w_rows + r * depth;
      lanes_product(panel, p.lanes, w, nb, units(m.k), out, os);
      return;
    }
    stored* narrow = reinterpret_cast<stored*>(s.w_rows);
    for (i64 i = 0; i < nb; i += TOGETHER) {
      const i64 some = std::min(TOGETHER, nb - i);
      if constexpr (DIRECT) {
        decode_rows(m, n + i, some, s.w_rows, depth);
      } else {
        element* wide = s.w_rows + TOGETHER * depth;
        decode_rows(m, n + i, some, wide, depth);
        store_row(reinterpret_cast<const float*>(wide), some * depth, narrow);
      }
      dots(rows, p.rows, Stream{narrow, depth, some, nullptr}, m.k, nullptr, out + i, os, false);
    }
  }
};
