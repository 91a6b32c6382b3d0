// Codes against a few rows of x: decoded in registers and multiplied at once, scales applied to sums of the numbers that share one.
//
// Codes come from memory, a chunk at a time. With pairs of bf16 a chunk is a cache line, whose codes are looked up as they lie in 16-bit
// words (four nibbles or two bytes each); it is the rows of x that are put into the order in which codes come out, once for all weight
// rows. Scales that several parts of a chunk have of their own meet the lanes that hold their sums. Zero points are taken off as
// z * Σ x, lane by lane. What numbers codes stand for is not rounded where they are numbers of bf16, nor is their product with a scale.
#pragma once
#include "coded.h"

#if defined(CODED_VECTORS)
constexpr i64 CODED_ROWS = 4;  // rows of x in one go

#if defined(PAIRS)
// 32 numbers as bf16 from element `first` of a table on.
static inline __m512i bf16_table(const float* t) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(t + 16), _mm512_loadu_ps(t));
}

// BYTES bytes of codes as numbers: VECTORS vectors of units.
template <i64 KIND>
struct Chunk {  // bytes by a table of 256
  static constexpr i64 CODES = 64, BYTES = 64, VECTORS = 2, ORDERED = 1;
  static constexpr float GAIN = 1;
  __m512i table[8];
  explicit Chunk(const Coding& c) {
    each<8>(EACH_OF(i) { table[i] = bf16_table(c.table + i * 32); });
  }
  inline __m512i of(__m512i w) const {
    __m512i part[4];
    each<4>(EACH_OF(i) { part[i] = _mm512_permutex2var_epi16(table[2 * i], w, table[2 * i + 1]); });
    const __mmask32 six = _mm512_test_epi16_mask(w, _mm512_set1_epi16(64)), seven = _mm512_test_epi16_mask(w, _mm512_set1_epi16(128));
    return _mm512_mask_blend_epi16(
        seven, _mm512_mask_blend_epi16(six, part[0], part[1]), _mm512_mask_blend_epi16(six, part[2], part[3]));
  }
  inline void operator()(const uint8_t* p, vu* v) const {
    const __m512i w = _mm512_loadu_si512(p);
    v[0] = of(w), v[1] = of(_mm512_srli_epi16(w, 8));
  }
};

template <>
struct Chunk<E4M3> {  // sizes by a table of 128, the sign is a code's own
  static constexpr i64 CODES = 64, BYTES = 64, VECTORS = 2, ORDERED = 1;
  static constexpr float GAIN = 1;
  __m512i table[4];
  explicit Chunk(const Coding& c) {
    each<4>(EACH_OF(i) { table[i] = bf16_table(c.table + i * 32); });
  }
  inline __m512i of(__m512i w, __m512i sign) const {
    const __m512i low = _mm512_permutex2var_epi16(table[0], w, table[1]), high = _mm512_permutex2var_epi16(table[2], w, table[3]);
    const __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(w, _mm512_set1_epi16(64)), low, high);
    return _mm512_ternarylogic_epi32(size, sign, _mm512_set1_epi16(short(0x8000)), 0xF8);
  }
  inline void operator()(const uint8_t* p, vu* v) const {
    const __m512i w = _mm512_loadu_si512(p);
    v[0] = of(w, _mm512_slli_epi16(w, 8)), v[1] = of(_mm512_srli_epi16(w, 8), w);
  }
};

template <>
struct Chunk<INT8> {  // as they lie
  static constexpr i64 CODES = 64, BYTES = 64, VECTORS = 2, ORDERED = 0;
  static constexpr float GAIN = 1;
  explicit Chunk(const Coding&) {}
  static inline __m512 of(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
  inline void operator()(const uint8_t* p, vu* v) const {
    each<2>(EACH_OF(i) { v[i] = (__m512i)_mm512_cvtne2ps_pbh(of(p + i * 32 + 16), of(p + i * 32)); });
  }
};

template <>
struct Chunk<HALVES> {  // five bits of an index are looked at: the table of 16 stands there twice
  static constexpr i64 CODES = 128, BYTES = 64, VECTORS = 4, ORDERED = 1;
  static constexpr float GAIN = 1;
  __m512i table;
  explicit Chunk(const Coding& c) {
    const __m512 t = _mm512_loadu_ps(c.table);
    table = (__m512i)_mm512_cvtne2ps_pbh(t, t);
  }
  inline void operator()(const uint8_t* p, vu* v) const {
    const __m512i w = _mm512_loadu_si512(p);
    each<4>(EACH_OF(i) { v[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * i), table); });
  }
};

