// out = add + Σ_j w[t,j] · down act(up x[t]), in two phases: up and activation, expert by expert; then down, each thread for columns of its
// own, over all experts in their order, into fp32 sums [tokens, columns]. Sums and their order do not depend on the threads.
#pragma once
#include "pack.h"
#include "plan.h"

constexpr i64 UP_BLOCK = 24, DOWN_BLOCK = 48, ROW_BLOCK = 64;  // output columns worked on at a time
constexpr i64 MAX_BLOCK = 64;

// One thread's scratch.
struct Scratch {
  unit* x_panel;      // tokens as a panel
  element* x_rows;    // tokens copied row by row
  element* w_rows;    // copied weight rows, or tokens once more (dots.h)
  unit* w_panel;      // copied weight columns
  float *g, *u, *a;   // a block of pre-activations and activations
  Scratch(Carver& c, i64 depth) {
    i64 padded = up_to(depth, 2), block = up_to(MAX_BLOCK * up_to(ROWS, VL), RUN);
    x_panel = c.take<unit>(up_to(ROWS, VL) * padded);
    x_rows = c.take<element>(ROWS * row_stride(depth));
    w_rows = c.take<element>(ROWS * up_to(depth, 4 * STEP));
    w_panel = c.take<unit>(WIDE * padded);
    g = c.take<float>(block), u = c.take<float>(block), a = c.take<float>(block);
  }
};

struct Forward {
  const Args& a;
  Plan plan;
  Program program;
  element* act;  // activations of all tasks

  Matrix up(i64 half, i64 e) const {
    return {static_cast<const stored*>(at<const void>(a.up, a.experts, a.up_expert, half, e)), a.up_n, a.up_k, a.inter, a.hidden};
  }
  Matrix down(i64 e) const {
    return {static_cast<const stored*>(at<const void>(a.down, a.experts, a.down_expert, 0, e)), a.down_n, a.down_k, a.out_features, a.inter};
  }
  const stored* up_bias(i64 half, i64 e) const {
    return static_cast<const stored*>(at<const void>(a.up_bias, a.experts, a.up_bias_expert, half, e));
  }
  const stored* down_bias(i64 e) const { return static_cast<const stored*>(at<const void>(a.down_bias, a.experts, a.down_bias_expert, 0, e)); }
  const stored* token(i64 slot) const { return static_cast<const stored*>(a.x) + slot / a.k * a.x_stride; }
  i64 slot(const Task& t, i64 row) const { return plan.slots[size_t(t.first + row)]; }

  // Panels of tokens want weight rows in one piece in both products; packed weights take any number of rows.
  static bool panels(const Args& a) { return a.up_k == 1 && a.down_k == 1 && !a.packed_up; }
  static Plan plan_of(const Args& a) { return make_plan(a, panels(a), row_stride(a.inter)); }
  i64 a_row() const { return row_stride(a.inter); }

  element input(i64 slot, const stored* x, i64 k) const {
    if (a.weight_on_input) return to_element(load(store(load(x[k]) * a.weights[slot])));
    return to_element(load(x[k]));
  }

  // A strip's tokens as pointers to rows of whole units. Rows that would meet in one or two sets of the cache are copied; others,
  // and rows on the way to a panel, are used where they lie.
  void input_rows(const Strip& p, const element** rows, element* copy) const {
    bool apart = p.lanes || p.rows == 1 || a.x_stride * i64(sizeof(stored)) % 2048;
    bool direct = DIRECT && !a.weight_on_input && a.hidden % PER == 0 && apart;
    i64 stride = row_stride(a.hidden), depth = units(a.hidden) * PER;
    for (i64 r = 0; r < p.rows; r++) {
      const size_t at = size_t(p.first + r);
      const stored* x = static_cast<const stored*>(a.x) + plan.tokens[at] * a.x_stride;
      element* to = copy + r * stride;
      rows[r] = direct ? reinterpret_cast<const element*>(x) : to;
      if (direct) continue;
      if (!a.weight_on_input) elements(x, a.hidden, depth, to);
      else
        for (i64 k = 0; k < depth; k++) to[k] = k < a.hidden ? input(plan.slots[at], x, k) : element(0);
    }
  }

