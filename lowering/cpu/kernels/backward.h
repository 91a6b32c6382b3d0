// Gradients of the experts op: to the pre-activations (and routing weights), to the tokens, to the weights and biases.
#pragma once
#include "forward.h"

constexpr i64 OUTER_ROWS = 256, OUTER_LANES = 512, OUTER_DEPTH = 512;  // one weight-gradient block, rows of tokens a pass

struct BackwardScratch {
  Scratch s;
  float *dg, *du, *da;
  unit* panel;      // [OUTER_LANES / WIDE][pairs of tokens][WIDE]
  element* rows;    // [OUTER_ROWS][tokens]
  float *acc, *out, *square, *sum;
  BackwardScratch(Carver& c, const Args& a) : s(c, std::max(std::max(a.hidden, a.inter), a.out_features)) {
    i64 block = up_to(MAX_BLOCK * up_to(ROWS, VL), RUN);
    dg = c.take<float>(block), du = c.take<float>(block), da = c.take<float>(block);
    panel = c.take<unit>(OUTER_LANES * OUTER_DEPTH);
    rows = c.take<element>(OUTER_ROWS * OUTER_DEPTH);
    acc = c.take<float>(OUTER_ROWS * OUTER_LANES);
    out = c.take<float>(24 * OUTER_LANES);
    square = c.take<float>(SIDE * OUTER_LANES);
    sum = c.take<float>(a.hidden);
  }
};

// A block of one expert's weight gradient; `which`: 0 and 1 the halves of up, 2 down; zero when the expert had no rows.
struct Block {
  i64 expert, which, row, lane;
};

struct Backward {
  const Args& a;
  Forward f;
  element *act, *dpre;  // [pairs, inter] and halves x [pairs, inter], ordered by expert, rows padded to whole units
  float* dx;            // [tokens * k, hidden]
  i64 width = units(a.inter) * PER;

  element* dpre_row(i64 half, i64 at) const { return dpre + (half * i64(f.plan.slots.size()) + at) * width; }
  const stored* grad_row(i64 slot) const { return static_cast<const stored*>(a.grad) + slot / a.k * a.out_features; }
  bool want_input() const { return a.out || (a.weight_on_input && a.grad_weights); }

  // out[r][0..nb) = Σ_k rows[r][k] m(n + ., k), whichever way the matrix lies.
  static void product(const element** rows, i64 n_rows, const Matrix& m, i64 n, i64 nb, Scratch& s, float* out, i64 os) {
    if (m.sk == 1 && m.sn != 1) row_dots(m, n, nb, rows, n_rows, nullptr, out, os);
    else columns_product(rows, n_rows, m, n, nb, s.w_panel, out, os);
  }

  // Rows of the output gradient as elements of whole units.
  void grad_rows(const Task& t, const element** rows, Scratch& s) const {
    i64 depth = units(a.out_features) * PER;
    for (i64 r = 0; r < t.rows; r++) {
      const stored* g = grad_row(f.slot(t, r));
      rows[r] = reinterpret_cast<const element*>(g);
      if (DIRECT && a.out_features % PER == 0) continue;
      element* to = s.x_rows + r * depth;
      for (i64 k = 0; k < depth; k++) to[k] = k < a.out_features ? to_element(load(g[k])) : element(0);
      rows[r] = to;
    }
  }

