// Moving operands: transposes, panels over rows of tokens, weight rows and columns.
#pragma once
#include "tile.h"

constexpr i64 SIDE = 16;  // edge of a transposed square

// to[j][i] = rows[i][j] for one SIDE x SIDE square of 32-bit values; null rows read as zero.
static inline void transpose(const uint32_t* const* rows, i64 at, uint32_t* to, i64 to_stride) {
#if defined(WIDE_VECTORS)
  typedef uint32_t vi __attribute__((vector_size(64)));
  typedef uint32_t vi_any __attribute__((vector_size(64), aligned(2), may_alias));
  vi a[SIDE], b[SIDE];
  for (i64 i = 0; i < SIDE; i++) a[i] = rows[i] ? *(const vi_any*)(rows[i] + at) : vi{};
#define INTERLEAVE(from, into)                                                                                              \
  for (i64 i = 0; i < 8; i++) {                                                                                             \
    into[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);      \
    into[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); \
  }
  INTERLEAVE(a, b) INTERLEAVE(b, a) INTERLEAVE(a, b) INTERLEAVE(b, a)
#undef INTERLEAVE
  for (i64 j = 0; j < SIDE; j++) *(vi_any*)(to + j * to_stride) = a[j];
#else
  for (i64 j = 0; j < SIDE; j++)
    for (i64 i = 0; i < SIDE; i++) to[j * to_stride + i] = rows[i] ? rows[i][at + j] : 0;
#endif
}

// out[i][0 .. nc) for the nr rows of the transpose of a block in[nc][nr] (row stride `stride`), handed to `put` in pieces of
// at most SIDE columns: put(row, first column, columns, floats).
template <class Put>
static inline void each_transposed(const float* in, i64 stride, i64 nc, i64 nr, Put put) {
  alignas(64) float square[SIDE * SIDE];
  for (i64 c = 0; c < nc; c += SIDE)
    for (i64 r = 0; r < nr; r += SIDE) {
      i64 cols = std::min(SIDE, nc - c), rows = std::min(SIDE, nr - r);
      if (stride >= r + SIDE) {
        const uint32_t* from[SIDE];
        for (i64 i = 0; i < SIDE; i++) from[i] = i < cols ? reinterpret_cast<const uint32_t*>(in + (c + i) * stride + r) : nullptr;
        transpose(from, 0, reinterpret_cast<uint32_t*>(square), SIDE);
      } else {
        for (i64 i = 0; i < rows; i++)
          for (i64 j = 0; j < cols; j++) square[i * SIDE + j] = in[(c + j) * stride + r + i];
      }
      for (i64 i = 0; i < rows; i++) put(r + i, c, cols, square + i * SIDE);
    }
}

// One matrix as stored: element (n, k) at base + n * sn + k * sk.
struct Matrix {
  const stored* base;
  i64 sn, sk, n, k;
  const stored* operator()(i64 i, i64 j) const { return base + i * sn + j * sk; }
  bool rows_direct() const { return DIRECT && sk == 1; }
  Matrix transposed() const { return {base, sk, sn, k, n}; }
};

// A panel from rows of whole units: [block of WIDE lanes][k][lane]; lanes past the rows are zero.
static void pack_panel(unit* panel, const element* const* from, i64 rows, i64 lanes, i64 depth) {
  i64 nu = units(depth);
  for (i64 l = 0; l < lanes; l += SIDE) {
    const uint32_t* row[SIDE];
    for (i64 i = 0; i < SIDE; i++) row[i] = l + i < rows ? reinterpret_cast<const uint32_t*>(from[l + i]) : nullptr;
    i64 first = l / WIDE * WIDE, w = block_lanes(lanes, first), side = std::min(SIDE, lanes - l);
    uint32_t* to = reinterpret_cast<uint32_t*>(panel + first * nu + (l - first));
    i64 k = 0;
    if (side == SIDE && w - (l - first) >= SIDE)
      for (; k + SIDE <= nu; k += SIDE) transpose(row, k, to + k * w, w);
    for (; k < nu; k++)
      for (i64 i = 0; i < side; i++) {
        uint32_t v = 0;
        if (row[i]) memcpy(&v, row[i] + k, 4);
        to[k * w + i] = v;
      }
  }
}