// The element of a chunk that each number of its vectors belongs to.
template <class C>
static void chunk_order(const Coding& c, uint16_t* of) {
  uint16_t at[16] = {};  // the code of a run of 16 at each nibble
  for (i64 i = 0; C::CODES == 128 && i < 16; i++) at[(i / 8 * 32 + c.order[i]) / 4] = uint16_t(i);
  for (i64 j = 0; j < C::VECTORS; j++)
    for (i64 w = 0; w < 32; w++)
      of[j * 32 + w] = uint16_t(C::CODES == 128 ? w / 4 * 16 + at[w % 4 * 4 + j] : C::ORDERED ? w * 2 + j : j * 32 + w);
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

// Numbers from `p` on for the lanes: lane l gets the one that `lane` says.
typedef __m512i Lanes;
static inline vf lanes_of(const float* p, Lanes lane) { return (vf)_mm512_permutexvar_ps(lane, _mm512_loadu_ps(p)); }
template <class C>
static Lanes lane_groups(i64 span) {
  alignas(64) int of[16];
  for (int l = 0; l < 16; l++) of[l] = int(l * (C::CODES / 16) / span);
  return _mm512_load_si512(of);
}
template <class C>
constexpr bool splits(i64 span) { return C::ORDERED && C::CODES % span == 0 && span % (C::CODES / 16) == 0; }

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
struct Lanes {};
static inline vf lanes_of(const float* p, Lanes) { return vf{} + *p; }
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

// A row of codes: numbers that share a scale are `span` on end.
struct CodedRow {
  const uint8_t* codes;
  const float *scales, *zeros;
  i64 k, step, groups;  // inputs, those that one vector of scales is for, and how many scales that are
  Lanes lane;
};

// acc[m] = Σ over the row of s (c - z) x[m], lane by lane.
template <class C, int M, bool ZERO>
static inline void coded_row(const C& chunk, const CodedRow& r, const element* const* x, const float* const* sums, vf* acc) {
  constexpr int U = M == 1 ? int(C::VECTORS) : M <= 4 && C::VECTORS > 1 ? 2 : 1;  // sums of a row of x that are under way
  const float *scales = r.scales, *zeros = r.zeros;
  each<M>(EACH_OF(m) { acc[m] = vf{}; });
  for (i64 k = 0; k < r.k; k += r.step, scales += r.groups, zeros += r.groups) {
    const i64 end = std::min(r.k, k + r.step);
    vf part[M * U];
    each<M * U>(EACH_OF(j) { part[j] = vf{}; });
    const vf less = ZERO ? lanes_of(zeros, r.lane) : vf{};
    auto one = [&](const uint8_t* p, i64 at) __attribute__((always_inline)) {
      vu v[C::VECTORS];
      chunk(p, v);
      each<M>(EACH_OF(m) {
        if (ZERO) part[m * U] -= less * *(const vf_any*)(sums[m] + at / C::CODES * VL);
        each<C::VECTORS>(EACH_OF(i) { part[m * U + i % U] = madd(part[m * U + i % U], load_units(x[m] + at + i * STEP), v[i]); });
      });
    };
    i64 at = k;
    const uint8_t* p = r.codes + k * C::BYTES / C::CODES;
    for (; at + C::CODES <= end; at += C::CODES, p += C::BYTES) one(p, at);
    if (at < end) {
      alignas(64) uint8_t rest[C::BYTES] = {};
      memcpy(rest, p, size_t(((end - at) * C::BYTES + C::CODES - 1) / C::CODES));
      one(rest, at);
    }
    const vf times = lanes_of(scales, r.lane);
    each<M>(EACH_OF(m) {
      each<U - 1>(EACH_OF(u) { part[m * U] += part[m * U + u + 1]; });
      acc[m] += part[m * U] * times;
    });
  }
}

// Numbers of a row of scales or zero points as floats, times `gain`; zeros up to a whole vector behind them.
static void numbers(const void* base, i64 at, i64 step, i64 count, i64 kind, float gain, float* to) {
  i64 i = 0;
#if defined(WIDE_VECTORS)
  if (kind >= EXPONENT && step == 1) {
    const __m512i least = _mm512_set1_epi32(kind == EXPONENT ? 0x00400000 : 0), none = _mm512_set1_epi32(kind == EXPONENT ? 0x7fc00000 : 0x7f800000);
    for (; i + 16 <= count; i += 16) {
      const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(static_cast<const uint8_t*>(base) + at + i)));
      __m512i f = _mm512_mask_mov_epi32(_mm512_slli_epi32(b, 23), _mm512_testn_epi32_mask(b, b), least);
      f = _mm512_mask_mov_epi32(f, _mm512_cmpeq_epi32_mask(b, _mm512_set1_epi32(255)), none);
      _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_castsi512_ps(f), _mm512_set1_ps(gain)));
    }
  }
