// Products for many rows: vectors run along a panel [k][lane], the other operand's rows are broadcast, sums stay in registers.
//
// Either operand may be the panel. Weights as the model holds them are the rows, and tokens are packed into panels (move.h); weights
// packed ahead (pack.h) are the panels, and tokens the rows, any number of them.
#pragma once
#include "dots.h"

enum Fetch { NOTHING, ROWS_AHEAD, PANEL_AHEAD, PACED };

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
// PANEL_AHEAD: what comes in the panel AHEAD bytes later; PACED: what is at `ahead`, `as` bytes on with every k.
template <int MV, int NR, int U, Fetch FETCH, bool ADDED, class P>
static inline void tile(
    const P* panel, i64 stride, const element* const* rows, i64 n_units, const Out& out, bool more, const void* ahead, i64 as) {
  vf acc[U * NR * MV];
  const unit_any* row[NR];
  each<NR>(EACH_OF(r) {
    row[r] = (const unit_any*)rows[r];
    each<MV>(EACH_OF(v) {
      each<U>(EACH_OF(u) { acc[(u * NR + r) * MV + v] = vf{}; });
      if (!ADDED && more) acc[r * MV + v] = *(const vf_any*)(out.template row<ADDED>(r) + v * VL);
      if (ADDED && v * VL % 16 == 0) __builtin_prefetch(out.template row<ADDED>(r) + v * VL, 1, 3);
    });
  });
  auto step = [&](i64 k, auto u) __attribute__((always_inline)) {
    vu p[MV];
    each<MV>(EACH_OF(v) { p[v] = in_register(load_panel(panel + k * stride + v * VL)); });
    if (FETCH == PANEL_AHEAD)
      each<MV * VL * sizeof(P) / 64>(EACH_OF(l) { __builtin_prefetch((const char*)(panel + k * stride) + AHEAD + l * 64, 0, 2); });
    if (FETCH == PACED) __builtin_prefetch((const char*)ahead + k * as, 0, 2);
    each<NR>(EACH_OF(r) {
      vu b = spread(row[r] + k);
      each<MV>(EACH_OF(v) { acc[(u * NR + r) * MV + v] = madd(acc[(u * NR + r) * MV + v], p[v], b); });
    });
  };
  i64 k = 0;
  if constexpr (FETCH == ROWS_AHEAD)
    for (; k + LINE <= n_units; k += LINE) {
      each<NR>(EACH_OF(r) { __builtin_prefetch((const stored*)ahead + r * as + k * PER, 0, 2); });
      for (i64 i = 0; i < LINE; i += U) each<U>(EACH_OF(u) { step(k + i + u, u); });
    }
  for (; k + U <= n_units; k += U) each<U>(EACH_OF(u) { step(k + u, u); });
  if constexpr (U > 1)
    for (; k < n_units; k++) step(k, std::integral_constant<int, 0>{});
  each<NR>(EACH_OF(r) {
    float* to = out.template row<ADDED>(r);
    const float weight = ADDED ? out.weights[r] : 1.f;
    each<MV>(EACH_OF(v) {
      vf s = acc[r * MV + v];
      each<U - 1>(EACH_OF(u) { s += acc[((u + 1) * NR + r) * MV + v]; });
      if (ADDED) s = *(const vf_any*)(to + v * VL) + s * (weight - vf{});
      *(vf_any*)(to + v * VL) = s;
    });
  });
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
    tile<MV, NR, 1, FETCH, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, FETCH ? s.at(first + r, far) : nullptr, s.stride);
  if constexpr (NR > 4)
    for (; r + 4 <= n; r += 4) tile<MV, 4, 1, NOTHING, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, nullptr, 0);
  if constexpr (NR > 2)
    for (; r + 2 <= n; r += 2) tile<MV, 2, 1, NOTHING, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, nullptr, 0);
  for (; r < n; r++) tile<MV, 1, 1, NOTHING, false>(panel, stride, rows + r, n_units, Out{out + r * os, os}, false, nullptr, 0);
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
constexpr int PACKED_MV = COLS / VL, PACKED_ROWS = ACC / PACKED_MV < 10 ? ACC / PACKED_MV : 10;
constexpr i64 FEW_ROWS = 6;                  // up to here the hardware keeps up with a linear stream by itself
#if defined(PAIRS) || defined(STORAGE_F32)
typedef unit packed;
#else
typedef stored packed;                       // widened as it is read
#endif

// How a pass over a panel asks for what comes next: nothing, AHEAD bytes in the same panel, or `pace` bytes a step from `next` on.
struct Next {
  const packed* next;
  i64 pace;
  bool same;
};

template <int NR, bool ADDED>
static void packed_rows(const packed* panel, const element* const* rows, i64 n_units, const Out& out, bool more, const Next& to) {
  constexpr int U = NR * PACKED_MV >= 8 ? 1 : NR * PACKED_MV >= 4 ? 2 : 4;
  if (NR > FEW_ROWS && to.same) tile<PACKED_MV, NR, U, PANEL_AHEAD, ADDED>(panel, COLS, rows, n_units, out, more, nullptr, 0);
  else if (NR > FEW_ROWS / 2 && to.next) tile<PACKED_MV, NR, U, PACED, ADDED>(panel, COLS, rows, n_units, out, more, to.next, to.pace);
  else tile<PACKED_MV, NR, U, NOTHING, ADDED>(panel, COLS, rows, n_units, out, more, nullptr, 0);
}

template <bool ADDED, int... NR>
static inline void packed_rows_of(
    i64 n, const packed* panel, const element* const* rows, i64 n_units, const Out& out, bool more, const Next& to,
    std::integer_sequence<int, NR...>) {
  typedef void (*Kernel)(const packed*, const element* const*, i64, const Out&, bool, const Next&);
  static constexpr Kernel kernels[] = {packed_rows<NR + 1, ADDED>...};
  kernels[n - 1](panel, rows, n_units, out, more, to);
}

// out[r] [COLS] = Σ_k rows[r][k] panel[k][.] for up to ROWS rows, in groups of nearly equal size. Depth goes in blocks, so that the
// rows' and the panel's part of one fit the second-level cache together. While several groups pass over a block, the one behind it (at the
// end, what `last` says does) is brought in little by little.
template <bool ADDED>
static void packed_product(const packed* panel, const element* const* rows, i64 n, i64 n_units, bool last, const Out& out) {
  constexpr i64 DEEP = 1024;
  const i64 groups = (n + PACKED_ROWS - 1) / PACKED_ROWS;
  const element* part[ROWS];
  for (i64 k = 0; k < n_units; k += DEEP) {
    const i64 nu = std::min(DEEP, n_units - k), pass = nu * COLS / groups;
    const bool ends = k + DEEP >= n_units;
    for (i64 r = 0; r < n; r++) part[r] = rows[r] + k * PER;
    for (i64 g = 0, done = 0; g < groups; g++) {
      const packed *at = panel + k * COLS, *next = at + nu * COLS + g * pass;
      const Next to{groups > 1 && !(last && ends) ? next : nullptr, COLS * i64(sizeof(packed)) / groups + 1, groups == 1};
      i64 take = (n - done + groups - g - 1) / (groups - g);
      packed_rows_of<ADDED>(take, at, part + done, nu, out.from(done), k > 0, to, std::make_integer_sequence<int, PACKED_ROWS>());
      done += take;
    }
  }
}
