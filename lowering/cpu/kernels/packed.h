// Weights packed ahead of time, and the phases on them.
//
// up: [expert][panel][half][k][COLS] units; down: [expert][panel][k][COLS]. A panel is COLS output columns: one linear stream, which needs no
// sums across lanes and takes tokens as they are, any number of them. Columns past the last are zero, as is the second half of an odd last pair.
#pragma once
#include "problem.h"

constexpr int PACKED_MV = COLS / VL, PACKED_ROWS = ACC / PACKED_MV < 10 ? ACC / PACKED_MV : 10;
constexpr i64 FEW_ROWS = 4;                  // up to here the hardware keeps up with a linear stream by itself
#if defined(PAIRS) || defined(STORAGE_F32)
typedef unit packed;
#else
typedef stored packed;                       // widened as it is read
#endif

// What a pass over a panel asks for: `pace` bytes a step from `at` on, if there is anything.
struct Next {
  const packed* at;
  i64 pace;
};

template <int NR, bool ADDED>
static void packed_rows(const packed* panel, const element* const* rows, i64 n_units, const Out& out, bool more, const Next& to) {
  constexpr int U = NR * PACKED_MV >= 8 ? 1 : NR * PACKED_MV >= 4 ? 2 : 4;
  constexpr Fetch FETCH = NR > FEW_ROWS ? PACED : NOTHING;
  tile<PACKED_MV, NR, U, FETCH, ADDED>(panel, COLS, rows, n_units, out, more, to.at ? to.at : panel, to.at ? to.pace : 0);
}

template <bool ADDED, int... NR>
static inline void packed_rows_of(
    i64 n, const packed* panel, const element* const* rows, i64 n_units, const Out& out, bool more, const Next& to,
    std::integer_sequence<int, NR...>) {
  typedef void (*Kernel)(const packed*, const element* const*, i64, const Out&, bool, const Next&);
  static constexpr Kernel kernels[] = {packed_rows<NR + 1, ADDED>...};
  kernels[n - 1](panel, rows, n_units, out, more, to);
}

// out[r] [COLS] = Σ_k rows[r][k] panel[k][.] for up to ROWS rows, in groups of nearly equal size. Depth goes in blocks, so that the
// rows' and the panel's part of one fit the second-level cache together. While several groups pass over a block, the one behind it (at the
// end, what `last` says does) is brought in little by little.
template <bool ADDED>
static void packed_product(const packed* panel, const element* const* rows, i64 n, i64 n_units, bool last, const Out& out) {
  constexpr i64 DEEP = 1024;
  const i64 groups = (n + PACKED_ROWS - 1) / PACKED_ROWS;
  const element* part[ROWS];
  for (i64 k = 0; k < n_units; k += DEEP) {
    const i64 nu = std::min(DEEP, n_units - k), pass = nu * COLS / groups;
    const bool ends = k + DEEP >= n_units;
    for (i64 r = 0; r < n; r++) part[r] = rows[r] + k * PER;
    for (i64 g = 0, done = 0; g < groups; g++) {
      const i64 take = (n - done + groups - g - 1) / (groups - g), line = COLS * i64(sizeof(packed));
      const packed *at = panel + k * COLS, *next = at + nu * COLS + g * pass;
      // one pass: what comes AHEAD bytes later; several: the next block, each its share
      const Next to{groups == 1 ? at + AHEAD / i64(sizeof(packed)) : last && ends ? nullptr : next, groups == 1 ? line : line / groups + 1};
      packed_rows_of<ADDED>(
          take, at, part + done, nu, out.from(done), k > 0, to, std::make_integer_sequence<int, PACKED_ROWS>());
      done += take;
    }
  }
}

struct Packed {
  const Args& a;
  explicit Packed(const Args& args) : a(args) {}
  i64 up_panels() const { return (a.inter + COLS - 1) / COLS; }
  i64 down_panels() const { return (a.out_features + COLS - 1) / COLS; }
  i64 up_size() const { return up_panels() * a.halves * units(a.hidden) * COLS; }  // of one expert, in `packed`s
  i64 down_size() const { return down_panels() * units(a.inter) * COLS; }
  const packed* up(i64 e) const { return static_cast<const packed*>(a.packed_up) + e * up_size(); }
  const packed* down(i64 e) const { return static_cast<const packed*>(a.packed_down) + e * down_size(); }
};

