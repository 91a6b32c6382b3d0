// Chunks of codes as vectors of numbers, and the order in which they come out (coded_dots.h).
#pragma once
#include "coded.h"

#if defined(CODED_VECTORS)
#if defined(PAIRS)
// 32 numbers as bf16 from element `first` of a table on.
static inline __m512i bf16_table(const float* t) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(t + 16), _mm512_loadu_ps(t));
}

#if defined(__AVX512VBMI__)
// Bytes by a table of 256 numbers of bf16, their lower and their upper bytes apart; SIGNED: by one of 128, and the sign is a code's own.
template <bool SIGNED>
struct ByteTable {
  static constexpr int PARTS = SIGNED ? 2 : 4;
  __m512i low[PARTS], high[PARTS];
  explicit ByteTable(const Coding& c) {
    each<PARTS>(EACH_OF(i) {
      const __m512i a = bf16_table(c.table + i * 64), b = bf16_table(c.table + i * 64 + 32);
      low[i] = join(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
      high[i] = join(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)));
    });
  }
  static inline __m512i join(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
  static inline __m512i half(const __m512i* t, __m512i codes) {
    const __m512i r = _mm512_permutex2var_epi8(t[0], codes, t[1]);
    if constexpr (SIGNED) return r;
    else return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), r, _mm512_permutex2var_epi8(t[2], codes, t[3]));
  }
  // 8 codes of each 16 to `v[0]`, the others to `v[1]`.
  inline void operator()(__m512i codes, vu* v) const {
    const __m512i below = half(low, codes);
    __m512i above = half(high, codes);
    if constexpr (SIGNED) above = _mm512_ternarylogic_epi32(above, codes, _mm512_set1_epi8(char(0x80)), 0xF8);
    v[0] = _mm512_unpacklo_epi8(below, above), v[1] = _mm512_unpackhi_epi8(below, above);
  }
  // 64 codes in their order.
  inline void in_order(const uint8_t* p, vu* v) const {
    (*this)(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(p)), v);
  }
};
constexpr i64 BYTES_GRAIN = 16;
#else
// Bytes by a table of 256; SIGNED: of 128 sizes, and the sign is a code's own.
template <bool SIGNED>
struct ByteTable {
  static constexpr int PARTS = SIGNED ? 4 : 8;
  __m512i table[PARTS];
  explicit ByteTable(const Coding& c) {
    each<PARTS>(EACH_OF(i) { table[i] = bf16_table(c.table + i * 32); });
  }
  // Codes in the lower half of 16 bits, their signs in the highest bit of `sign`.
  inline __m512i of(__m512i w, __m512i sign) const {
    __m512i part[PARTS / 2];
    each<PARTS / 2>(EACH_OF(i) { part[i] = _mm512_permutex2var_epi16(table[2 * i], w, table[2 * i + 1]); });
    const __mmask32 six = _mm512_test_epi16_mask(w, _mm512_set1_epi16(64));
    const __m512i size = _mm512_mask_blend_epi16(six, part[0], part[1]);
    if constexpr (SIGNED) return _mm512_ternarylogic_epi32(size, sign, _mm512_set1_epi16(short(0x8000)), 0xF8);
    else return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(w, _mm512_set1_epi16(128)), size, _mm512_mask_blend_epi16(six, part[2], part[3]));
  }
  // Even codes to `v[0]`, odd ones to `v[1]`.
  inline void operator()(__m512i w, vu* v) const { v[0] = of(w, _mm512_slli_epi16(w, 8)), v[1] = of(_mm512_srli_epi16(w, 8), w); }
  inline void in_order(const uint8_t* p, vu* v) const {
    each<2>(EACH_OF(i) {
      const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(p + i * 32)));
      v[i] = of(w, _mm512_slli_epi16(w, 8));
    });
  }
};
constexpr i64 BYTES_GRAIN = 4;
#endif

// BYTES bytes of codes as numbers: VECTORS vectors of units. GRAIN: so many codes that follow one another share lanes.
template <i64 KIND>
struct Chunk {  // bytes by table
  static constexpr i64 CODES = 64, BYTES = 64, VECTORS = 2, ORDERED = 1, GRAIN = BYTES_GRAIN;
  static constexpr float GAIN = 1;
  ByteTable<KIND == E4M3> table;
  explicit Chunk(const Coding& c) : table(c) {}
  inline void operator()(const uint8_t* p, vu* v) const { table(_mm512_loadu_si512(p), v); }
  inline void in_order(const uint8_t* p, vu* v) const { table.in_order(p, v); }
};

