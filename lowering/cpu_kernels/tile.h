// Small matrix products. Two shapes: `lanes` (vectors run along a packed panel, scalars are broadcast from rows) and `dots`
// (vectors run along k of both operands, for a handful of rows whose weights should be streamed once).
#pragma once
#include "common.h"

typedef unit unit_any __attribute__((may_alias, aligned(sizeof(element))));

#ifdef PAIRS
static inline vf madd(vf acc, __m512i a, __m512i b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
typedef __m512i vu;
static inline vu load_units(const void* p) { return _mm512_loadu_si512(p); }
static inline vu spread(const unit_any* p) { return _mm512_set1_epi32(int(*p)); }
#else
typedef vf vu;
static inline vf madd(vf acc, vf a, vf b) { return acc + a * b; }
static inline vu load_units(const void* p) { return *(const vf_any*)p; }
static inline vu spread(const unit_any* p) { return *p - vf{}; }
#endif

// Keeps the compiler from loading a value again at each of its uses.
static inline vu in_register(vu v) {
#if defined(__AVX512F__) && defined(__GNUC__)
  asm("" : "+v"(v));
#endif
  return v;
}

// out[r][0 .. MV*VL) = Σ_k rows[r][k] * panel[k][0 .. MV*VL)
template <int MV, int NR>
static inline void tile(const unit* panel, i64 panel_stride, const element* const* rows, i64 n_units, float* out, i64 out_stride) {
  vf acc[NR][MV];
  for (int r = 0; r < NR; r++)
    for (int v = 0; v < MV; v++) acc[r][v] = vf{};
  const unit_any* row[NR];
  for (int r = 0; r < NR; r++) row[r] = (const unit_any*)rows[r];
  for (i64 k = 0; k < n_units; k++) {
    vu p[MV];
#pragma GCC unroll 8
    for (int v = 0; v < MV; v++) p[v] = in_register(load_units(panel + k * panel_stride + v * VL));
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) {
      vu b = spread(row[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < MV; v++) acc[r][v] = madd(acc[r][v], p[v], b);
    }
  }
  for (int r = 0; r < NR; r++)
    for (int v = 0; v < MV; v++) *(vf_any*)(out + r * out_stride + v * VL) = acc[r][v];
}

template <int MV>
static inline i64 tile_rows(const unit* panel, i64 panel_stride, const element* const* rows, i64 n, i64 n_units, float* out, i64 os) {
  constexpr int NR = ACC / MV < 8 ? ACC / MV : 8;
  i64 r = 0;
  for (; r + NR <= n; r += NR) tile<MV, NR>(panel, panel_stride, rows + r, n_units, out + r * os, os);
  if constexpr (NR > 4)
    for (; r + 4 <= n; r += 4) tile<MV, 4>(panel, panel_stride, rows + r, n_units, out + r * os, os);
  if constexpr (NR > 2)
    for (; r + 2 <= n; r += 2) tile<MV, 2>(panel, panel_stride, rows + r, n_units, out + r * os, os);
  for (; r < n; r++) tile<MV, 1>(panel, panel_stride, rows + r, n_units, out + r * os, os);
  return r;
}

constexpr i64 WIDE = 4 * VL;  // lanes of a full panel

// A panel of any width is stored as blocks of WIDE lanes: [block][k][lanes of the block].
static inline i64 block_lanes(i64 lanes, i64 first) { return std::min<i64>(WIDE, lanes - first); }

// out[r][lane] for a panel of `lanes` (a multiple of VL) and n rows; rows stay in the innermost cache, the panel in the next.
static void lanes_product(const unit* panel, i64 lanes, const element* const* rows, i64 n, i64 n_units, float* out, i64 os) {
  constexpr i64 GROUP = 8;
  for (i64 r = 0; r < n; r += GROUP * 3) {
    i64 nr = std::min<i64>(GROUP * 3, n - r);
    for (i64 l = 0; l < lanes; l += WIDE) {
      const unit* p = panel + l * n_units;
      i64 w = block_lanes(lanes, l);
      float* o = out + r * os + l;
      switch (w / VL) {
        case 4: tile_rows<4>(p, w, rows + r, nr, n_units, o, os); break;
        case 3: tile_rows<3>(p, w, rows + r, nr, n_units, o, os); break;
        case 2: tile_rows<2>(p, w, rows + r, nr, n_units, o, os); break;
        default: tile_rows<1>(p, w, rows + r, nr, n_units, o, os);
      }
    }
  }
}

// The sum of one vector.
static inline float sum_lanes(vf v) {
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
}

// Sums of four vectors into out[0..4).
static inline void sum4(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX512F__)
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
#else
  out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
#endif
}

