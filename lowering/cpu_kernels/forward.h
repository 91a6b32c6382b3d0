// out = add + Σ_j w[t,j] · down act(up x[t]), in three phases: up and activation, down, combine.
#pragma once
#include "plan.h"

constexpr i64 UP_BLOCK = 24, DOWN_BLOCK = 48, ROW_BLOCK = 64;  // output columns worked on at a time
constexpr i64 MAX_BLOCK = 64;

// One thread's scratch.
struct Scratch {
  unit* x_panel;      // tokens as a panel
  element* x_rows;    // tokens copied row by row
  element* w_rows;    // copied weight rows
  unit* w_panel;      // copied weight columns
  float *g, *u, *a;   // a block of pre-activations and activations
  Scratch(Carver& c, i64 depth) {
    i64 padded = up_to(depth, 2), block = up_to(MAX_BLOCK * up_to(ROWS, VL), RUN);
    x_panel = c.take<unit>(up_to(ROWS, VL) * padded);
    x_rows = c.take<element>(ROWS * padded);
    w_rows = c.take<element>(MAX_BLOCK * padded);
    w_panel = c.take<unit>(WIDE * padded);
    g = c.take<float>(block), u = c.take<float>(block), a = c.take<float>(block);
  }
};

struct Forward {
  const Args& a;
  Plan plan;
  Program program;
  element* act;  // activations of all tasks
  float* y;      // [tokens * k, out_features] weighted expert outputs

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
  i64 a_row() const { return units(a.inter) * PER; }
  bool panel_in(const Task& t) const { return t.panel && a.up_k == 1; }
  bool panel_out(const Task& t) const { return t.panel && a.down_k == 1; }

  element input(i64 slot, const stored* x, i64 k) const {
    if (a.weight_on_input) return to_element(load(store(load(x[k]) * a.weights[slot])));
    return to_element(load(x[k]));
  }

  // The task's tokens as pointers to rows of elements.
  void input_rows(const Task& t, bool whole_units, const element** rows, Scratch& s) const {
    bool direct = DIRECT && !a.weight_on_input && (!whole_units || a.hidden % PER == 0);
    i64 depth = units(a.hidden) * PER;
    for (i64 r = 0; r < t.rows; r++) {
      i64 p = slot(t, r);
      const stored* x = token(p);
      if (direct) {
        rows[r] = reinterpret_cast<const element*>(x);
        continue;
      }
      element* to = s.x_rows + r * depth;
      for (i64 k = 0; k < depth; k++) to[k] = k < a.hidden ? input(p, x, k) : element(0);
      rows[r] = to;
    }
  }

  // Pre-activations and activations of columns n0 .. n1.
  void up_phase(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    bool panel = panel_in(t);
    const element *rows[ROWS], *w[MAX_BLOCK];
    input_rows(t, panel || a.up_k != 1, rows, s);
    if (panel) pack_panel(s.x_panel, rows, t.rows, t.lanes, a.hidden);
    i64 step = panel ? UP_BLOCK : ROW_BLOCK;
    for (i64 n = n0; n < n1; n += step) {
      i64 nb = std::min(step, n1 - n), os = panel ? t.lanes : up_to(nb, VL);
      for (i64 half = 0; half < a.halves; half++) {
        float* out = half ? s.u : s.g;
        Matrix m = up(half, t.expert);
        if (panel) {
          weight_rows(m, n, nb, true, w, s.w_rows);
          lanes_product(s.x_panel, t.lanes, w, nb, units(a.hidden), out, os);
        } else if (a.up_k == 1) {
          row_dots(m, n, nb, rows, t.rows, s, out, os);
        } else {
          columns_product(rows, t.rows, m, n, nb, s.w_panel, out, os);
        }
        add_bias(up_bias(half, t.expert), a.up_bias_n, n, nb, out, os, panel, t.rows);
      }
      if (a.pre) save_pre(t, n, nb, os, panel, s);
      i64 used = (panel ? nb : t.rows) * os;
      for (i64 i = 0; i < used; i += RUN) run_program<false>(program, s.g + i, s.u + i, s.a + i, nullptr, nullptr);
      put_activations(t, n, nb, os, panel, s.a);
    }
  }

