// out = add + Σ_j w[t,j] · down act(up x[t]), in two phases: up and activation, expert by expert; then down, each thread for columns of its
// own, over all experts in their order, into fp32 sums [tokens, columns]. Sums and their order do not depend on the threads.
//
// Here is what the phases share; they themselves are in forward.h (weights as the model holds them) and packed.h.
#pragma once
#include "plan.h"

constexpr i64 MAX_BLOCK = 64;  // output columns that are worked on at a time, for ROWS rows

// One thread's scratch.
struct Scratch {
  unit* x_panel;      // tokens as a panel
  element* x_rows;    // tokens copied row by row
  element* w_rows;    // copied weight rows, or tokens once more (dots.h)
  unit* w_panel;      // copied weight columns
  float *g, *u, *a;   // a block of pre-activations and activations
  const unit* summed = nullptr;  // the panel whose sums w_panel begins with (coded_panel.h)
  Scratch(Carver& c, i64 depth) {
    i64 padded = up_to(depth, 2), block = up_to(MAX_BLOCK * up_to(ROWS, VL), RUN);
    x_panel = c.take<unit>(up_to(ROWS, VL) * padded);
    x_rows = c.take<element>(ROWS * row_stride(depth));
    w_rows = c.take<element>(ROWS * up_to(depth, 4 * STEP));
    w_panel = c.take<unit>(WIDE * padded);
    g = c.take<float>(block), u = c.take<float>(block), a = c.take<float>(block);
  }
};

struct Problem {
  const Args& a;
  Plan plan;
  Program program;
  element* act = nullptr;  // activations of all tasks
  bool tiles = false;      // whether products of many rows may run in tiles
  Problem(const Args& args, bool panels, RowByRow most = {})
      : a(args), plan(make_plan(args, panels, row_stride(args.inter), most)), program{args.act_ops, args.act_consts, args.n_act} {}

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

  i64 a_row() const { return row_stride(a.inter); }

  element input(i64 slot, const stored* x, i64 k) const {
    if (a.weight_on_input) return to_element(load(store(load(x[k]) * a.weights[slot])));
    return to_element(load(x[k]));
  }

  bool wants_tiles() const {
    return tiles && std::any_of(plan.tasks.begin(), plan.tasks.end(), [](const Task& t) { return t.rows >= tiles_from; });
  }
  // Whether a strip's rows are rows of tiles: they are evenly spaced then, and as many as a tile has may be read.
  static bool tiled(const Strip& p) { return tiles_on && !p.lanes && p.rows >= tiles_from; }

