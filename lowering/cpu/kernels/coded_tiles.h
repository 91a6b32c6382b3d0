// As panels of coded_panel.h, in tiles: the sums of the numbers that share a scale are one pass of tiles, and are scaled and added as vectors.
#pragma once
#include "coded_dots.h"

#if defined(PAIRS)
// Scales and zero points of rows of codes as floats, what they meet, and Σ x of each lane of the panel for the numbers that share them.
struct PanelRows {
  const element* w[MAX_BLOCK];
  const float *scales[MAX_BLOCK], *zeros[MAX_BLOCK], *sums;
  i64 span, count, lanes;  // units that share a scale, units in all, lanes that `sums` are apart
};
#endif

#if defined(TILES)
// out[i][0 .. MB tiles) of rows first .. first + MA tiles of n, evenly spaced; where fewer than a tile has are left, those before them (or
// what lies behind them) fill it.
template <int MA, int MB, bool ZERO>
static void scaled_tiles(const char* b, i64 bs, const PanelRows& rows, i64 first, i64 n, i64 lane, float* out, i64 os) {
  alignas(64) float sums[MA * TILE * MB * TILE];
  const i64 last = std::max<i64>(n - TILE, 0), begins[2] = {std::min(first, last), std::min(first + TILE, last)};
  const i64 stride = n > 1 ? (rows.w[1] - rows.w[0]) * i64(sizeof(element)) : 0;
  float* const to[2] = {sums, sums + (MA - 1) * TILE * MB * TILE};
  for (i64 k = 0, g = 0; k < rows.count; k += rows.span, g++) {
    const TileRows a{reinterpret_cast<const char*>(rows.w[begins[0]] + k * PER), reinterpret_cast<const char*>(rows.w[begins[1]] + k * PER), stride};
    tile_sums<MA, MB>(a, b + k * bs, bs, std::min(rows.span, rows.count - k), to, MB * TILE, Lines{});
    for (i64 i = first; i < std::min(n, first + MA * TILE); i++) {
      const i64 second = i >= first + TILE;
      const float* part = to[second] + (i - begins[second]) * MB * TILE;
      each<MB>(EACH_OF(j) {
        vf v = *(const vf_any*)(part + j * TILE);
        vf_any* sum = (vf_any*)(out + i * os + j * TILE);
        if (ZERO) v -= *(const vf_any*)(rows.sums + g * rows.lanes + lane + j * TILE) * rows.zeros[i][g];
        *sum = g ? *sum + v * rows.scales[i][g] : v * rows.scales[i][g];
      });
    }
  }
}

// As `lanes_product`, where tiles are on.
template <bool ZERO>
static void scaled_tile_product(const unit* panel, i64 lanes, const PanelRows& rows, i64 n, float* out, i64 os) {
  typedef void (*Tiled)(const char*, i64, const PanelRows&, i64, i64, i64, float*, i64);
  static constexpr Tiled sizes[2][2] = {{scaled_tiles<1, 1, ZERO>, scaled_tiles<1, 2, ZERO>}, {scaled_tiles<2, 1, ZERO>, scaled_tiles<2, 2, ZERO>}};
  for (i64 l = 0; l < lanes; l += 2 * TILE) {
    const i64 block = l / WIDE * WIDE, w = block_lanes(lanes, block);
    const char* b = reinterpret_cast<const char*>(panel + block * rows.count + (l - block));
    for (i64 r = 0; r < n; r += 2 * TILE) sizes[r + TILE < n][lanes - l > TILE](b, w * i64(sizeof(unit)), rows, r, n, l, out + l, os);
  }
}
#else
template <bool ZERO, class Rows>
static void scaled_tile_product(const unit*, i64, const Rows&, i64, float*, i64) {}
#endif
