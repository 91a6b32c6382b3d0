// Codes against panels of many rows of x: what a few rows of codes stand for lies in the first-level cache as pairs of bf16, each looked up
// once and not rounded, and is broadcast along the panel. Scales go to the sums of the numbers that share one, and so do zero points, as
// z Σ x. Without pairs, decoding goes through floats, which scales cost little more (coded.h).
#pragma once
#include "coded_tiles.h"

#if defined(PAIRS)
// Row i of a matrix as elements in its order, unscaled; room for a whole chunk behind it is written to.
template <class C>
static void plain_row(const C& chunk, const CodedMatrix& m, i64 i, element* to) {
  const uint8_t* p = m.base + i * m.stride;
  auto one = [&](const uint8_t* from, element* into) __attribute__((always_inline)) {
    vu v[C::VECTORS];
    chunk.in_order(from, v);
    each<C::VECTORS>(EACH_OF(j) { _mm512_storeu_si512(into + j * STEP, v[j]); });
  };
  i64 k = 0;
  for (; k + C::CODES <= m.k; k += C::CODES, p += C::BYTES) one(p, to + k);
  if (k == m.k) return;
  alignas(64) uint8_t rest[C::BYTES] = {};
  memcpy(rest, p, size_t(((m.k - k) * C::BYTES + C::CODES - 1) / C::CODES));
  one(rest, to + k);
  if (m.k % PER) to[m.k] = element(0);
}

// out[r][lane] = Σ over the row of s (c - z) x, for NR rows from `first` on and MV vectors of lanes.
template <int MV, int NR, bool ZERO>
static inline void panel_tile(const unit* panel, i64 stride, const PanelRows& rows, i64 first, i64 lane, float* out, i64 os) {
  vf acc[NR * MV];
  const unit_any* row[NR];
  each<NR>(EACH_OF(r) { row[r] = (const unit_any*)rows.w[first + r]; });
  each<NR * MV>(EACH_OF(j) { acc[j] = vf{}; });
  for (i64 k = 0, g = 0; k < rows.count; g++) {
    vf part[NR * MV];
    each<NR * MV>(EACH_OF(j) { part[j] = vf{}; });
    for (const i64 end = std::min(rows.count, k + rows.span); k < end; k++) {
      vu p[MV];
      each<MV>(EACH_OF(v) { p[v] = in_register(load_panel(panel + k * stride + v * VL)); });
      each<NR>(EACH_OF(r) {
        const vu b = MV > 1 ? in_register(spread(row[r] + k)) : spread(row[r] + k);
        each<MV>(EACH_OF(v) { part[r * MV + v] = madd(part[r * MV + v], p[v], b); });
      });
    }
    each<NR * MV>(EACH_OF(j) {
      if (ZERO) part[j] -= *(const vf_any*)(rows.sums + g * rows.lanes + lane + j % MV * VL) * rows.zeros[first + j / MV][g];
      acc[j] += part[j] * rows.scales[first + j / MV][g];
    });
  }
  each<NR * MV>(EACH_OF(j) { *(vf_any*)(out + j / MV * os + j % MV * VL) = acc[j]; });
}

template <int MV, bool ZERO>
static void panel_rows_of(const unit* panel, const PanelRows& rows, i64 n, i64 lane, float* out, i64 os) {
  constexpr int NR = MV == 1 ? 8 : MV == 2 ? 4 : ACC / 2 / MV;  // sums of a group and of all groups, in registers
  i64 r = 0;
  for (; r + NR <= n; r += NR) panel_tile<MV, NR, ZERO>(panel, MV * VL, rows, r, lane, out + r * os, os);
  for (; r < n; r++) panel_tile<MV, 1, ZERO>(panel, MV * VL, rows, r, lane, out + r * os, os);
}

// As `lanes_product`.
template <bool ZERO>
static void panel_product(const unit* panel, i64 lanes, const PanelRows& rows, i64 n, float* out, i64 os) {
  if (tiles_on) return scaled_tile_product<ZERO>(panel, lanes, rows, n, out, os);
  typedef void (*Rows)(const unit*, const PanelRows&, i64, i64, float*, i64);
  static constexpr Rows widths[] = {panel_rows_of<1, ZERO>, panel_rows_of<2, ZERO>, panel_rows_of<3, ZERO>, panel_rows_of<4, ZERO>};
  for (i64 l = 0; l < lanes; l += WIDE) widths[block_lanes(lanes, l) / VL - 1](panel + l * rows.count, rows, n, l, out + l, os);
}