  static void row_dots(const Matrix& m, i64 n, i64 nb, const element** rows, i64 n_rows, Scratch& s, float* out, i64 os) {
    if (m.rows_direct()) {
      dots(rows, n_rows, reinterpret_cast<const element*>(m(n, 0)), m.sn, nb, m.k, out, os);
      return;
    }
    const element* w[MAX_BLOCK];
    weight_rows(m, n, nb, false, w, s.w_rows);
    dots(rows, n_rows, w[0], units(m.k) * PER, nb, m.k, out, os);
  }

  static void add_bias(const stored* bias, i64 stride, i64 n, i64 nb, float* out, i64 os, bool panel, i64 rows) {
    if (!bias) return;
    for (i64 i = 0; i < (panel ? nb : rows); i++)
      for (i64 j = 0; j < (panel ? os : nb); j++) out[i * os + j] += load(bias[(n + (panel ? i : j)) * stride]);
  }

  void save_pre(const Task& t, i64 n, i64 nb, i64 os, bool panel, const Scratch& s) const {
    for (i64 half = 0; half < a.halves; half++) {
      const float* from = half ? s.u : s.g;
      stored* to = static_cast<stored*>(a.pre) + t.first * a.halves * a.inter + half * a.inter + n;
      auto put = [&](i64 r, i64 c, i64 cols, const float* v) {
        for (i64 j = 0; j < cols; j++) to[r * a.halves * a.inter + c + j] = store(v[j]);
      };
      if (panel) each_transposed(from, os, nb, t.rows, put);
      else for (i64 r = 0; r < t.rows; r++) put(r, 0, nb, from + r * os);
    }
  }

  // Activations into the task's operand for the down product: a panel over rows, or rows.
  void put_activations(const Task& t, i64 n, i64 nb, i64 os, bool panel, const float* from) const {
    element* base = act + t.a_at;
    bool last = n + nb == a.inter && a.inter % PER;
    if (panel_out(t)) {
      unit* p = reinterpret_cast<unit*>(base);
      i64 nu = units(a.inter);
      for (i64 first = 0; first < t.lanes; first += WIDE) {
        i64 w = block_lanes(t.lanes, first);
#if defined(PAIRS)
        if (panel && nb % 2 == 0) {
          for (i64 j = 0; j < nb; j += 2) {
            const float *even = from + j * os + first, *odd = even + os;
            uint32_t* to = p + first * nu + (n + j) / 2 * w;
            for (i64 l = 0; l < w; l++) to[l] = uint32_t(store(even[l])) | uint32_t(store(odd[l])) << 16;
          }
          continue;
        }
#endif
        for (i64 j = 0; j < nb + last; j++) {
          element_any* to = reinterpret_cast<element_any*>(p + first * nu + (n + j) / PER * w) + (n + j) % PER;
          if (j == nb)
            for (i64 l = 0; l < w; l++) to[l * PER] = element(0);
          else if (panel)
            for (i64 l = 0; l < w; l++) to[l * PER] = to_element(from[j * os + first + l]);
          else
            for (i64 l = 0; l < w; l++) to[l * PER] = first + l < t.rows ? to_element(from[(first + l) * os + j]) : element(0);
        }
      }
      return;
    }
    for (i64 r = 0; r < t.rows; r++) {
      element* to = base + r * a_row() + n;
      for (i64 j = 0; j < nb; j++) to[j] = to_element(panel ? from[j * os + r] : from[r * os + j]);
      if (last) to[nb] = element(0);
    }
  }

