// Codes against a few rows of x: decoded in registers and multiplied at once, scales applied to sums of the numbers that share one.
//
// Codes come from memory, a chunk at a time. With pairs of bf16 a chunk is a cache line, whose codes are looked up as they lie in 16-bit
// words (four nibbles or two bytes each); it is the rows of x that are put into the order in which codes come out, once for all weight
// rows. Scales that several parts of a chunk have of their own meet the lanes that hold their sums. Zero points are taken off as
// z * Σ x, lane by lane. What numbers codes stand for is not rounded where they are numbers of bf16, nor is their product with a scale.
#pragma once
#include "coded.h"

#if defined(CODED_VECTORS)
constexpr i64 CODED_ROWS = ACC / 3;  // rows of x in one go: each has two sums, and codes are decoded once for all of them

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

// Rows of x for one matrix: in the order of its codes, and for zero points Σ x of each lane of each chunk.
struct CodedRows {
  const element* x;
  const float* sums;
  i64 x_stride, sum_stride;
};

#if defined(WIDE_VECTORS)
// Up to 16 numbers that lie one behind another.
static inline __m512 numbers16(const void* base, i64 at, i64 kind, __mmask16 some) {
  if (kind == FLOAT32) return _mm512_maskz_loadu_ps(some, static_cast<const float*>(base) + at);
  if (kind <= FLOAT16) {
    const __m256i h = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(base) + at);
    return kind == FLOAT16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  const __m512i b = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(base) + at));
  const __m512i least = _mm512_set1_epi32(kind == EXPONENT ? 0x00400000 : 0), none = _mm512_set1_epi32(kind == EXPONENT ? 0x7fc00000 : 0x7f800000);
  const __m512i f = _mm512_mask_mov_epi32(_mm512_slli_epi32(b, 23), _mm512_testn_epi32_mask(b, b), least);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(f, _mm512_cmpeq_epi32_mask(b, _mm512_set1_epi32(255)), none));
}
#endif

// Numbers of a row of scales or zero points as floats, times `gain`; room for a whole vector behind them is filled.
static void numbers(const void* base, i64 at, i64 step, i64 count, i64 kind, float gain, float* to) {
#if defined(WIDE_VECTORS)
  for (i64 i = 0; step == 1 && i < count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_mul_ps(numbers16(base, at + i, kind, __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff)), _mm512_set1_ps(gain)));
  if (step == 1) return;
#endif
  for (i64 i = 0; i < count; i++) to[i] = number_at(base, at + i * step, kind) * gain;
  std::fill(to + count, to + count + VL, 0.f);
}

// Numbers at .. at + left of a row, 16 of them at most.
static inline Held held(const void* base, i64 at, [[maybe_unused]] i64 left, [[maybe_unused]] i64 kind) {
#if defined(PAIRS)
  return numbers16(base, at, kind, __mmask16(left < 16 ? (1u << left) - 1 : 0xffff));
#else
  return static_cast<const float*>(base) + at;
#endif
}

// A row of codes: numbers that share a scale are `span` on end.
struct CodedRow {
  const uint8_t* codes;
  const void *scales, *zeros;     // of `scale_kind` and `zero_kind`, from number `at` on
  i64 at, scale_kind, zero_kind;
  i64 k, step, groups, count;  // inputs, those that one vector of scales is for, how many scales that are, and the row has
  Lanes lane;
};

