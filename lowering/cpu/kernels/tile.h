// Products for many rows: vectors run along a panel [k][lane], the other operand's rows are broadcast, sums stay in registers.
//
// Either operand may be the panel. Weights as the model holds them are the rows, and tokens are packed into panels (move.h); weights
// packed ahead (packed.h) are the panels, and tokens the rows, any number of them.
#pragma once
#include "amx.h"

enum Fetch { NOTHING, ROWS_AHEAD, PACED };

// Where rows of sums go: row r, `stride` apart, or (ADDED) times a weight on top of what is in the row of its token.
struct Out {
  float* base;
  i64 stride;
  const i64* tokens = nullptr;
  const float* weights = nullptr;
  template <bool ADDED>
  float* row(i64 r) const { return base + (ADDED ? tokens[r] : r) * stride; }
  Out from(i64 r) const { return tokens ? Out{base, stride, tokens + r, weights + r} : Out{base + r * stride, stride}; }
};

// out[r][0 .. MV*VL) = [out +] Σ_k rows[r][k] * panel[k][0 .. MV*VL). U sums along k.
// What is asked for meanwhile: ROWS_AHEAD: a line of each of NR rows from `ahead` on, `as` apart, whenever one of `rows` is used up;
// PACED: two lines from `ahead` on, `as` bytes further with every k.
template <int MV, int NR, int U, Fetch FETCH, bool ADDED, class P>
static inline void tile(
    const P* panel, i64 stride, const element* const* rows, i64 n_units, const Out& out, bool more, const void* ahead, i64 as) {
  vf acc[U * NR * MV];
  const unit_any* row[NR];
  each<NR>(EACH_OF(r) { row[r] = (const unit_any*)rows[r]; });
  each<U * NR * MV>(EACH_OF(j) { acc[j] = vf{}; });
  each<NR * MV>(EACH_OF(j) {
    float* to = out.template row<ADDED>(j / MV) + j % MV * VL;
    if (!ADDED && more) acc[j] = *(const vf_any*)to;
    if (ADDED && j % MV * VL % 16 == 0) __builtin_prefetch(to, 1, 3);
  });
  auto step = [&](i64 k, auto u) __attribute__((always_inline)) {
    vu p[MV], b[NR];
    each<MV>(EACH_OF(v) { p[v] = in_register(load_panel(panel + k * stride + v * VL)); });
    if (FETCH == PACED) each<2>(EACH_OF(l) { __builtin_prefetch((const char*)ahead + k * as + l * 64, 0, 2); });
    each<NR * MV>(EACH_OF(j) {
      if (j % MV == 0) b[j / MV] = spread(row[j / MV] + k);
      acc[u * NR * MV + j] = madd(acc[u * NR * MV + j], p[j % MV], b[j / MV]);
    });
  };
  i64 k = 0;
  if constexpr (FETCH == ROWS_AHEAD)
    for (; k + LINE <= n_units; k += LINE) {
      each<NR>(EACH_OF(r) { __builtin_prefetch((const stored*)ahead + r * as + k * PER, 0, 2); });
      for (i64 i = 0; i < LINE; i += 4) each<4>(EACH_OF(u) { step(k + i + u, std::integral_constant<int, u % U>{}); });
    }
  for (; k + U <= n_units; k += U) each<U>(EACH_OF(u) { step(k + u, u); });
  if constexpr (U > 1)
    for (; k < n_units; k++) step(k, std::integral_constant<int, 0>{});
  each<NR * MV>(EACH_OF(j) {
    float* to = out.template row<ADDED>(j / MV) + j % MV * VL;
    vf s = acc[j];
    each<U - 1>(EACH_OF(u) { s += acc[(u + 1) * NR * MV + j]; });
    *(vf_any*)to = ADDED ? *(const vf_any*)to + s * (out.weights[j / MV] - vf{}) : s;
  });
}

// ---- the panel holds tokens ------------------------------------------------------------------------------------------

constexpr i64 WIDE = 4 * VL;  // lanes of a full panel

// A panel of any width is stored as blocks of WIDE lanes: [block][k][lanes of the block].
static inline i64 block_lanes(i64 lanes, i64 first) { return std::min<i64>(WIDE, lanes - first); }

template <int MV>
static inline void tile_rows(
    const unit* panel, i64 stride, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s, i64 first) {
  constexpr int NR = ACC / MV < 8 ? ACC / MV : 8;
  const i64 far = s.distance(NR);
  i64 r = 0;
  for (; r + NR <= n; r += NR) {
    const void* ahead = s.base ? (const void*)s.at(first + r, far) : rows[r];
    tile<MV, NR, 1, ROWS_AHEAD, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, ahead, s.stride);
  }
  if constexpr (NR > 4)
    for (; r + 4 <= n; r += 4) tile<MV, 4, 1, NOTHING, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, nullptr, 0);
  for (; r < n; r++) tile<MV, 1, 1, NOTHING, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, nullptr, 0);
}

static inline void tile_block(
    const unit* panel, i64 stride, i64 vectors, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s, i64 first) {
  switch (vectors) {
    case 4: tile_rows<4>(panel, stride, rows, n, n_units, out, os, s, first); break;
    case 3: tile_rows<3>(panel, stride, rows, n, n_units, out, os, s, first); break;
    case 2: tile_rows<2>(panel, stride, rows, n, n_units, out, os, s, first); break;
    default: tile_rows<1>(panel, stride, rows, n, n_units, out, os, s, first);
  }
}

// out[r][lane] for a panel of `lanes` (a multiple of VL) and n rows; a group of rows stays cached while the panel's blocks pass.
// `s`: the rows as they lie in memory, where they do. `readable`: rows that may be read, if there are more.
static void lanes_product(
    const unit* panel, i64 lanes, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s = {}, i64 readable = 0) {
  constexpr i64 GROUP = 24;
  bool tiles = tiles_on;
  for (i64 l = 0; tiles && l < lanes; l += WIDE) {
    const i64 w = block_lanes(lanes, l);
    tiles = tile_product(panel + l * n_units, w, w, Spaced{rows, n, std::max(n, readable)}, n_units, out + l, os, l ? Stream{} : s, false);
  }
  if (tiles) return;
  for (i64 r = 0; r < n; r += GROUP) {
    i64 nr = std::min(GROUP, n - r);
    for (i64 l = 0; l < lanes; l += WIDE) {
      i64 w = block_lanes(lanes, l);
      tile_block(panel + l * n_units, w, w / VL, rows + r, nr, n_units, out + r * os + l, os, l ? Stream{} : s, r);
    }
  }
}
