// The phases on weights in few bits. A few rows of x meet codes in registers (coded_dots.h); for panels of many a few rows of weights at a
// time become bf16 (coded_panel.h) or floats in the first-level cache, and are multiplied there by all tokens of their expert. No more of a
// matrix is ever floats; memory is read once, as codes.
#pragma once
#include "coded_panel.h"

struct CodedForward : Phases<CodedForward> {
  const CodedArgs& coded;
  uint16_t up_order[128] = {}, down_order[128] = {};
  explicit CodedForward(const CodedArgs& args) : Phases(args.args, row_by_row()), coded(args) {
    tiles = tiles_allowed();
    order_of(args.up, up_order), order_of(args.down, down_order);
  }

  // More rows of x than go in one turn would have codes looked up twice: a panel, padded, takes less.
#if defined(PAIRS)
  static constexpr RowByRow ROW_BY_ROW{CODED_ROWS, CODED_ROWS};
#else
  static constexpr RowByRow ROW_BY_ROW{};
#endif
  static RowByRow row_by_row() { return tiles_allowed() ? RowByRow{tiles_from - 1, 0} : ROW_BY_ROW; }
  static constexpr i64 TOGETHER = 2 * DOT_SET;  // rows that are floats at a time

  CodedMatrix matrix(
      const Coding& c, const uint16_t* order, const void* const* bases, i64 expert_stride, i64 scale_expert, i64 stride, i64 half, i64 e, i64 k) const {
    auto of = [&](const void* const* list, i64 bytes) -> const void* {
      if (!list) return nullptr;
      return expert_stride ? static_cast<const uint8_t*>(list[half]) + e * bytes : list[half * a.experts + e];
    };
    auto width = [](i64 kind) { return kind == FLOAT32 ? 4 : kind >= EXPONENT ? 1 : 2; };
    return {c, static_cast<const uint8_t*>(of(bases, expert_stride)), of(c.scales, scale_expert * width(c.scale_kind)),
            of(c.zeros, scale_expert * width(c.zero_kind)), stride, half ? c.second : 0, k, order};
  }
  CodedMatrix up(i64 half, i64 e) const { return matrix(coded.up, up_order, a.up, a.up_expert, coded.up.scale_expert, a.up_n, half, e, a.hidden); }
  CodedMatrix down(i64 e) const { return matrix(coded.down, down_order, a.down, a.down_expert, coded.down.scale_expert, a.down_n, 0, e, a.inter); }

  // As `Forward::product`. Rows that floats are made of for `dots` are stored ones: what is stored is what an element is made of.
  static void product(
      const Strip& p, const CodedMatrix& m, i64 n, i64 nb, const unit* panel, const element** rows, bool, const stored*, Scratch& s,
      float* out, i64 os) {
    const i64 depth = units(m.k) * PER;
    if (p.lanes) {
      if (many_rows(panel, p.lanes, m, n, nb, s, out, os)) return;
      const element* w[MAX_BLOCK];
      decode_rows(m, n, nb, s.w_rows, depth);
      for (i64 r = 0; r < nb; r++) w[r] = s.w_rows + r * depth;
      lanes_product(panel, p.lanes, w, nb, units(m.k), out, os, Stream{}, ROWS);
      return;
    }
    if (few_rows(m, n, nb, rows, p.rows, s, out, os)) return;
    stored* narrow = reinterpret_cast<stored*>(s.w_rows);
    for (i64 i = 0; i < nb; i += TOGETHER) {
      const i64 some = std::min(TOGETHER, nb - i);
      if constexpr (DIRECT) {
        decode_rows(m, n + i, some, s.w_rows, depth);
      } else {
        element* wide = s.w_rows + TOGETHER * depth;
        decode_rows(m, n + i, some, wide, depth);
        store_row(reinterpret_cast<const float*>(wide), some * depth, narrow);
      }
      dots(rows, p.rows, Stream{narrow, depth, some, nullptr}, m.k, nullptr, out + i, os, false);
    }
  }
};