// n stored elements as elements, zeros up to `depth`.
static inline void elements(const stored* from, i64 n, i64 depth, element* to) {
  if constexpr (DIRECT) {
    memcpy(to, from, size_t(n) * sizeof(element));
  } else {
    i64 j = 0;
#if !defined(PAIRS)
    for (; j + VL <= n; j += VL) *(vf_any*)(to + j) = load_stored(from + j);
#endif
    for (; j < n; j++) to[j] = to_element(load(from[j]));
  }
  for (i64 j = n; j < depth; j++) to[j] = element(0);
}

// Rows n0 .. n0 + nb of a matrix with whole units, copied into `scratch` where they cannot be used as they lie (fewer than a tile has
// are no tile there); tells whether they can.
static bool weight_rows(const Matrix& m, i64 n0, i64 nb, const element** rows, element* scratch) {
  if (m.rows_direct() && m.k % PER == 0 && !(tiles_on && nb < TILE)) {
    for (i64 r = 0; r < nb; r++) rows[r] = reinterpret_cast<const element*>(m(n0 + r, 0));
    return true;
  }
  i64 depth = units(m.k) * PER;
  for (i64 r = 0; r < nb; r++) {
    element* to = scratch + r * depth;
    rows[r] = to;
    if (m.sk == 1) {
      elements(m(n0 + r, 0), m.k, depth, to);
      continue;
    }
    for (i64 j = 0; j < depth; j++) to[j] = j < m.k ? to_element(load(*m(n0 + r, j))) : element(0);
  }
  return false;
}

// Columns n0 .. n0 + w of a matrix (contiguous along n where it matters) as one panel block; returns the panel's stride.
static i64 weight_panel(const Matrix& m, i64 n0, i64 w, [[maybe_unused]] bool reuse, const unit** panel, unit* scratch) {
  i64 lanes = up_to(w, VL);
  const bool whole = m.sn == 1 && lanes == w;
  *panel = scratch;
#if defined(STORAGE_F32)
  if (whole && !reuse) {
    *panel = m(n0, 0);
    return m.sk;
  }
#endif
  for (i64 u = 0; u < units(m.k); u++) {
#if defined(PAIRS)
    if (whole && u * 2 + 1 < m.k) {
      const stored *even = m(n0, u * 2), *odd = m(n0, u * 2 + 1);
      for (i64 l = 0; l < w; l++) scratch[u * lanes + l] = uint32_t(even[l]) | uint32_t(odd[l]) << 16;
      continue;
    }
#else
    if (whole) {
      for (i64 l = 0; l < w; l += VL) *(vf_any*)(scratch + u * lanes + l) = load_stored(m(n0 + l, u));
      continue;
    }
#endif
    element_any* to = reinterpret_cast<element_any*>(scratch + u * lanes);
    for (int h = 0; h < PER; h++) {
      i64 k = u * PER + h;
      for (i64 l = 0; l < w; l++) to[l * PER + h] = k < m.k ? to_element(load(*m(n0 + l, k))) : element(0);
      for (i64 l = w; l < lanes; l++) to[l * PER + h] = element(0);
    }
  }
  return lanes;
}

// out[r][0 .. n) (row stride os, room for whole vectors) = Σ_k rows[r][k] * m(n0 + ., k), vectors along n. `readable`: for tiles, rows that
// may be read; 0 for none.
static void columns_product(
    const element* const* rows, i64 n_rows, const Matrix& m, i64 n0, i64 n, unit* scratch, float* out, i64 os, i64 readable = 0) {
  for (i64 l = 0; l < n; l += WIDE) {
    i64 w = std::min<i64>(WIDE, n - l);
    const unit* panel;
    i64 stride = weight_panel(m, n0 + l, w, n_rows > 32, &panel, scratch);
    if (readable && tile_product(panel, stride, up_to(w, VL), Spaced{rows, n_rows, readable}, units(m.k), out + l, os, Stream{}, false)) continue;
    tile_block(panel, stride, up_to(w, VL) / VL, rows, n_rows, units(m.k), out + l, os, Stream{}, 0);
  }
}

// out[r][0 .. nb) = Σ_k rows[r][k] * m(n + ., k) with vectors along k, where the matrix has its rows in one piece.
static void row_dots(const Matrix& m, i64 n, i64 nb, const element* const* rows, i64 n_rows, const stored* next, float* out, i64 os) {
  dots(rows, n_rows, Stream{m(n, 0), m.sn, nb, next}, m.k, nullptr, out, os, true);
}