#endif
  for (; i < count; i++) to[i] = number_at(base, at + i * step, kind) * gain;
  std::fill(to + count, to + count + VL, 0.f);
}

// What a matrix is multiplied by, and where scales of DOT_SET of its rows are made floats.
struct CodedTask {
  CodedMatrix m;
  CodedRows rows;
  i64 groups, step, some;  // of inputs that share a scale, in all; inputs that one vector of scales is for, and how many scales that are
  Lanes lane;
  float *scales, *zeros;  // [DOT_SET][room]
  i64 room() const { return groups + VL; }

  template <class C, bool ZERO>
  CodedRow row(i64 i, i64 slot, i64& last) const {
    const Coding& c = m.c;
    const i64 at = m.place(i);
    if (at != last) {  // rows of a block have the same
      if (c.scale_kind) numbers(m.scales, at, c.scale_k, groups, c.scale_kind, C::GAIN, scales + slot * room());
      if (ZERO) numbers(m.zeros, at, c.scale_k, groups, c.zero_kind, 1 / C::GAIN, zeros + slot * room());
      last = at;
    }
    return {m.base + i * m.stride, scales + slot * room(), zeros + slot * room(), m.k, step, some, lane};
  }
};

// out[r * os + i] for M rows of x from `first` on and S rows of codes.
template <class C, int M, int S, bool ZERO>
static void coded_set(const C& chunk, const CodedTask& t, const CodedRow* rows, i64 first, float* out, i64 os) {
  const element* x[M];
  const float* sums[M];
  each<M>(EACH_OF(m) { x[m] = t.rows.x + (first + m) * t.rows.x_stride, sums[m] = t.rows.sums + (first + m) * t.rows.sum_stride; });
  vf acc[S * M];
  for (int i = 0; i < S; i++) coded_row<C, M, ZERO>(chunk, rows[i], x, sums, acc + i * M);
  each<M>(EACH_OF(m) {
    if constexpr (S == DOT_SET) sum4(acc[m], acc[M + m], acc[2 * M + m], acc[3 * M + m], out + (first + m) * os);
    else out[(first + m) * os] = sum_lanes(acc[m]);
  });
}

template <class C, bool ZERO>
static void coded_rows(const C& chunk, const CodedTask& t, const CodedRow* rows, i64 count, float* out, i64 os) {
  typedef void (*Set)(const C&, const CodedTask&, const CodedRow*, i64, float*, i64);
  constexpr int S = DOT_SET;
  static constexpr Set sets[] = {coded_set<C, 1, S, ZERO>, coded_set<C, 2, S, ZERO>, coded_set<C, 3, S, ZERO>, coded_set<C, 4, S, ZERO>};
  for (i64 r = 0; r < count;) {
    const i64 turns = (count - r + CODED_ROWS - 1) / CODED_ROWS, some = (count - r + turns - 1) / turns;
    sets[some - 1](chunk, t, rows, r, out, os);
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
  i64 last[DOT_SET] = {-1, -1, -1, -1}, i = 0;
  for (; i + DOT_SET <= nb; i += DOT_SET) {
    CodedRow rows[DOT_SET];
    for (i64 j = 0; j < DOT_SET; j++) rows[j] = t.row<C, ZERO>(n + i + j, j, last[j]);
    coded_rows<C, ZERO>(chunk, t, rows, count, out + i, os);
  }
  for (; i < nb; i++) {
    const CodedRow row = t.row<C, ZERO>(n + i, 0, last[0]);
    for (i64 r = 0; r < count; r++) coded_set<C, 1, 1, ZERO>(chunk, t, &row, r, out + i, os);
  }
  return true;
}
#endif

// As `coded_dots` for a matrix's own kind.
#if defined(CODED_VECTORS)
static bool few_rows(const CodedMatrix& m, i64 n, i64 nb, const element* const* x, i64 count, Scratch& s, float* out, i64 os) {
  typedef bool (*Dots)(const CodedMatrix&, i64, i64, const element* const*, i64, Scratch&, float*, i64);
  static constexpr Dots kinds[][2] = {
      {coded_dots<HALVES, false>, coded_dots<HALVES, true>}, {coded_dots<INT8, false>, coded_dots<INT8, true>},
      {coded_dots<E4M3, false>, coded_dots<E4M3, true>}, {coded_dots<BYTES, false>, coded_dots<BYTES, true>}};
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
