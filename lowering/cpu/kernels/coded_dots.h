// Codes against a few rows of x: decoded in registers and multiplied at once, scales applied to sums of the numbers that share one.
//
// Codes come from memory, a chunk at a time. With pairs of bf16 a chunk is a cache line, whose codes are looked up as they lie in 16-bit
// words (four nibbles or two bytes each); it is the rows of x that are put into the order in which codes come out, once for all weight
// rows. Scales that several parts of a chunk have of their own meet the lanes that hold their sums. Zero points are taken off as
// z * Σ x, lane by lane. What numbers codes stand for is not rounded where they are numbers of bf16, nor is their product with a scale.
#pragma once
#include "coded_chunk.h"

#if defined(CODED_VECTORS)
constexpr i64 CODED_ROWS = ACC / 3;  // rows of x in one go: each has two sums, and codes are decoded once for all of them

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
  s.summed = nullptr;  // no longer there
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
