// Products for many rows: vectors run along a panel [k][lane], the other operand's rows are broadcast, sums stay in registers.
//
// Either operand may be the panel. Weights as the model holds them are the rows, and tokens are packed into panels (move.h); weights
// packed ahead (pack.h) are the panels, and tokens the rows, any number of them.
#pragma once
#include "dots.h"

enum Fetch { NOTHING, ROWS_AHEAD, PANEL_AHEAD };

// out[r][0 .. MV*VL) = [out +] Σ_k rows[r][k] * panel[k][0 .. MV*VL). U sums along k.
// ROWS_AHEAD: a line of each of NR rows from `ahead` on is asked for whenever one of `rows` is used up; PANEL_AHEAD: the panel's own.
template <int MV, int NR, int U, Fetch FETCH, class P>
static inline void tile(
    const P* panel, i64 stride, const element* const* rows, i64 n_units, float* out, i64 os, bool more, const stored* ahead, i64 as) {
  vf acc[U][NR][MV];
  for (int r = 0; r < NR; r++)
    for (int v = 0; v < MV; v++) {
      acc[0][r][v] = more ? *(const vf_any*)(out + r * os + v * VL) : vf{};
      for (int u = 1; u < U; u++) acc[u][r][v] = vf{};
    }
  const unit_any* row[NR];
  for (int r = 0; r < NR; r++) row[r] = (const unit_any*)rows[r];
  auto step = [&](i64 k, int u) __attribute__((always_inline)) {
    vu p[MV];
#pragma GCC unroll 8
    for (int v = 0; v < MV; v++) p[v] = in_register(load_panel(panel + k * stride + v * VL));
    if (FETCH == PANEL_AHEAD)
#pragma GCC unroll 8
      for (i64 b = 0; b < i64(MV * VL * sizeof(P)); b += 64) __builtin_prefetch((const char*)(panel + k * stride) + AHEAD + b, 0, 2);
#pragma GCC unroll 24
    for (int r = 0; r < NR; r++) {
      vu b = spread(row[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < MV; v++) acc[u][r][v] = madd(acc[u][r][v], p[v], b);
    }
  };
  i64 k = 0;
  for (; k + LINE <= n_units; k += LINE) {
    if (FETCH == ROWS_AHEAD)
#pragma GCC unroll 24
      for (int r = 0; r < NR; r++) __builtin_prefetch(ahead + r * as + k * PER, 0, 2);
    for (i64 i = 0; i < LINE; i += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) step(k + i + u, u);
  }
  for (; k < n_units; k++) step(k, 0);
  for (int r = 0; r < NR; r++)
    for (int v = 0; v < MV; v++) {
      vf s = acc[0][r][v];
      for (int u = 1; u < U; u++) s += acc[u][r][v];
      *(vf_any*)(out + r * os + v * VL) = s;
    }
}

// ---- the panel holds tokens ------------------------------------------------------------------------------------------

constexpr i64 WIDE = 4 * VL;  // lanes of a full panel

// A panel of any width is stored as blocks of WIDE lanes: [block][k][lanes of the block].
static inline i64 block_lanes(i64 lanes, i64 first) { return std::min<i64>(WIDE, lanes - first); }

template <int MV, Fetch FETCH>
static inline void tile_rows(
    const unit* panel, i64 stride, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s, i64 first) {
  constexpr int NR = ACC / MV < 8 ? ACC / MV : 8;
  const i64 far = s.distance(NR);
  i64 r = 0;
  for (; r + NR <= n; r += NR)
    tile<MV, NR, 1, FETCH>(panel, stride, rows + r, n_units, out + r * os, os, false, FETCH ? s.at(first + r, far) : nullptr, s.stride);
  if constexpr (NR > 4)
    for (; r + 4 <= n; r += 4) tile<MV, 4, 1, NOTHING>(panel, stride, rows + r, n_units, out + r * os, os, false, nullptr, 0);
  if constexpr (NR > 2)
    for (; r + 2 <= n; r += 2) tile<MV, 2, 1, NOTHING>(panel, stride, rows + r, n_units, out + r * os, os, false, nullptr, 0);
  for (; r < n; r++) tile<MV, 1, 1, NOTHING>(panel, stride, rows + r, n_units, out + r * os, os, false, nullptr, 0);
}

template <Fetch FETCH>
static inline void tile_block(
    const unit* panel, i64 stride, i64 vectors, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s, i64 first) {
  switch (vectors) {
    case 4: tile_rows<4, FETCH>(panel, stride, rows, n, n_units, out, os, s, first); break;
    case 3: tile_rows<3, FETCH>(panel, stride, rows, n, n_units, out, os, s, first); break;
    case 2: tile_rows<2, FETCH>(panel, stride, rows, n, n_units, out, os, s, first); break;
    default: tile_rows<1, FETCH>(panel, stride, rows, n, n_units, out, os, s, first);
  }
}

// out[r][lane] for a panel of `lanes` (a multiple of VL) and n rows; a group of rows stays cached while the panel's blocks pass.
// `s`: the rows as they lie in memory, where they do.
static void lanes_product(const unit* panel, i64 lanes, const element* const* rows, i64 n, i64 n_units, float* out, i64 os, const Stream& s = {}) {
  constexpr i64 GROUP = 24;
  for (i64 r = 0; r < n; r += GROUP) {
    i64 nr = std::min(GROUP, n - r);
    for (i64 l = 0; l < lanes; l += WIDE) {
      const unit* p = panel + l * n_units;
      i64 w = block_lanes(lanes, l);
      float* o = out + r * os + l;
      if (s.base && !l) tile_block<ROWS_AHEAD>(p, w, w / VL, rows + r, nr, n_units, o, os, s, r);
      else tile_block<NOTHING>(p, w, w / VL, rows + r, nr, n_units, o, os, s, r);
    }
  }
}

// ---- the panel holds weights -----------------------------------------------------------------------------------------

constexpr i64 COLS = 32;                     // weight rows (output columns) of a packed panel
constexpr int PACKED_MV = COLS / VL, PACKED_ROWS = ACC / PACKED_MV > 0 ? ACC / PACKED_MV : 1;
constexpr i64 ROWS = 128;                    // most rows of one task
constexpr i64 FEW_ROWS = 6;                  // up to here the hardware keeps up with a linear stream by itself
#if defined(PAIRS) || defined(STORAGE_F32)
typedef unit packed;
#else
typedef stored packed;                       // widened as it is read
#endif

template <int NR>
static void packed_rows(const packed* panel, const element* const* rows, i64 n_units, float* out, i64 os, bool more, bool first) {
  constexpr int U = NR * PACKED_MV >= 8 ? 1 : NR * PACKED_MV >= 4 ? 2 : 4;
  if (first && NR > FEW_ROWS) tile<PACKED_MV, NR, U, PANEL_AHEAD>(panel, COLS, rows, n_units, out, os, more, nullptr, 0);
  else tile<PACKED_MV, NR, U, NOTHING>(panel, COLS, rows, n_units, out, os, more, nullptr, 0);
}

template <int... NR>
static inline void packed_rows_of(
    i64 n, const packed* panel, const element* const* rows, i64 n_units, float* out, i64 os, bool more, bool first,
    std::integer_sequence<int, NR...>) {
  typedef void (*Kernel)(const packed*, const element* const*, i64, float*, i64, bool, bool);
  static constexpr Kernel kernels[] = {packed_rows<NR + 1>...};
  kernels[n - 1](panel, rows, n_units, out, os, more, first);
}

// out[r][0 .. COLS) = Σ_k rows[r][k] panel[k][.] for up to ROWS rows, in groups of nearly equal size. Depth goes in blocks, so that the
// rows' and the panel's part of one fit the second-level cache together.
static void packed_product(const packed* panel, const element* const* rows, i64 n, i64 n_units, float* out, i64 os) {
  constexpr i64 DEEP = 1024;
  const i64 groups = (n + PACKED_ROWS - 1) / PACKED_ROWS;
  const element* part[ROWS];
  for (i64 k = 0; k < n_units; k += DEEP) {
    i64 nu = std::min(DEEP, n_units - k);
    for (i64 r = 0; r < n; r++) part[r] = rows[r] + k * PER;
    for (i64 g = 0, done = 0; g < groups; g++) {
      i64 take = (n - done + groups - g - 1) / (groups - g);
      packed_rows_of(
          take, panel + k * COLS, part + done, nu, out + done * os, os, k > 0, g == 0, std::make_integer_sequence<int, PACKED_ROWS>());
      done += take;
    }
  }
}