// to[m] = Σ over the row of s (c - z) x[m], lane by lane. A row at a time: the hardware follows one stream of codes, but not several.
template <class C, int M, bool ZERO>
static inline void coded_row(const C& table, const CodedRow& r, const element* const* x, const float* const* sums, vf* to) {
  constexpr int U = M == 1 ? int(C::VECTORS) : M <= 4 && C::VECTORS > 1 ? 2 : 1;  // sums of a row of x that are under way
  const C chunk = table;
  const i64 all = r.k, step = r.step, groups = r.groups;
  vf acc[M];
  each<M>(EACH_OF(m) { acc[m] = vf{}; });
  Held scales, zeros;
  for (i64 k = 0, g = 0; k < all; k += step, g += groups) {
    if (g % 16 == 0) {
      scales = held(r.scales, r.at + g, r.count - g, r.scale_kind);
      if (ZERO) zeros = held(r.zeros, r.at + g, r.count - g, r.zero_kind);
    }
    const i64 end = std::min(all, k + step);
    vf part[M * U];
    each<M * U>(EACH_OF(j) { part[j] = vf{}; });
    const vf less = ZERO ? lanes_of(zeros, g, r.lane) : vf{};
    auto one = [&](const uint8_t* p, i64 at) __attribute__((always_inline)) {
      vu v[C::VECTORS];
      chunk(p, v);
      if (ZERO) each<M>(EACH_OF(m) { part[m * U] -= less * *(const vf_any*)(sums[m] + at / C::CODES * VL); });
      each<C::VECTORS>(EACH_OF(i) {
        each<M>(EACH_OF(m) { part[m * U + i % U] = madd(part[m * U + i % U], load_units(x[m] + at + i * STEP), v[i]); });
      });
    };
    i64 at = k;
    const uint8_t* p = r.codes + k * C::BYTES / C::CODES;
    for (; at + C::CODES <= end; at += C::CODES, p += C::BYTES) one(p, at);
    if (__builtin_expect(at < end, 0)) {
      alignas(64) uint8_t rest[C::BYTES] = {};
      memcpy(rest, p, size_t(((end - at) * C::BYTES + C::CODES - 1) / C::CODES));
      one(rest, at);
    }
    const vf times = lanes_of(scales, g, r.lane);
    each<M>(EACH_OF(m) {
      each<U - 1>(EACH_OF(u) { part[m * U] += part[m * U + u + 1]; });
      acc[m] += part[m * U] * times;
    });
  }
  each<M>(EACH_OF(m) { to[m] = acc[m]; });
}

// What a matrix is multiplied by, and where scales of DOT_SET of its rows are made floats.
struct CodedTask {
  CodedMatrix m;
  CodedRows rows;
  i64 groups, step, some;  // of inputs that share a scale, in all; inputs that one vector of scales is for, and how many scales that are
  Lanes lane;
  float *scales, *zeros;  // [DOT_SET][room]
  i64 room() const { return groups + VL; }

  // Where scales of row i lie, or (numbers that do not lie one behind another, or none) floats of them; `until`: the first row behind it that
  // has others than row.at says.
  template <class C, bool ZERO>
  void row(i64 i, i64 slot, CodedRow& r, i64& until) const {
    const Coding& c = m.c;
    r.codes = m.base + i * m.stride;
    if (i < until) return;
    r.at = m.place(i), until = m.end_of_block(i);
    r.scales = c.scale_kind ? m.scales : scales, r.zeros = m.zeros, r.scale_kind = c.scale_kind ? c.scale_kind : FLOAT32, r.zero_kind = c.zero_kind;
    if (IN_PLACE && c.scale_kind && (c.scale_k == 1 || groups == 1)) return;
    if (c.scale_kind) numbers(m.scales, r.at, c.scale_k, groups, c.scale_kind, C::GAIN, scales + slot * room());
    if (ZERO) numbers(m.zeros, r.at, c.scale_k, groups, c.zero_kind, 1 / C::GAIN, zeros + slot * room());
    r.at = slot * room(), r.scales = scales, r.zeros = zeros, r.scale_kind = r.zero_kind = FLOAT32;
  }
};

// out[r * os + i] for `some` rows of x from `first` on, M with the last of them again, and S rows of codes.
template <class C, int M, int S, bool ZERO>
static void coded_set(const C& chunk, const CodedTask& t, const CodedRow* rows, i64 first, i64 some, float* out, i64 os) {
  const element* x[M];
  const float* sums[M];
  i64 row[M];
  each<M>(EACH_OF(m) {
    row[m] = first + std::min<i64>(m, some - 1);
    x[m] = t.rows.x + row[m] * t.rows.x_stride, sums[m] = t.rows.sums + row[m] * t.rows.sum_stride;
  });
  vf acc[S * M];
  for (int i = 0; i < S; i++) coded_row<C, M, ZERO>(chunk, rows[i], x, sums, acc + i * M);
  each<M>(EACH_OF(m) {
    if constexpr (S == DOT_SET) sum4(acc[m], acc[M + m], acc[2 * M + m], acc[3 * M + m], out + row[m] * os);
    else out[row[m] * os] = sum_lanes(acc[m]);
  });
}

template <class C, bool ZERO>
static void coded_rows(const C& chunk, const CodedTask& t, const CodedRow* rows, i64 count, float* out, i64 os) {
  constexpr int S = DOT_SET;
  for (i64 r = 0; r < count;) {
    const i64 turns = (count - r + CODED_ROWS - 1) / CODED_ROWS, some = (count - r + turns - 1) / turns;
    switch (some) {
      case 1: coded_set<C, 1, S, ZERO>(chunk, t, rows, r, some, out, os); break;
      case 2: coded_set<C, 2, S, ZERO>(chunk, t, rows, r, some, out, os); break;
      case 3: coded_set<C, 3, S, ZERO>(chunk, t, rows, r, some, out, os); break;
      case 4: coded_set<C, 4, S, ZERO>(chunk, t, rows, r, some, out, os); break;
      default:
        if constexpr (CODED_ROWS > 4) coded_set<C, CODED_ROWS, S, ZERO>(chunk, t, rows, r, some, out, os);
    }
    r += some;
  }
}

