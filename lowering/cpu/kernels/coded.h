// Weights that lie as codes of few bits with scales, and rows of them made floats.
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

enum Kind : i64 { HALVES, INT8, E4M3, BYTES };  // half bytes by table, ..., bytes by table; bytes with zero points are always by table
enum NumberKind : i64 { NO_NUMBER, FLOAT32, BFLOAT16, FLOAT16, EXPONENT, BITS };

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
  if (kind == BITS) return bits_to_float(uint32_t(b) << 23);
  return b == 255 ? NAN : b ? bits_to_float(uint32_t(b) << 23) : 5.877471754111438e-39f;
}

// One matrix of codes [n, k].
struct CodedMatrix {
  const Coding& c;
  const uint8_t* base;
  const void *scales, *zeros;
  i64 stride, first, k;
  const uint16_t* order;  // in which x meets its codes (coded_dots.h)
  const stored* operator()(i64, i64) const { return nullptr; }

  // Where the scales of a row begin.
  i64 place(i64 row) const { return c.rows ? block(row) * c.scale_n : 0; }
  i64 block(i64 row) const { return c.rows == 1 ? row * c.step + first : (row * c.step + first) / c.rows; }
  // The first row behind `row` that has others.
  i64 end_of_block(i64 row) const {
    if (c.rows <= 1) return c.rows ? row + 1 : INT64_MAX;
    return ((block(row) + 1) * c.rows - first + c.step - 1) / c.step;
  }
};

// One code of a row of `all`.
static inline float code_value(const Coding& c, const uint8_t* row, i64 k, i64 all) {
  if (c.kind == INT8) return int8_t(row[k]);
  if (c.kind != HALVES) return c.table[row[k]];
  uint32_t word = 0;
  memcpy(&word, row + k / 8 * 4, size_t(std::min<i64>(4, (all + 1) / 2 - k / 8 * 4)));
  return c.table[word >> c.order[k % 16] & 15];
}

// What decoding keeps in registers, and VL codes of a row from a multiple of VL on. E4M3 comes smaller by a factor of 2^8: bits of a half
// float.
#if defined(__AVX2__) && defined(__F16C__)
#define CODED_VECTORS
#if defined(WIDE_VECTORS)
static inline vf from_halves(__m256i x) { return (vf)_mm512_cvtph_ps(x); }
// Bits of half floats from bytes in 16 bits each; no number stays none.
static inline __m512i e4m3_halves(__m512i x) {
  __m512i h = _mm512_ternarylogic_epi32(_mm512_slli_epi16(x, 8), _mm512_set1_epi16(short(0x8000)),
                                        _mm512_and_si512(_mm512_slli_epi16(x, 7), _mm512_set1_epi16(0x3f80)), 0xEA);
  __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7f));
  return _mm512_mask_mov_epi16(h, nan, _mm512_set1_epi16(0x7e00));
}
#else
static inline vf from_halves(__m128i x) { return (vf)_mm256_cvtph_ps(x); }
#endif

template <i64 KIND>
struct Decoder {
  const float* every;
#if defined(WIDE_VECTORS)
  __m512 table;
  __m512i shift, lane;
  explicit Decoder(const Coding& c) : every(c.table) {
    if constexpr (KIND == HALVES) {
      alignas(64) int bits[16], word[16];
      for (int i = 0; i < 16; i++) bits[i] = int(c.order[i]), word[i] = i / 8;
      shift = _mm512_load_si512(bits), lane = _mm512_load_si512(word), table = _mm512_loadu_ps(c.table);
    }
  }
  inline vf operator()(const uint8_t* row, i64 k) const {
    if constexpr (KIND == INT8) return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + k))));
    if constexpr (KIND == E4M3)
      return from_halves(_mm512_castsi512_si256(e4m3_halves(_mm512_cvtepu8_epi16(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(row + k)))))));
    if constexpr (KIND == HALVES) {
      __m512i w = _mm512_permutexvar_epi32(lane, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)(row + k / 2))));
      return (vf)_mm512_permutexvar_ps(_mm512_srlv_epi32(w, shift), table);
    }
    vf v;
    for (int i = 0; i < VL; i++) v[i] = every[row[k + i]];
    return v;
  }
