// The phases on weights as the model holds them: rows of weights in one piece go row by row against a few tokens, and are the rows that are
// broadcast against a panel of many; of columns in one piece panels are made (move.h).
#pragma once
#include "problem.h"

constexpr i64 UP_BLOCK = 24, DOWN_BLOCK = 48, ROW_BLOCK = 64;  // output columns worked on at a time

// `Of` says where weights are (`up`, `down`) and how rows are multiplied by a block of them (`product`).
template <class Of>
struct Phases : Problem {
  // Panels of tokens want weight rows in one piece in both products.
  explicit Phases(const Args& args, RowByRow most = {}) : Problem(args, args.up_k == 1 && args.down_k == 1, most) {}
  const Of& of() const { return static_cast<const Of&>(*this); }

  // Pre-activations and activations of columns n0 .. n1.
  void up_phase(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    const element* rows[ROWS];
    for (int i = 0; i < t.n_strips; i++) {
      const Strip& p = t.strips[i];
      i64 at = p.first - t.first;
      input_rows(p, rows + at, s.x_rows + at * row_stride(a.hidden));
      if (p.lanes) pack_panel(s.x_panel, rows + at, p.rows, p.lanes, a.hidden), s.summed = nullptr;
    }
    i64 step = t.panel() ? panel_block(UP_BLOCK) : row_block(t.rows);
    for (i64 n = n0; n < n1; n += step)
      for (int i = 0; i < t.n_strips; i++) up_block(t, t.strips[i], n, std::min(step, n1 - n), n + step < n1, rows, s);
  }

  void up_block(const Task& t, const Strip& p, i64 n, i64 nb, bool more, const element** rows, Scratch& s) const {
    i64 os = p.lanes ? p.lanes : up_to(nb, VL);
    for (i64 half = 0; half < a.halves; half++) {
      float* out = half ? s.u : s.g;
      bool last = half + 1 == a.halves;
      const stored* next = !last ? of().up(half + 1, t.expert)(n, 0) : more ? of().up(0, t.expert)(n + nb, 0) : nullptr;
      Of::product(p, of().up(half, t.expert), n, nb, s.x_panel, rows + (p.first - t.first), &p == t.strips, next, s, out, os);
      add_bias(up_bias(half, t.expert), a.up_bias_n, n, nb, out, os, p);
    }
    if (a.pre) save_pre(p, n, nb, os, s);
    activate((p.lanes ? nb : p.rows) * os, s);
    p.lanes ? put_panel(p, n, nb, os, s.a) : put_rows(p, n, nb, os, s.a);
  }

  void save_pre(const Strip& p, i64 n, i64 nb, i64 os, const Scratch& s) const {
    for (i64 half = 0; half < a.halves; half++) {
      const float* from = half ? s.u : s.g;
      stored* to = static_cast<stored*>(a.pre) + p.first * a.halves * a.inter + half * a.inter + n;
      auto put = [&](i64 r, i64 c, i64 cols, const float* v) { store_row(v, cols, to + r * a.halves * a.inter + c); };
      if (p.lanes) each_transposed(from, os, nb, p.rows, put);
      else for (i64 r = 0; r < p.rows; r++) put(r, 0, nb, from + r * os);
    }
  }

  // Activations into a strip's panel.
  void put_panel(const Strip& p, i64 n, i64 nb, i64 os, const float* from) const {
    const bool last = n + nb == a.inter && a.inter % PER;
    unit* panel = reinterpret_cast<unit*>(act + p.a_at);
    i64 nu = units(a.inter);
    for (i64 first = 0; first < p.lanes; first += WIDE) {
      i64 w = block_lanes(p.lanes, first);
#if defined(PAIRS)
      if (nb % 2 == 0) {
        for (i64 j = 0; j < nb; j += 2) {
          const float *even = from + j * os + first, *odd = even + os;
          put_pairs(even, odd, w, panel + first * nu + (n + j) / 2 * w);
        }
        continue;
      }
#endif
      for (i64 j = 0; j < nb + last; j++) {
        element_any* to = reinterpret_cast<element_any*>(panel + first * nu + (n + j) / PER * w) + (n + j) % PER;
        for (i64 l = 0; l < w; l++) to[l * PER] = j == nb ? element(0) : to_element(from[j * os + first + l]);
      }
    }
  }

