// Scores of all experts to the weights and ids of the selected ones, token by token.
#include <limits>

#include "common.h"

// The plain numbers of a gating; ../route.py mirrors this struct field by field.
struct Gating {
  i64 experts, k, score_selected, bias_in_weights, groups, kept, best, norm;
  float fill, eps, clamp, scale;
};
enum { AS_IS = 0, SOFTMAX = 1, SIGMOID = 2 };  // of the selected, when scores come after the selection
enum { NONE = 0, SUM = 1, MAX = 2 };           // ir.Norm

// The k largest of n values, largest first. False when torch alone knows its choice: a value is NaN, or equals the last one chosen.
static bool top(const float* values, i64 n, i64 k, float* best, i64* ids) {
  i64 have = 0;
  float tied = std::numeric_limits<float>::quiet_NaN();  // largest value that was left out
  for (i64 e = 0; e < n; e++) {
    float v = values[e];
    if (v != v) return false;
    if (have == k && !(v > best[k - 1])) {
      if (!(v <= tied)) tied = v;
      continue;
    }
    if (have == k && !(best[k - 1] <= tied)) tied = best[k - 1];
    i64 at = have < k ? have++ : k - 1;
    for (; at > 0 && v > best[at - 1]; at--) best[at] = best[at - 1], ids[at] = ids[at - 1];
    best[at] = v, ids[at] = e;
  }
  return !(tied == best[k - 1]);
}

struct Scratch {
  std::vector<float> choice, best, rank;
  std::vector<i64> ids, kept;
  std::vector<char> in;
  explicit Scratch(const Gating& g)
      : choice(g.experts), best(g.experts), rank(g.groups), ids(g.experts), kept(g.groups), in(g.groups) {}
};

// Values of experts outside the kept groups become `fill`.
static bool keep_groups(const Gating& g, Scratch& s) {
  i64 size = g.experts / g.groups;
  for (i64 i = 0; i < g.groups; i++) {
    for (i64 j = 0; j < size; j++)
      if (s.choice[i * size + j] != s.choice[i * size + j]) return false;
    top(&s.choice[i * size], size, g.best, s.best.data(), s.ids.data());  // only the values count
    float sum = 0;
    for (i64 j = 0; j < g.best; j++) sum += s.best[j];
    s.rank[i] = sum, s.in[i] = 0;
  }
  if (!top(s.rank.data(), g.groups, g.kept, s.best.data(), s.kept.data())) return false;
  for (i64 j = 0; j < g.kept; j++) s.in[s.kept[j]] = 1;
  for (i64 e = 0; e < g.experts; e++)
    if (!s.in[e / size]) s.choice[e] = g.fill;
  return true;
}

static void score_selected(const Gating& g, float* w) {
  if (g.score_selected == SIGMOID)
    for (i64 j = 0; j < g.k; j++) w[j] = 1.f / (1.f + std::exp(-w[j]));
  if (g.score_selected != SOFTMAX) return;
  float most = w[0], sum = 0;
  for (i64 j = 1; j < g.k; j++) most = w[j] > most ? w[j] : most;
  for (i64 j = 0; j < g.k; j++) sum += w[j] = std::exp(w[j] - most);
  for (i64 j = 0; j < g.k; j++) w[j] /= sum;
}

static void normalise(const Gating& g, float* w) {
  if (g.norm == NONE) return;
  float d = w[0];
  for (i64 j = 1; j < g.k; j++) d = g.norm == SUM ? d + w[j] : w[j] > d ? w[j] : d;
  if (g.clamp != 0 && d < g.clamp) d = g.clamp;
  d += g.eps;
  for (i64 j = 0; j < g.k; j++) w[j] /= d;
}

static bool route(const Gating& g, const float* by, const float* raw, const float* bias, const float* table, float* w, i64* ids, Scratch& s) {
  for (i64 e = 0; e < g.experts; e++) s.choice[e] = bias ? by[e] + bias[e] : by[e];
  if (g.groups && !keep_groups(g, s)) return false;
  if (!top(s.choice.data(), g.experts, g.k, s.best.data(), ids)) return false;
  for (i64 j = 0; j < g.k; j++) w[j] = raw[ids[j]];
  score_selected(g, w);
  if (g.bias_in_weights)
    for (i64 j = 0; j < g.k; j++) w[j] += bias[ids[j]];
  normalise(g, w);
  for (i64 j = 0; j < g.k; j++) w[j] *= table ? g.scale * table[ids[j]] : g.scale;
  return true;
}

// Selection by `by` [tokens, experts] + bias [experts] (or null), weights from `raw` [tokens, experts], times table [experts] (or null)
// -> w and ids [tokens, k]. Returns 0; 1 when there is no memory or torch alone knows its choice.
extern "C" int moe_route(
    const Gating* g, i64 tokens, i64 threads, const float* by, const float* raw, const float* bias, const float* table, float* w, i64* ids) {
  try {
    std::vector<Scratch> own(size_t(threads), Scratch{*g});  // before the threads start: none of them may throw
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1) reduction(| : failed)
    for (i64 t = 0; t < tokens; t++)
      failed |= !route(*g, by + t * g->experts, raw + t * g->experts, bias, table, w + t * g->k, ids + t * g->k, own[size_t(thread_id())]);
    return failed;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