  // Gradient to the pre-activations of one task; the routing weight's gradient falls out on the way.
  void pre_phase(const Task& t, BackwardScratch& b) const {
    Scratch& s = b.s;
    const element* rows[ROWS];
    float dw[ROWS];
    grad_rows(t, rows, s);
    const stored* bias = f.down_bias(t.expert);
    for (i64 r = 0; r < t.rows; r++) {
      dw[r] = 0;
      if (bias)
        for (i64 o = 0; o < a.out_features; o++) dw[r] += load(grad_row(f.slot(t, r))[o]) * load(bias[o]);
    }
    Matrix m = f.down(t.expert).transposed();
    for (i64 n = 0; n < a.inter; n += ROW_BLOCK) {
      i64 nb = std::min(ROW_BLOCK, a.inter - n), os = up_to(nb, VL);
      product(rows, t.rows, m, n, nb, s, b.da, os);
      load_pre(t, n, nb, os, s);
      for (i64 i = 0; i < t.rows * os; i += RUN) run_program<true>(f.program, s.g + i, s.u + i, s.a + i, b.dg + i, b.du + i);
      for (i64 r = 0; r < t.rows; r++) {
        i64 at = t.first + r;
        float w = a.weight_on_input ? 1.f : a.weights[f.slot(t, r)], d = 0;
        const float *da = b.da + r * os, *v = s.a + r * os, *dg = b.dg + r * os, *du = b.du + r * os;
        element *to_a = act + at * width + n, *to_g = dpre_row(0, at) + n, *to_u = a.halves > 1 ? dpre_row(1, at) + n : nullptr;
        for (i64 j = 0; j < nb; j++) d += da[j] * v[j];
        for (i64 j = 0; j < nb; j++) to_a[j] = to_element(v[j]), to_g[j] = to_element(da[j] * w * dg[j]);
        if (to_u)
          for (i64 j = 0; j < nb; j++) to_u[j] = to_element(da[j] * w * du[j]);
        for (i64 j = nb; n + nb == a.inter && n + j < width; j++) {
          to_a[j] = to_g[j] = element(0);
          if (to_u) to_u[j] = element(0);
        }
        dw[r] += d;
      }
    }
    if (a.grad_weights && !a.weight_on_input)
      for (i64 r = 0; r < t.rows; r++) a.grad_weights[f.slot(t, r)] = dw[r];
  }

  void load_pre(const Task& t, i64 n, i64 nb, i64 os, Scratch& s) const {
    for (i64 half = 0; half < a.halves; half++) {
      float* to = half ? s.u : s.g;
      for (i64 r = 0; r < t.rows; r++) {
        const stored* from = static_cast<const stored*>(a.pre) + ((t.first + r) * a.halves + half) * a.inter + n;
        for (i64 j = 0; j < os; j++) to[r * os + j] = j < nb ? load(from[j]) : 0.f;
      }
    }
  }

  // Gradient to the task's inputs, one row per pair.
  void input_phase(const Task& t, BackwardScratch& b) const {
    Scratch& s = b.s;
    const element* rows[ROWS];
    float dw[ROWS] = {};
    for (i64 n = 0; n < a.hidden; n += ROW_BLOCK) {
      i64 nb = std::min(ROW_BLOCK, a.hidden - n), os = up_to(nb, VL);
      for (i64 half = 0; half < a.halves; half++) {
        for (i64 r = 0; r < t.rows; r++) rows[r] = dpre_row(half, t.first + r);
        product(rows, t.rows, f.up(half, t.expert).transposed(), n, nb, s, half ? s.u : s.g, os);
      }
      for (i64 r = 0; r < t.rows; r++) {
        i64 p = f.slot(t, r);
        float *to = dx + p * a.hidden + n, *from = s.g + r * os, w = a.weight_on_input ? a.weights[p] : 1.f;
        if (a.halves > 1)
          for (i64 j = 0; j < nb; j++) from[j] += s.u[r * os + j];
        if (a.weight_on_input)
          for (i64 j = 0; j < nb; j++) dw[r] += from[j] * load(f.token(p)[n + j]);
        for (i64 j = 0; j < nb; j++) to[j] = from[j] * w;
      }
    }
    if (a.grad_weights && a.weight_on_input)
      for (i64 r = 0; r < t.rows; r++) a.grad_weights[f.slot(t, r)] = dw[r];
  }

  void combine(i64 t, float* sum) const {
    for (i64 h = 0; h < a.hidden; h++) sum[h] = 0;
    for (i64 j = 0; j < a.k; j++) {
      i64 p = t * a.k + j, id = a.ids[p];
      if (id >= 0 && id < a.experts) {
        if (a.out)
          for (i64 h = 0; h < a.hidden; h++) sum[h] += dx[p * a.hidden + h];
        continue;
      }
      bool identity = id >= a.experts && id < a.experts + a.identity;
      float dw = 0;
      for (i64 h = 0; identity && h < a.hidden; h++) {
        float g = load(grad_row(p)[h]);
        dw += g * load(f.token(p)[h]);
        sum[h] += g * a.weights[p];
      }
      if (a.grad_weights) a.grad_weights[p] = dw;
    }
    stored* out = static_cast<stored*>(a.out) + t * a.hidden;
    if (a.out)
      for (i64 h = 0; h < a.hidden; h++) out[h] = store(sum[h]);
  }