  // [nb][lanes] of a strip's panel, or [rows][os] of its rows: columns n .. n + nb of a matrix. `stream`: the weights come from memory,
  // and `next` is what is read after them.
  static void product(
      const Strip& p, const Matrix& m, i64 n, i64 nb, const unit* panel, const element** rows, bool stream, const stored* next, Scratch& s,
      float* out, i64 os) {
    const element* w[MAX_BLOCK];
    if (p.lanes) {
      bool direct = weight_rows(m, n, nb, w, s.w_rows);
      lanes_product(panel, p.lanes, w, nb, units(m.k), out, os, stream && direct ? Stream{m(n, 0), m.sn, nb, next} : Stream{});
    } else if (m.sk == 1) {
      dots(rows, p.rows, Stream{m(n, 0), m.sn, nb, next}, m.k, s.w_rows, out, os, stream);
    } else {
      columns_product(rows, p.rows, m, n, nb, s.w_panel, out, os);
    }
  }

  // Pre-activations and activations of columns n0 .. n1.
  void up_phase(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    const element* rows[ROWS];
    for (int i = 0; i < t.n_strips; i++) {
      const Strip& p = t.strips[i];
      i64 at = p.first - t.first;
      input_rows(p, rows + at, s.x_rows + at * row_stride(a.hidden));
      if (p.lanes) pack_panel(s.x_panel, rows + at, p.rows, p.lanes, a.hidden);
    }
    i64 step = t.panel() ? UP_BLOCK : row_block(t.rows);
    for (i64 n = n0; n < n1; n += step)
      for (int i = 0; i < t.n_strips; i++) up_block(t, t.strips[i], n, std::min(step, n1 - n), n + step < n1, rows, s);
  }

  void up_block(const Task& t, const Strip& p, i64 n, i64 nb, bool more, const element** rows, Scratch& s) const {
    i64 os = p.lanes ? p.lanes : up_to(nb, VL);
    for (i64 half = 0; half < a.halves; half++) {
      float* out = half ? s.u : s.g;
      bool last = half + 1 == a.halves;
      const stored* next = !last ? up(half + 1, t.expert)(n, 0) : more ? up(0, t.expert)(n + nb, 0) : nullptr;
      product(p, up(half, t.expert), n, nb, s.x_panel, rows + (p.first - t.first), &p == t.strips, next, s, out, os);
      add_bias(up_bias(half, t.expert), a.up_bias_n, n, nb, out, os, p);
    }
    if (a.pre) save_pre(p, n, nb, os, s);
    activate((p.lanes ? nb : p.rows) * os, s);
    put_activations(p, n, nb, os, s.a);
  }

  void activate(i64 used, Scratch& s) const {
    for (i64 i = 0; i < used; i += RUN) run_program<false>(program, s.g + i, s.u + i, s.a + i, nullptr, nullptr);
  }