  static i64 panel_block(i64 of_vectors) { return tiles_on ? MAX_BLOCK : of_vectors; }

  // Output columns that few rows are multiplied by at a time: the longer a stream, the better, as far as scratch goes.
  static i64 row_block(i64 rows) { return std::max(ROW_BLOCK, MAX_BLOCK * ROWS / std::max<i64>(rows, 1) / ROW_BLOCK * ROW_BLOCK); }

  // Weighted outputs of columns n0 .. n1, added to `sums` [tokens, n1 - n0 and up to whole panels]; `then`: the next task, if any.
  void down_phase(const Task& t, const Task* then, i64 n0, i64 n1, float* sums, i64 width, Scratch& s) const {
    const auto m = of().down(t.expert);
    i64 step = t.panel() ? panel_block(DOWN_BLOCK) : row_block(t.rows);
    for (i64 n = n0; n < n1; n += step)
      for (int i = 0; i < t.n_strips; i++) {
        const Strip& p = t.strips[i];
        const element* rows[ROWS];
        for (i64 r = 0; r < p.rows; r++) rows[r] = act + p.a_at + r * a_row();
        i64 nb = std::min(step, n1 - n), os = p.lanes ? p.lanes : up_to(nb, VL);
        const stored* next = n + step < n1 ? m(n + step, 0) : then ? of().down(then->expert)(n0, 0) : nullptr;
        for (i64 r = 0; r < p.rows; r++)
          for (i64 c = 0; c < nb; c += 16) __builtin_prefetch(sums + plan.tokens[size_t(p.first + r)] * width + n - n0 + c, 1, 2);
        Of::product(p, m, n, nb, reinterpret_cast<const unit*>(act + p.a_at), rows, i == 0, next, s, s.g, os);
        add_bias(down_bias(t.expert), 1, n, nb, s.g, os, p);
        auto put = [&](i64 r, i64 c, i64 cols, const float* v) {
          const size_t at = size_t(p.first + r);
          add_output(v, cols, plan.weights[at], sums + plan.tokens[at] * width + n - n0 + c);
        };
        if (p.lanes) each_transposed(s.g, os, nb, p.rows, put);
        else for (i64 r = 0; r < p.rows; r++) put(r, 0, nb, s.g + r * os);
      }
  }
};

struct Forward : Phases<Forward> {
  using Phases::Phases;

  // With tiles whatever is a panel is padded to whole ones: rows that are not there cost nothing.
  static Forward in_tiles(const Args& args) {
    Forward f(args, tiles_allowed() ? RowByRow{tiles_from - 1, 0} : RowByRow{});
    f.tiles = tiles_allowed();
    return f;
  }

  // [nb][lanes] of a strip's panel, or [rows][os] of its rows: columns n .. n + nb of a matrix. `stream`: the weights come from memory,
  // and `next` is what is read after them.
  static void product(
      const Strip& p, const Matrix& m, i64 n, i64 nb, const unit* panel, const element** rows, bool stream, const stored* next, Scratch& s,
      float* out, i64 os) {
    const element* w[MAX_BLOCK];
    if (p.lanes) {
      bool direct = weight_rows(m, n, nb, w, s.w_rows);
      lanes_product(panel, p.lanes, w, nb, units(m.k), out, os, stream && direct ? Stream{m(n, 0), m.sn, nb, next} : Stream{}, direct ? nb : ROWS);
    } else if (m.sk == 1) {
      dots(rows, p.rows, Stream{m(n, 0), m.sn, nb, next}, m.k, s.w_rows, out, os, stream);
    } else {
      columns_product(rows, p.rows, m, n, nb, s.w_panel, out, os, tiled(p) ? ROWS : 0);
    }
  }
};