  // Rows of operands for weight gradients, as floats: values c .. c + n of the pair at ordered position `at`.
  enum Side { TOKENS, GRADS, ACTS, PRE_G, PRE_U };
  void operand(Side side, i64 at, i64 c, i64 n, float* out) const {
    if (side >= ACTS) {
      const element* from = (side == ACTS ? act + at * width : dpre_row(side - PRE_G, at)) + c;
      for (i64 j = 0; j < n; j++) out[j] = from_element(from[j]);
      return;
    }
    i64 p = f.plan.slots[size_t(at)];
    const stored* from = (side == TOKENS ? f.token(p) : grad_row(p)) + c;
    bool weighted = (side == TOKENS) == bool(a.weight_on_input);
    float w = weighted ? a.weights[p] : 1.f;
    for (i64 j = 0; j < n; j++) out[j] = load(from[j]) * w;
  }

  // panel(k = pair, lane = column)
  void lanes_operand(Side side, i64 first, i64 n, i64 c, i64 lanes, unit* panel, float* square) const {
    i64 padded = up_to(lanes, VL), nu = units(n);
    for (i64 u = 0; u < nu; u++) {
      for (int h = 0; h < PER; h++) {
        float* row = square + h * OUTER_LANES;
        if (u * PER + h < n) operand(side, first + u * PER + h, c, lanes, row);
        for (i64 l = u * PER + h < n ? lanes : 0; l < padded; l++) row[l] = 0;
      }
      for (i64 l = 0; l < padded; l += WIDE) {
        i64 w = block_lanes(padded, l);
        unit* to = panel + l * nu + u * w;
#if defined(PAIRS)
        for (i64 i = 0; i < w; i++) to[i] = uint32_t(store(square[l + i])) | uint32_t(store(square[OUTER_LANES + l + i])) << 16;
#else
        memcpy(to, square + l, size_t(w) * sizeof(unit));
#endif
      }
    }
  }

  // rows[c][k = pair], padded to whole units
  void rows_operand(Side side, i64 first, i64 n, i64 c, i64 columns, element* rows, float* square) const {
    i64 stride = units(n) * PER;
    for (i64 m = 0; m < n; m += SIDE) {
      i64 live = std::min(SIDE, n - m);
      for (i64 i = 0; i < live; i++) operand(side, first + m + i, c, columns, square + i * OUTER_LANES);
      each_transposed(square, OUTER_LANES, live, columns, [&](i64 r, i64 at, i64 count, const float* v) {
        for (i64 j = 0; j < count; j++) rows[r * stride + m + at + j] = to_element(v[j]);
      });
    }
    for (i64 r = 0; stride > n && r < columns; r++) rows[r * stride + n] = element(0);
  }

  stored* target(const Block& k, i64& sr, i64& sl, Side& rows, Side& lanes) const {
    bool down = k.which == 2, flip;
    Side in = down ? ACTS : TOKENS, out = down ? GRADS : Side(PRE_G + k.which);
    i64 n = down ? a.grad_down_n : a.grad_up_n, kk = down ? a.grad_down_k : a.grad_up_k;
    flip = kk != 1;  // lanes run along the contiguous side
    rows = flip ? in : out, lanes = flip ? out : in;
    sr = flip ? kk : n, sl = flip ? n : kk;
    void* base = down ? at<void>(a.grad_down, a.experts, a.grad_down_expert, 0, k.expert)
                      : at<void>(a.grad_up, a.experts, a.grad_up_expert, k.which, k.expert);
    return static_cast<stored*>(base);
  }
  i64 columns(Side s) const { return s == TOKENS ? a.hidden : s == GRADS ? a.out_features : a.inter; }

  static void put(stored* to, i64 stride, const float* from, i64 n) {
    if (stride == 1)
      for (i64 j = 0; j < n; j++) to[j] = store(from[j]);
    else
      for (i64 j = 0; j < n; j++) to[j * stride] = store(from[j]);
  }