  static void add_bias(const stored* bias, i64 stride, i64 n, i64 nb, float* out, i64 os, const Strip& p) {
    if (!bias) return;
    for (i64 i = 0; i < (p.lanes ? nb : p.rows); i++)
      for (i64 j = 0; j < (p.lanes ? os : nb); j++) out[i * os + j] += load(bias[(n + (p.lanes ? i : j)) * stride]);
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

  // Activations into the strip's operand for the down product: a panel over rows, or rows of whole units.
  void put_activations(const Strip& p, i64 n, i64 nb, i64 os, const float* from) const {
    bool last = n + nb == a.inter && a.inter % PER;
    if (p.lanes) {
      put_panel(p, n, nb, os, from, last);
      return;
    }
    for (i64 r = 0; r < p.rows; r++) {
      element* to = act + p.a_at + r * a_row() + n;
      element_row(from + r * os, nb, to);
      if (last) to[nb] = element(0);
    }
  }

  void put_panel(const Strip& p, i64 n, i64 nb, i64 os, const float* from, bool last) const {
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

  // Output columns that few rows are multiplied by at a time: the longer a stream, the better, as far as scratch goes.
  static i64 row_block(i64 rows) { return std::max(ROW_BLOCK, MAX_BLOCK * ROWS / std::max<i64>(rows, 1) / ROW_BLOCK * ROW_BLOCK); }

  // Weighted outputs of columns n0 .. n1, added to `sums` [tokens, n1 - n0 and up to whole panels]; `then`: the next task, if any.
  void down_phase(const Task& t, const Task* then, i64 n0, i64 n1, float* sums, i64 width, Scratch& s) const {
    Matrix m = down(t.expert);
    i64 step = t.panel() ? DOWN_BLOCK : row_block(t.rows);
    for (i64 n = n0; n < n1; n += step)
      for (int i = 0; i < t.n_strips; i++) {
        const Strip& p = t.strips[i];
        const element* rows[ROWS];
        for (i64 r = 0; r < p.rows; r++) rows[r] = act + p.a_at + r * a_row();
        i64 nb = std::min(step, n1 - n), os = p.lanes ? p.lanes : up_to(nb, VL);
        const stored* next = n + step < n1 ? m(n + step, 0) : then ? down(then->expert)(n0, 0) : nullptr;
        for (i64 r = 0; r < p.rows; r++)
          for (i64 c = 0; c < nb; c += 16) __builtin_prefetch(sums + plan.tokens[size_t(p.first + r)] * width + n - n0 + c, 1, 2);
        product(p, m, n, nb, reinterpret_cast<const unit*>(act + p.a_at), rows, i == 0, next, s, s.g, os);
        add_bias(down_bias(t.expert), 1, n, nb, s.g, os, p);
        auto put = [&](i64 r, i64 c, i64 cols, const float* v) {
          const size_t at = size_t(p.first + r);
          add_output(v, cols, plan.weights[at], sums + plan.tokens[at] * width + n - n0 + c);
        };
        if (p.lanes) each_transposed(s.g, os, nb, p.rows, put);
        else for (i64 r = 0; r < p.rows; r++) put(r, 0, nb, s.g + r * os);
      }
  }

  static void add_output(const float* v, i64 n, float weight, float* to) {
    i64 j = 0;
    for (; j + VL <= n; j += VL) *(vf_any*)(to + j) += *(const vf_any*)(v + j) * weight;
    for (; j < n; j++) to[j] += v[j] * weight;
  }

  // ---- packed weights: panels of COLS columns, tokens as rows ----

  // Panels n0 .. n1 of up.
  void packed_up(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    const element* rows[ROWS];
    const Strip& p = t.strips[0];
    input_rows(p, rows, s.x_rows);
    const packed* from = Packed(a).up(t.expert);
    i64 size = units(a.hidden) * COLS;
    for (i64 j = n0; j < n1; j++) {
      i64 n = j * COLS, nb = std::min(COLS, a.inter - n);
      for (i64 half = 0; half < a.halves; half++) {
        float* out = half ? s.u : s.g;
        packed_product<false>(from + (j * a.halves + half) * size, rows, p.rows, units(a.hidden), j + 1 == n1 && half + 1 == a.halves, Out{out, COLS});
        add_bias(up_bias(half, t.expert), a.up_bias_n, n, nb, out, COLS, p);
      }
      activate(p.rows * COLS, s);
      put_activations(p, n, nb, COLS, s.a);
    }
  }

  // As down_phase, n0 a multiple of COLS.
  void packed_down(const Task& t, i64 n0, i64 n1, float* sums, i64 width) const {
    const element* rows[ROWS];
    const Strip& p = t.strips[0];
    const i64* tokens = plan.tokens.data() + p.first;
    const float* weights = plan.weights.data() + p.first;
    for (i64 r = 0; r < p.rows; r++) rows[r] = act + p.a_at + r * a_row();
    const i64 size = units(a.inter) * COLS;
    const packed* from = Packed(a).down(t.expert) + n0 / COLS * size;
    for (i64 n = n0; n < n1; n += COLS, from += size)
      packed_product<true>(from, rows, p.rows, units(a.inter), n + COLS >= n1, Out{sums + n - n0, width, tokens, weights});
    const stored* bias = down_bias(t.expert);
    for (i64 r = 0; bias && r < p.rows; r++)
      for (i64 n = n0; n < n1; n++) sums[tokens[r] * width + n - n0] += load(bias[n]) * weights[r];
  }

  // ---- all phases ----

  // What a token's sum of columns n0 .. n1 begins with: what is to be added, and experts that hand the token on.
  void begin_sum(i64 t, i64 n0, i64 n1, float* sum) const {
    const stored* add = a.add ? static_cast<const stored*>(a.add) + t * a.out_features : nullptr;
    for (i64 n = n0; n < n1; n++) sum[n - n0] = add ? load(add[n]) : 0.f;
    for (i64 p = t * a.k; a.identity && p < (t + 1) * a.k; p++)
      if (a.ids[p] >= a.experts && a.ids[p] < a.experts + a.identity)
        for (i64 n = n0; n < n1; n++) sum[n - n0] += load(token(p)[n]) * a.weights[p];
  }

  // Columns n0 .. n1 of the result.
  void down_part(i64 n0, i64 n1, float* sums, Scratch& s) const {
    const i64 width = up_to(n1 - n0, COLS);
    for (i64 t = 0; t < a.tokens; t++) begin_sum(t, n0, n1, sums + t * width);
    for (size_t i = 0; i < plan.tasks.size(); i++) {
      const Task &t = plan.tasks[i], *then = i + 1 < plan.tasks.size() ? &t + 1 : nullptr;
      a.packed_up ? packed_down(t, n0, n1, sums, width) : down_phase(t, then, n0, n1, sums, width, s);
    }
    for (i64 t = 0; t < a.tokens; t++) store_row(sums + t * width, n1 - n0, static_cast<stored*>(a.out) + t * a.out_features + n0);
  }

  // Rows of pre-activations that belong to no expert are zero.
  void clear_rest_of_pre() const {
    i64 used = i64(plan.slots.size()), row = a.halves * a.inter;
    if (a.pre) memset(static_cast<stored*>(a.pre) + used * row, 0, size_t((a.tokens * a.k - used) * row) * sizeof(stored));
  }

  void run() {
    clear_rest_of_pre();
    thread_local Workspace shared, own;
    const i64 parts = parts_of(a), part = up_to((a.out_features + parts - 1) / parts, COLS);
    float* sums = nullptr;
    for (int pass = 0; pass < 2; pass++) {
      Carver c{pass ? shared.data : nullptr};
      act = c.take<element>(plan.a_size);
      sums = c.take<float>(a.tokens * part * parts);
      if (!pass) shared.get(c.used);
    }
    const i64 n_tasks = i64(plan.tasks.size()), unit_of = a.packed_up ? COLS : 1, all = (a.inter + unit_of - 1) / unit_of;
    const i64 chunks = chunks_of(plan, a.threads, a.inter), step = up_to((all + chunks - 1) / chunks, a.packed_up ? 1 : 8);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
      Carver size{nullptr};
      Scratch(size, std::max(a.hidden, a.inter));
      Carver c{own.get(size.used)};
      Scratch s(c, std::max(a.hidden, a.inter));
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < n_tasks * chunks; i++) {
        i64 n = i % chunks * step, end = std::min(all, n + step);
        const Task& t = plan.tasks[size_t(i / chunks)];
        a.packed_up ? packed_up(t, n, end, s) : up_phase(t, n, end, s);
      }
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < parts; i++)
        if (i * part < a.out_features) down_part(i * part, std::min(a.out_features, (i + 1) * part), sums + i * a.tokens * part, s);
      own.trim();
    }
    shared.trim();
  }
};