// sums[g][lane] = Σ x over the units that share scale g.
static void panel_sums(const unit* panel, const PanelRows& rows, float* sums) {
  for (i64 l = 0; l < rows.lanes; l += VL) {
    const i64 block = l / WIDE * WIDE, w = block_lanes(rows.lanes, block);
    const unit* from = panel + block * rows.count + (l - block);
    for (i64 k = 0, g = 0; k < rows.count; g++) {
      vf sum = vf{};
      for (const i64 end = std::min(rows.count, k + rows.span); k < end; k++) sum = madd(sum, load_units(from + k * w), ones());
      *(vf_any*)(sums + g * rows.lanes + l) = sum;
    }
  }
}

// out[i][lane] for rows n .. n + nb of a matrix and a panel; false where scales do not fit pairs, or are too many for the scratch.
template <i64 KIND, bool ZERO>
static bool coded_panel(const unit* panel, i64 lanes, const CodedMatrix& m, i64 n, i64 nb, Scratch& s, float* out, i64 os) {
  typedef Chunk<KIND> C;
  const i64 span = m.c.columns && m.c.columns < m.k ? m.c.columns : up_to(m.k, PER), groups = (m.k + span - 1) / span, room = groups + VL;
  const i64 depth = up_to(m.k, C::CODES) + STEP;
  const i64 most = tiles_on ? MAX_BLOCK : nb;  // sums of tiles have bits of their own: no matter how columns are cut for threads
  if (span % PER || (2 * most * room + groups * lanes) > WIDE * m.k || most * depth > ROWS * m.k) return false;
  const C chunk(m.c);
  float *sums = reinterpret_cast<float*>(s.w_panel), *scales = sums + groups * lanes, *zeros = scales + nb * room;
  PanelRows rows;
  rows.sums = sums, rows.span = span / PER, rows.count = units(m.k), rows.lanes = lanes;
  for (i64 i = 0, until = 0; i < nb; i++) {
    rows.w[i] = s.w_rows + i * depth;
    plain_row(chunk, m, n + i, s.w_rows + i * depth);
    if (i && n + i < until) {
      rows.scales[i] = rows.scales[i - 1], rows.zeros[i] = rows.zeros[i - 1];
      continue;
    }
    const i64 at = m.place(n + i);
    until = m.end_of_block(n + i), rows.scales[i] = scales + i * room, rows.zeros[i] = zeros + i * room;
    if (m.c.scale_kind) numbers(m.scales, at, m.c.scale_k, groups, m.c.scale_kind, 1, scales + i * room);
    else std::fill(scales + i * room, scales + (i + 1) * room, 1.f);
    if (ZERO) numbers(m.zeros, at, m.c.scale_k, groups, m.c.zero_kind, 1, zeros + i * room);
  }
  if (ZERO && s.summed != panel) panel_sums(panel, rows, sums), s.summed = panel;  // once for all rows of an expert
  panel_product<ZERO>(panel, lanes, rows, nb, out, os);
  return true;
}

// As `coded_panel` for a matrix's own kind.
static bool many_rows(const unit* panel, i64 lanes, const CodedMatrix& m, i64 n, i64 nb, Scratch& s, float* out, i64 os) {
  typedef bool (*Panel)(const unit*, i64, const CodedMatrix&, i64, i64, Scratch&, float*, i64);
  static constexpr Panel kinds[][2] = {
      {coded_panel<HALVES, false>, coded_panel<HALVES, true>}, {coded_panel<INT8, false>, nullptr},
      {coded_panel<E4M3, false>, nullptr}, {coded_panel<BYTES, false>, coded_panel<BYTES, true>}};
  return kinds[m.c.kind][m.c.zero_kind != 0](panel, lanes, m, n, nb, s, out, os);
}
#else
static bool many_rows(const unit*, i64, const CodedMatrix&, i64, i64, Scratch&, float*, i64) { return false; }
#endif