  void weight_phase(const Block& k, i64 first, i64 count, BackwardScratch& b) const {
    i64 sr, sl;
    Side rs, ls;
    stored* base = target(k, sr, sl, rs, ls);
    i64 nr = std::min(OUTER_ROWS, columns(rs) - k.row), nl = std::min(OUTER_LANES, columns(ls) - k.lane), os = up_to(nl, VL);
    stored* to = base + k.row * sr + k.lane * sl;
    bool once = count <= OUTER_DEPTH;
    if (!once || !count) memset(b.acc, 0, size_t(nr * os) * sizeof(float));
    const element* rows[24];
    for (i64 m = 0; m < count; m += OUTER_DEPTH) {
      i64 depth = std::min(OUTER_DEPTH, count - m), nu = units(depth);
      lanes_operand(ls, first + m, depth, k.lane, nl, b.panel, b.square);
      rows_operand(rs, first + m, depth, k.row, nr, b.rows, b.square);
      for (i64 r = 0; r < nr; r += 24) {
        i64 n = std::min<i64>(24, nr - r);
        for (i64 i = 0; i < n; i++) rows[i] = b.rows + (r + i) * nu * PER;
        lanes_product(b.panel, os, rows, n, nu, b.out, os);
        for (i64 i = 0; once && i < n; i++) put(to + (r + i) * sr, sl, b.out + i * os, nl);
        for (i64 i = 0; !once && i < n * os; i++) b.acc[r * os + i] += b.out[i];
      }
    }
    for (i64 r = 0; (!once || !count) && r < nr; r++) put(to + r * sr, sl, b.acc + r * os, nl);
  }

  void bias_phase(i64 e, i64 first, i64 count, BackwardScratch& b) const {
    for (i64 which = 0; which < 3; which++) {
      bool down = which == 2;
      stored* to = static_cast<stored*>(down ? at<void>(a.grad_down_bias, a.experts, a.down_bias_expert, 0, e)
                                             : which < a.halves ? at<void>(a.grad_up_bias, a.experts, a.up_bias_expert, which, e) : nullptr);
      if (!to) continue;
      Side side = down ? GRADS : Side(PRE_G + which);
      for (i64 c = 0; c < columns(side); c += OUTER_LANES) {
        i64 n = std::min(OUTER_LANES, columns(side) - c), stride = down ? 1 : a.up_bias_n;
        for (i64 j = 0; j < n; j++) b.out[j] = 0;
        for (i64 m = 0; m < count; m++) {
          operand(side, first + m, c, n, b.square);
          for (i64 j = 0; j < n; j++) b.out[j] += b.square[j];
        }
        put(to + c * stride, stride, b.out, n);
      }
    }
  }

  std::vector<Block> blocks() const {
    std::vector<Block> all;
    for (i64 e = 0; e < a.experts; e++)
      for (i64 which = 0; which < 3; which++) {
        if (which < 2 ? which >= a.halves || !a.grad_up : !a.grad_down) continue;
        i64 sr, sl;
        Side rs, ls;
        if (!target({e, which, 0, 0}, sr, sl, rs, ls)) continue;
        for (i64 r = 0; r < columns(rs); r += OUTER_ROWS)
          for (i64 l = 0; l < columns(ls); l += OUTER_LANES) all.push_back({e, which, r, l});
      }
    return all;
  }

  void run() {
    thread_local Workspace shared, own;
    i64 pairs = i64(f.plan.slots.size());
    for (int pass = 0; pass < 2; pass++) {
      Carver c{pass ? shared.data : nullptr};
      act = c.take<element>(pairs * width);
      dpre = c.take<element>(pairs * width * a.halves);
      dx = c.take<float>(want_input() ? a.tokens * a.k * a.hidden : 0);
      if (!pass) shared.get(c.used);
    }
    std::vector<i64> first(size_t(a.experts), 0);
    for (size_t e = 1; e < first.size(); e++) first[e] = first[e - 1] + f.plan.count[e - 1];
    std::vector<Block> work = blocks();
    i64 n_tasks = i64(f.plan.tasks.size()), n_work = i64(work.size());
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
      Carver size{nullptr};
      BackwardScratch(size, a);
      Carver c{own.get(size.used)};
      BackwardScratch b(c, a);
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < n_tasks; i++) pre_phase(f.plan.tasks[size_t(i)], b);
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 i = 0; i < n_work; i++) weight_phase(work[size_t(i)], first[size_t(work[size_t(i)].expert)], f.plan.count[size_t(work[size_t(i)].expert)], b);
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 e = 0; e < a.experts; e++) bias_phase(e, first[size_t(e)], f.plan.count[size_t(e)], b);
#pragma omp for schedule(dynamic, 1)
      for (i64 i = 0; i < n_tasks; i++)
        if (want_input()) input_phase(f.plan.tasks[size_t(i)], b);
#pragma omp for schedule(static)
      for (i64 t = 0; t < a.tokens; t++) combine(t, b.sum);
      own.trim();
    }
    shared.trim();
  }
};