// One panel: columns n0 .. n0 + COLS of a matrix.
static void pack_weights(const Matrix& m, i64 n0, packed* to) {
  i64 nb = std::min(COLS, m.n - n0), nu = units(m.k);
  typedef stored stored_any __attribute__((may_alias));
  stored_any* out = reinterpret_cast<stored_any*>(to);
  constexpr i64 BLOCK = 64;  // of k at a time, so that lines of rows and of the panel are used up while they are cached
  for (i64 k0 = 0; k0 < nu * PER; k0 += BLOCK)
    for (i64 c = 0; c < COLS; c++)
      for (i64 k = k0; k < std::min(k0 + BLOCK, nu * PER); k++)
        out[(k / PER * COLS + c) * PER + k % PER] = c < nb && k < m.k ? *m(n0 + c, k) : stored(0);
}

struct PackedForward : Problem {
  explicit PackedForward(const Args& args) : Problem(args, false) {}

  // A spot of each matrix that will be read, against the model's own: a different one for every expert. All are asked for first.
  bool spots_agree() const {
    bool agree = true;
    for (int look = 0; look < 2; look++)
      for (size_t i = 0; i < plan.tasks.size() && agree; i++) {
        const i64 e = plan.tasks[i].expert;
        if (i && e == plan.tasks[i - 1].expert) continue;
        const Packed p(a);
        for (i64 half = 0; half < a.halves; half++) agree &= spot(up(half, e), e, p.up(e) + half * units(a.hidden) * COLS, a.halves, look);
        agree &= spot(down(e), e, p.down(e), 1, look);
      }
    return agree;
  }

  // Panels of one half are `panels` panels apart.
  static bool spot(const Matrix& m, i64 e, const packed* from, i64 panels, bool look) {
    const i64 n = e * 5 % m.n, k = e * 3 % m.k;
    const packed* at = from + (n / COLS * panels * units(m.k) + k / PER) * COLS + n % COLS;
    const stored *mine = reinterpret_cast<const stored*>(at) + k % PER, *theirs = m(n, k);
    if (look) return !memcmp(mine, theirs, sizeof(stored));
    __builtin_prefetch(mine), __builtin_prefetch(theirs);
    return true;
  }

  // Pre-activations and activations of columns n0 .. n1, n0 a multiple of COLS.
  void up_phase(const Task& t, i64 n0, i64 n1, Scratch& s) const {
    const element* rows[ROWS];
    const Strip& p = t.strips[0];
    input_rows(p, rows, s.x_rows);
    const packed* from = Packed(a).up(t.expert);
    i64 size = units(a.hidden) * COLS;
    for (i64 n = n0; n < n1; n += COLS) {
      i64 j = n / COLS, nb = std::min(COLS, n1 - n);
      for (i64 half = 0; half < a.halves; half++) {
        float* out = half ? s.u : s.g;
        const packed* panel = from + (j * a.halves + half) * size;
        if (!tiled(p) || !panel_in_tiles(panel, rows, p, units(a.hidden), out))
          packed_product<false>(panel, rows, p.rows, units(a.hidden), n + COLS >= n1 && half + 1 == a.halves, Out{out, COLS});
        add_bias(up_bias(half, t.expert), a.up_bias_n, n, nb, out, COLS, p);
      }
      activate(p.rows * COLS, s);
      put_rows(p, n, nb, COLS, s.a);
    }
  }

  // out[r][COLS] of a panel and a strip's rows.
  static bool panel_in_tiles(const packed* panel, const element* const* rows, const Strip& p, i64 n_units, float* out) {
    return tile_product(panel, COLS, COLS, Spaced{rows, p.rows, ROWS}, n_units, out, COLS, Stream{}, true);
  }

  // Weighted outputs of columns n0 .. n1, n0 a multiple of COLS, added to `sums` [tokens, whole panels].
  void down_phase(const Task& t, const Task*, i64 n0, i64 n1, float* sums, i64 width, Scratch& s) const {
    const element* rows[ROWS];
    const Strip& p = t.strips[0];
    const i64* tokens = plan.tokens.data() + p.first;
    const float* weights = plan.weights.data() + p.first;
    for (i64 r = 0; r < p.rows; r++) rows[r] = act + p.a_at + r * a_row();
    const i64 size = units(a.inter) * COLS;
    const packed* from = Packed(a).down(t.expert) + n0 / COLS * size;
    for (i64 n = n0; n < n1; n += COLS, from += size) {
      if (tiled(p) && panel_in_tiles(from, rows, p, units(a.inter), s.g))
        for (i64 r = 0; r < p.rows; r++) add_output(s.g + r * COLS, COLS, weights[r], sums + tokens[r] * width + n - n0);
      else packed_product<true>(from, rows, p.rows, units(a.inter), n + COLS >= n1, Out{sums + n - n0, width, tokens, weights});
    }
    const stored* bias = down_bias(t.expert);
    for (i64 r = 0; bias && r < p.rows; r++)
      for (i64 n = n0; n < n1; n++) sums[tokens[r] * width + n - n0] += load(bias[n]) * weights[r];
  }
};