  // Weighted outputs of columns n0 .. n1 into y.
  void down_phase(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    bool panel = panel_out(t);
    const element *rows[ROWS], *w[MAX_BLOCK];
    for (i64 r = 0; r < t.rows; r++) rows[r] = act + t.a_at + r * a_row();
    Matrix m = down(t.expert);
    i64 step = panel ? DOWN_BLOCK : ROW_BLOCK;
    for (i64 n = n0; n < n1; n += step) {
      i64 nb = std::min(step, n1 - n), os = panel ? t.lanes : up_to(nb, VL);
      if (panel) {
        weight_rows(m, n, nb, true, w, s.w_rows);
        lanes_product(reinterpret_cast<const unit*>(act + t.a_at), t.lanes, w, nb, units(a.inter), s.g, os);
      } else if (a.down_k == 1) {
        row_dots(m, n, nb, rows, t.rows, s, s.g, os);
      } else {
        columns_product(rows, t.rows, m, n, nb, s.w_panel, s.g, os);
      }
      add_bias(down_bias(t.expert), 1, n, nb, s.g, os, panel, t.rows);
      auto put = [&](i64 r, i64 c, i64 cols, const float* v) {
        i64 p = slot(t, r);
        float weight = a.weight_on_input ? 1.f : a.weights[p];
        float* to = y + p * a.out_features + n + c;
        for (i64 j = 0; j < cols; j++) to[j] = v[j] * weight;
      };
      if (panel) each_transposed(s.g, os, nb, t.rows, put);
      else for (i64 r = 0; r < t.rows; r++) put(r, 0, nb, s.g + r * os);
    }
  }

  // One token's result: what to add, then its experts in order of their slots.
  void combine(i64 t, float* sum) const {
    i64 width = a.out_features;
    const stored* add = static_cast<const stored*>(a.add);
    for (i64 o = 0; o < width; o++) sum[o] = add ? load(add[t * width + o]) : 0.f;
    for (i64 j = 0; j < a.k; j++) {
      i64 p = t * a.k + j, id = a.ids[p];
      if (id >= 0 && id < a.experts) {
        const float* from = y + p * width;
        for (i64 o = 0; o < width; o++) sum[o] += from[o];
      } else if (id >= a.experts && id < a.experts + a.identity) {
        const stored* x = token(p);
        for (i64 o = 0; o < width; o++) sum[o] += load(x[o]) * a.weights[p];
      }
    }
    stored* out = static_cast<stored*>(a.out) + t * width;
    for (i64 o = 0; o < width; o++) out[o] = store(sum[o]);
  }

  // Rows of pre-activations that belong to no expert are zero.
  void clear_rest_of_pre() const {
    i64 used = i64(plan.slots.size()), row = a.halves * a.inter;
    if (a.pre) memset(static_cast<stored*>(a.pre) + used * row, 0, size_t((a.tokens * a.k - used) * row) * sizeof(stored));
  }

  void run() {
    clear_rest_of_pre();
    thread_local Workspace shared, own;
    for (int pass = 0; pass < 2; pass++) {
      Carver c{pass ? shared.data : nullptr};
      act = c.take<element>(plan.a_size);
      y = c.take<float>(a.tokens * a.k * a.out_features);
      if (!pass) shared.get(c.used);
    }
    i64 n_tasks = i64(plan.tasks.size());
    i64 up_chunks = chunks_of(plan, a.threads, a.inter), down_chunks = chunks_of(plan, a.threads, a.out_features);
    i64 up_step = up_to((a.inter + up_chunks - 1) / up_chunks, 8), down_step = up_to((a.out_features + down_chunks - 1) / down_chunks, 8);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
      Carver size{nullptr};
      Scratch(size, std::max(a.hidden, a.inter));
      Carver c{own.get(size.used + a.out_features * 4)};
      Scratch s(c, std::max(a.hidden, a.inter));
      float* sum = c.take<float>(a.out_features);
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < n_tasks * up_chunks; i++) {
        i64 n = i % up_chunks * up_step;
        up_phase(plan.tasks[size_t(i / up_chunks)], n, std::min(a.inter, n + up_step), s);
      }
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < n_tasks * down_chunks; i++) {
        i64 n = i % down_chunks * down_step;
        down_phase(plan.tasks[size_t(i / down_chunks)], n, std::min(a.out_features, n + down_step), s);
      }
#pragma omp for schedule(static)
      for (i64 t = 0; t < a.tokens; t++) combine(t, sum);
      own.trim();
    }
    shared.trim();
  }
};