  // A strip's tokens as pointers to rows of whole units. Rows of tiles and rows that would meet in one or two sets of the cache are
  // copied; others, and rows on the way to a panel, are used where they lie.
  void input_rows(const Strip& p, const element** rows, element* copy) const {
    bool apart = p.lanes || p.rows == 1 || a.x_stride * i64(sizeof(stored)) % 2048;
    bool direct = DIRECT && !a.weight_on_input && a.hidden % PER == 0 && apart && !tiled(p);
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

  void activate(i64 used, Scratch& s) const {
    for (i64 i = 0; i < used; i += RUN) run_program<false>(program, s.g + i, s.u + i, s.a + i, nullptr, nullptr);
  }

  static void add_bias(const stored* bias, i64 stride, i64 n, i64 nb, float* out, i64 os, const Strip& p) {
    if (!bias) return;
    for (i64 i = 0; i < (p.lanes ? nb : p.rows); i++)
      for (i64 j = 0; j < (p.lanes ? os : nb); j++) out[i * os + j] += load(bias[(n + (p.lanes ? i : j)) * stride]);
  }

  // Activations of a strip's rows into its operand for the down product: rows of whole units.
  void put_rows(const Strip& p, i64 n, i64 nb, i64 os, const float* from) const {
    for (i64 r = 0; r < p.rows; r++) {
      element* to = act + p.a_at + r * a_row() + n;
      element_row(from + r * os, nb, to);
      if (n + nb == a.inter && a.inter % PER) to[nb] = element(0);
    }
  }

  static void add_output(const float* v, i64 n, float weight, float* to) {
    i64 j = 0;
    for (; j + VL <= n; j += VL) *(vf_any*)(to + j) += *(const vf_any*)(v + j) * weight;
    for (; j < n; j++) to[j] += v[j] * weight;
  }

  // What a token's sum of columns n0 .. n1 begins with: what is to be added, and experts that hand the token on.
  void begin_sum(i64 t, i64 n0, i64 n1, float* sum) const {
    const stored* add = a.add ? static_cast<const stored*>(a.add) + t * a.out_features : nullptr;
    for (i64 n = n0; n < n1; n++) sum[n - n0] = add ? load(add[n]) : 0.f;
    for (i64 p = t * a.k; a.identity && p < (t + 1) * a.k; p++)
      if (a.ids[p] >= a.experts && a.ids[p] < a.experts + a.identity)
        for (i64 n = n0; n < n1; n++) sum[n - n0] += load(token(p)[n]) * a.weights[p];
  }

  // Rows of pre-activations that belong to no expert are zero.
  void clear_rest_of_pre() const {
    i64 used = i64(plan.slots.size()), row = a.halves * a.inter;
    if (a.pre) memset(static_cast<stored*>(a.pre) + used * row, 0, size_t((a.tokens * a.k - used) * row) * sizeof(stored));
  }
};

// Both phases. `unit`: columns of up that a task is cut at.
template <class Phases>
static void run(Phases& f, i64 unit) {
  const Args& a = f.a;
  f.clear_rest_of_pre();
  thread_local Workspace shared, own;
  const i64 parts = parts_of(a), part = up_to((a.out_features + parts - 1) / parts, COLS);
  float* sums = nullptr;
  for (int pass = 0; pass < 2; pass++) {
    Carver c{pass ? shared.data : nullptr};
    f.act = c.take<element>(f.plan.a_size + (f.tiles ? TILE * f.a_row() : 0));  // the last tile's rows may be read
    sums = c.take<float>(a.tokens * part * parts);
    if (!pass) shared.get(c.used);
  }
  const std::vector<Task>& tasks = f.plan.tasks;
  const i64 n_tasks = i64(tasks.size()), chunks = chunks_of(f.plan, a.threads, a.inter);
  const i64 step = up_to((a.inter + chunks - 1) / chunks, unit);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
  {
    const Tiles tiles(f.wants_tiles());
    Carver size{nullptr};
    Scratch(size, std::max(a.hidden, a.inter));
    Carver c{own.get(size.used)};
    Scratch s(c, std::max(a.hidden, a.inter));
#pragma omp for schedule(dynamic, 1)
    for (i64 i = 0; i < n_tasks * chunks; i++) {
      i64 n = i % chunks * step;
      if (n < a.inter) f.up_phase(tasks[size_t(i / chunks)], n, std::min(a.inter, n + step), s);
    }
#pragma omp for schedule(dynamic, 1)
    for (i64 i = 0; i < parts; i++) {
      const i64 n0 = i * part, n1 = std::min(a.out_features, n0 + part), width = up_to(n1 - n0, COLS);
      if (n0 >= n1) continue;
      float* sum = sums + n0 * a.tokens;
      for (i64 t = 0; t < a.tokens; t++) f.begin_sum(t, n0, n1, sum + t * width);
      for (i64 j = 0; j < n_tasks; j++)
        f.down_phase(tasks[size_t(j)], j + 1 < n_tasks ? &tasks[size_t(j) + 1] : nullptr, n0, n1, sum, width, s);
      for (i64 t = 0; t < a.tokens; t++) store_row(sum + t * width, n1 - n0, static_cast<stored*>(a.out) + t * a.out_features + n0);
    }
    own.trim();
  }
  shared.trim();
}