template <>
struct Chunk<INT8> {  // as they lie
  static constexpr i64 CODES = 64, BYTES = 64, VECTORS = 2, ORDERED = 0, GRAIN = 1;
  static constexpr float GAIN = 1;
  explicit Chunk(const Coding&) {}
  static inline __m512 of(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
  inline void operator()(const uint8_t* p, vu* v) const {
    each<2>(EACH_OF(i) { v[i] = (__m512i)_mm512_cvtne2ps_pbh(of(p + i * 32 + 16), of(p + i * 32)); });
  }
  inline void in_order(const uint8_t* p, vu* v) const { (*this)(p, v); }
};

template <>
struct Chunk<HALVES> {  // five bits of an index are looked at: the table of 16 stands there twice
  static constexpr i64 CODES = 128, BYTES = 64, VECTORS = 4, ORDERED = 1, GRAIN = 8;
  static constexpr float GAIN = 1;
  __m512i table, word, shift;
  explicit Chunk(const Coding& c) {
    const __m512 t = _mm512_loadu_ps(c.table);
    table = (__m512i)_mm512_cvtne2ps_pbh(t, t);
    alignas(64) uint16_t words[32], shifts[32];  // where codes of 16 bytes lie
    for (i64 i = 0; i < 32; i++) {
      const i64 bit = i / 8 * 32 + c.order[i % 16];
      words[i] = uint16_t(bit / 16), shifts[i] = uint16_t(bit % 16);
    }
    word = _mm512_load_si512(words), shift = _mm512_load_si512(shifts);
  }
  inline void operator()(const uint8_t* p, vu* v) const {
    const __m512i w = _mm512_loadu_si512(p);
    each<4>(EACH_OF(i) { v[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * i), table); });
  }
  inline void in_order(const uint8_t* p, vu* v) const {
    each<4>(EACH_OF(i) {
      const __m512i w = _mm512_permutexvar_epi16(word, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(p + i * 16))));
      v[i] = _mm512_permutexvar_epi16(_mm512_srlv_epi16(w, shift), table);
    });
  }
};

// The element of a chunk that each number of its vectors belongs to.
template <class C>
static void chunk_order(const Coding& c, uint16_t* of) {
  uint16_t at[16] = {};  // the code of a run of 16 at each nibble
  for (i64 i = 0; C::CODES == 128 && i < 16; i++) at[(i / 8 * 32 + c.order[i]) / 4] = uint16_t(i);
  for (i64 j = 0; j < C::VECTORS; j++)
    for (i64 w = 0; w < 32; w++)
      of[j * 32 + w] = uint16_t(C::CODES == 128 ? w / 4 * 16 + at[w % 4 * 4 + j] : !C::ORDERED ? j * 32 + w : C::GRAIN == 16 ? w / 8 * 16 + j * 8 + w % 8 : w * 2 + j);
}

// Row x [k] in that order, zeros up to whole chunks.
template <class C>
static void chunk_row(const uint16_t* order, const element* x, i64 k, element* to) {
  for (i64 at = 0; at < k; at += C::CODES, to += C::CODES) {
    __m512i v[C::CODES / 32];
    each<C::CODES / 32>(EACH_OF(i) {
      const i64 left = k - at - i * 32;
      v[i] = left >= 32 ? load_units(x + at + i * 32) : left > 0 ? load_part(x + at + i * 32, left) : __m512i{};
    });
    each<C::VECTORS>(EACH_OF(j) {
      const __m512i index = _mm512_loadu_si512(order + j * 32);
      __m512i r = _mm512_permutex2var_epi16(v[0], index, v[1]);
      if constexpr (C::CODES == 128)
        r = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), r, _mm512_permutex2var_epi16(v[2], index, v[3]));
      _mm512_storeu_si512(to + j * 32, r);
    });
  }
}

static inline vu ones() { return _mm512_set1_epi16(0x3f80); }
constexpr bool IN_PLACE = true;  // scales are read as they lie

// Numbers g .. of a row of scales for the lanes, of 16 that are held: lane l gets the one that `lane` says.
typedef __m512i Lanes;
typedef __m512 Held;
static inline vf lanes_of(Held h, i64 g, Lanes lane) { return (vf)_mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(int(g))), h); }
template <class C>
static Lanes lane_groups(i64 span) {
  alignas(64) int of[16];
  for (int l = 0; l < 16; l++) of[l] = int(l * (C::CODES / 16) / C::GRAIN * C::GRAIN / span);
  return _mm512_load_si512(of);
}
template <class C>
constexpr bool splits(i64 span) { return C::ORDERED && C::CODES % span == 0 && span % C::GRAIN == 0; }

#else
// Two vectors of codes, as they lie.
template <i64 KIND>
struct Chunk {
  static constexpr i64 VECTORS = 2, CODES = VECTORS * VL, BYTES = KIND == HALVES ? CODES / 2 : CODES;
  static constexpr float GAIN = KIND == E4M3 ? 256 : 1;  // of what is left out of the numbers (Decoder)
  Decoder<KIND> decode;
  explicit Chunk(const Coding& c) : decode(c) {}
  inline void operator()(const uint8_t* p, vu* v) const {
    each<VECTORS>(EACH_OF(i) { v[i] = decode(p, i * VL); });
  }
};
template <class C>
static void chunk_order(const Coding&, uint16_t*) {}
template <class C>
static void chunk_row(const uint16_t*, const element* x, i64 k, element* to) {
  memcpy(to, x, size_t(k) * sizeof(element));
  std::fill(to + k, to + up_to(k, C::CODES), element(0));
}
static inline vu ones() { return vf{} + 1.f; }
constexpr bool IN_PLACE = false;
struct Lanes {};
typedef const float* Held;
static inline vf lanes_of(Held h, i64 g, Lanes) { return vf{} + h[g % 16]; }
template <class C>
static Lanes lane_groups(i64) { return {}; }
template <class C>
constexpr bool splits(i64) { return false; }
#endif
#endif