// out[m][n] = Σ_k x[m][k] * w[n][k] for MR rows and NR weight rows of `depth` elements. Meanwhile FETCH rows from `next` on
// are brought into cache: weight rows are too short for the hardware to see a stream.
template <int MR, int NR, int FETCH>
static inline void dot_tile(const element* const* x, const element* w, i64 w_stride, const element* next, i64 depth, float* out, i64 os) {
  constexpr i64 STEP = VL * PER;
  vf acc[MR][NR];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = vf{};
  i64 k = 0;
  for (; k + STEP <= depth; k += STEP) {
    vu a[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) a[m] = in_register(load_units(x[m] + k));
#pragma GCC unroll 8
    for (int f = 0; f < FETCH; f++) __builtin_prefetch(next + f * w_stride + k, 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      vu b = load_units(w + n * w_stride + k);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) acc[m][n] = madd(acc[m][n], a[m], b);
    }
  }
  for (int m = 0; m < MR; m++) {
    float* o = out + m * os;
    if constexpr (NR % 4 == 0) {
      for (int n = 0; n < NR; n += 4) sum4(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], o + n);
    } else {
      for (int n = 0; n < NR; n++) o[n] = sum_lanes(acc[m][n]);
    }
    for (i64 left = depth - k, j = 0; j < left; j++)
      for (int n = 0; n < NR; n++) o[n] += from_element(x[m][k + j]) * from_element(w[n * w_stride + k + j]);
  }
}

constexpr i64 DOT_ROWS = ACC / 4, DOT_BLOCK = 8;  // rows of x in one tile at most, weight rows in a block

// One group of MR rows against a block of up to DOT_BLOCK weight rows; the group is number `group` of `groups`, which
// share the fetching of the next block.
template <int MR>
static inline void dot_rows(const element* const* x, const element* w, i64 w_stride, i64 group, i64 groups, i64 n, i64 depth, float* out, i64 os) {
  constexpr int NR = ACC / MR >= 8 ? 8 : 4;
  i64 i = 0, tiles = DOT_BLOCK / NR;
  for (; i + NR <= n; i += NR) {
    i64 turn = group * tiles + i / NR;  // of groups * tiles
    const element *wi = w + i * w_stride, *next = w + DOT_BLOCK * w_stride;
    if (groups == 1) dot_tile<MR, NR, NR>(x, wi, w_stride, next + turn * NR * w_stride, depth, out + i, os);
    else if (groups == 2 && NR == 4) dot_tile<MR, NR, 2>(x, wi, w_stride, next + turn * 2 * w_stride, depth, out + i, os);
    else if (turn < DOT_BLOCK) dot_tile<MR, NR, 1>(x, wi, w_stride, next + turn * w_stride, depth, out + i, os);
    else dot_tile<MR, NR, 0>(x, wi, w_stride, next, depth, out + i, os);
  }
  for (; i < n; i++) dot_tile<MR, 1, 0>(x, w + i * w_stride, w_stride, w, depth, out + i, os);
}

// out[m][n] for any m: rows of x in groups, weight rows in blocks that stay cached across the groups.
static void dots(const element* const* x, i64 m, const element* w, i64 w_stride, i64 n, i64 depth, float* out, i64 os) {
  i64 groups = (m + DOT_ROWS - 1) / DOT_ROWS;
  for (i64 i = 0; i < n; i += DOT_BLOCK) {
    i64 nb = std::min<i64>(DOT_BLOCK, n - i), done = 0;
    for (i64 g = 0; g < groups; g++) {
      i64 take = (m - done + groups - g - 1) / (groups - g);
      const element *const *xg = x + done, *wi = w + i * w_stride;
      float* o = out + done * os + i;
      switch (take) {
        case 1: dot_rows<1>(xg, wi, w_stride, g, groups, nb, depth, o, os); break;
        case 2: dot_rows<2>(xg, wi, w_stride, g, groups, nb, depth, o, os); break;
        case 3: dot_rows<3>(xg, wi, w_stride, g, groups, nb, depth, o, os); break;
        case 4: dot_rows<4>(xg, wi, w_stride, g, groups, nb, depth, o, os); break;
        case 5: dot_rows<5>(xg, wi, w_stride, g, groups, nb, depth, o, os); break;
        default: dot_rows<6>(xg, wi, w_stride, g, groups, nb, depth, o, os);
      }
      done += take;
    }
  }
}