#else
  __m256 low, high;
  __m256i shift[2];
  explicit Decoder(const Coding& c) : every(c.table) {
    if constexpr (KIND == HALVES) {
      alignas(32) int bits[16];
      for (int i = 0; i < 16; i++) bits[i] = int(c.order[i]);
      shift[0] = _mm256_load_si256((const __m256i*)bits), shift[1] = _mm256_load_si256((const __m256i*)(bits + 8));
      low = _mm256_loadu_ps(c.table), high = _mm256_loadu_ps(c.table + 8);
    }
  }
  inline vf operator()(const uint8_t* row, i64 k) const {
    if constexpr (KIND == INT8) return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + k))));
    if constexpr (KIND == E4M3) {
      __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(row + k)));
      __m128i h = _mm_or_si128(_mm_and_si128(_mm_slli_epi16(x, 8), _mm_set1_epi16(short(0x8000))),
                               _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(0x3f80)));
      __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
      return from_halves(_mm_or_si128(h, _mm_and_si128(nan, _mm_set1_epi16(0x7e00))));
    }
    if constexpr (KIND == HALVES) {
      int word;
      memcpy(&word, row + k / 2, 4);
      __m256i i = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift[k / 8 % 2]);
      return (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), (__m256)_mm256_slli_epi32(i, 28));
    }
    vf v;
    for (int i = 0; i < VL; i++) v[i] = every[row[k + i]];
    return v;
  }
#endif
};
#endif

static inline void put_vector(vf v, element* to) {
#if defined(PAIRS)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  *(vf_any*)to = v;
#endif
}

// Codes k .. k1 of a row, as far as they are whole vectors, less z and times s; tells where the rest begins.
#if defined(CODED_VECTORS)
template <i64 KIND, bool ZERO>
static inline i64 decode_vectors(const Decoder<KIND>& decode, const uint8_t* row, i64 k, i64 k1, float z, float s, element* to) {
  constexpr float GAIN = KIND == E4M3 ? 256.f : 1.f;
  const vf less = vf{} + z / GAIN, times = vf{} + s * GAIN;
  auto done = [&](vf v) { return ZERO ? (v - less) * times : v * times; };
#if defined(PAIRS)
  for (; k + 2 * VL <= k1; k += 2 * VL) {
    vf v, u;
    if constexpr (KIND == E4M3) {
      __m512i h = e4m3_halves(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + k))));
      v = from_halves(_mm512_castsi512_si256(h)), u = from_halves(_mm512_extracti64x4_epi64(h, 1));
    } else {
      v = decode(row, k), u = decode(row, k + VL);
    }
    _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh((__m512)done(u), (__m512)done(v)));
  }
#endif
  for (; k + VL <= k1; k += VL) put_vector(done(decode(row, k)), to + k);
  return k;
}
#endif

// Rows n .. n + nb of a matrix as elements, zeros up to a whole unit.
template <i64 KIND, bool ZERO>
static void decode(const CodedMatrix& m, i64 n, i64 nb, element* to, i64 stride) {
  const Coding& c = m.c;
  const i64 span = c.columns ? c.columns : m.k;
#if defined(CODED_VECTORS)
  const Decoder<KIND> vectors(c);
#endif
  for (i64 r = 0; r < nb; r++, to += stride) {
    const uint8_t* row = m.base + (n + r) * m.stride;
    i64 at = m.place(n + r);
    for (i64 k0 = 0; k0 < m.k; k0 += span, at += c.scale_k) {
      const i64 k1 = std::min(m.k, k0 + span);
      const float s = c.scale_kind ? number_at(m.scales, at, c.scale_kind) : 1.f, z = ZERO ? number_at(m.zeros, at, c.zero_kind) : 0.f;
      i64 k = k0;
#if defined(CODED_VECTORS)
      if (k0 % VL == 0) k = decode_vectors<KIND, ZERO>(vectors, row, k, k1, z, s, to);
#endif
      for (; k < k1; k++) to[k] = to_element((code_value(c, row, k, m.k) - z) * s);
    }
    for (i64 k = m.k; k < units(m.k) * PER; k++) to[k] = element(0);
  }
}

static void decode_rows(const CodedMatrix& m, i64 n, i64 nb, element* to, i64 stride) {
  typedef void (*Decode)(const CodedMatrix&, i64, i64, element*, i64);
  static constexpr Decode kinds[][2] = {
      {decode<HALVES, false>, decode<HALVES, true>}, {decode<INT8, false>, nullptr}, {decode<E4M3, false>, nullptr},
      {decode<BYTES, false>, decode<BYTES, true>}};
  kinds[m.c.kind][m.c.zero_kind != 0](m, n, nb, to, stride);
}