// out[r][i] = Σ_k x[r][k] w[n + i][k] for `count` rows of x; false where scales do not fit chunks.
template <i64 KIND, bool ZERO>
static bool coded_dots(const CodedMatrix& m, i64 n, i64 nb, const element* const* x, i64 count, Scratch& s, float* out, i64 os) {
  typedef Chunk<KIND> C;
  const i64 span = m.c.columns && m.c.columns < m.k ? m.c.columns : up_to(m.k, C::CODES), lines = C::CODES * i64(sizeof(element)) / 64;
  if ((span % C::CODES && !splits<C>(span)) || m.k < C::CODES / 2 || count > 16) return false;
  const C chunk(m.c);
  const i64 depth = up_to(m.k, C::CODES), stride = (depth / C::CODES * lines | 1) * 64 / i64(sizeof(element)), chunks = depth / C::CODES;
  CodedTask t{m, {s.w_rows, nullptr, stride, chunks * VL}, 
      (m.k + span - 1) / span, std::max(span, C::CODES), std::max<i64>(C::CODES / span, 1), lane_groups<C>(span), nullptr, nullptr};
  float* room = reinterpret_cast<float*>(s.w_panel);
  t.scales = room, t.zeros = t.scales + DOT_SET * t.room(), t.rows.sums = room = t.zeros + DOT_SET * t.room();
  std::fill(t.scales, t.scales + DOT_SET * t.room(), C::GAIN);
  for (i64 r = 0; r < count; r++) {
    element* to = s.w_rows + r * stride;
    chunk_row<C>(m.order, x[r], m.k, to);
    for (i64 c = 0; ZERO && c < chunks; c++, room += VL) {
      vf sum = vf{};
      each<C::VECTORS>(EACH_OF(j) { sum = madd(sum, load_units(to + c * C::CODES + j * STEP), ones()); });
      *(vf_any*)room = sum;
    }
  }
  i64 until[DOT_SET] = {}, i = 0;
  CodedRow rows[DOT_SET];
  for (CodedRow& r : rows) r = {nullptr, nullptr, nullptr, 0, 0, 0, m.k, t.step, t.some, t.groups, t.lane};
  for (; i + DOT_SET <= nb; i += DOT_SET) {
    for (i64 j = 0; j < DOT_SET; j++) t.row<C, ZERO>(n + i + j, j, rows[j], until[j]);
    coded_rows<C, ZERO>(chunk, t, rows, count, out + i, os);
  }
  for (; i < nb; i++) {
    t.row<C, ZERO>(n + i, 0, rows[0], until[0]);
    for (i64 r = 0; r < count; r++) coded_set<C, 1, 1, ZERO>(chunk, t, rows, r, 1, out + i, os);
  }
  return true;
}
#endif

// As `coded_dots` for a matrix's own kind.
#if defined(CODED_VECTORS)
static bool few_rows(const CodedMatrix& m, i64 n, i64 nb, const element* const* x, i64 count, Scratch& s, float* out, i64 os) {
  typedef bool (*Dots)(const CodedMatrix&, i64, i64, const element* const*, i64, Scratch&, float*, i64);
  static constexpr Dots kinds[][2] = {
      {coded_dots<HALVES, false>, coded_dots<HALVES, true>}, {coded_dots<INT8, false>, nullptr},
      {coded_dots<E4M3, false>, nullptr}, {coded_dots<BYTES, false>, coded_dots<BYTES, true>}};
  return kinds[m.c.kind][m.c.zero_kind != 0](m, n, nb, x, count, s, out, os);
}
#else
static bool few_rows(const CodedMatrix&, i64, i64, const element* const*, i64, Scratch&, float*, i64) { return false; }
#endif

// The order in which x meets codes of a kind.
static void order_of([[maybe_unused]] const Coding& c, [[maybe_unused]] uint16_t* to) {
#if defined(CODED_VECTORS)
  if (c.kind == HALVES) chunk_order<Chunk<HALVES>>(c, to);
  else if (c.kind == INT8) chunk_order<Chunk<INT8>>(c, to);
  else chunk_order<Chunk<BYTES>>(c, to);
#endif
}
