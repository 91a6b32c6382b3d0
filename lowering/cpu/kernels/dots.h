// Products for a handful of rows: vectors run along k of both operands, so that weight rows are read once, as they lie.
//
// Weights come from memory here, at its speed or not at all. Weight rows are taken one or two at a time, four behind one another in a
// set whose sums are folded together: memory then sees one linear stream. With several rows of x a set takes longer than the hardware
// looks ahead, so that each set asks for the one some 16 KB on, into the second-level cache: the first one has no room (docs/cpu.md).
#pragma once
#include "vec.h"

constexpr i64 AHEAD = 16 << 10;              // bytes
constexpr i64 DOT_ROWS = 6, DOT_SET = 4;     // rows of x in one go at most, weight rows in a set
constexpr i64 DOT_BLOCK = 16;                // weight rows that stay cached while several groups of x pass

// A run of `rows` weight rows and what will be read after it, for prefetching; `next` may be null.
struct Stream {
  const stored* base = nullptr;
  i64 stride = 0, rows = 0;
  const stored* next = nullptr;
  // Where `ahead` rows behind row i are; in the run itself where nothing is known to follow.
  const stored* at(i64 i, i64 ahead) const {
    i64 r = i + ahead;
    if (r < rows) return base + r * stride;
    return next ? next + (r - rows) * stride : base + i * stride;
  }
  // Rows that are AHEAD bytes, in whole groups.
  i64 distance(i64 group) const { return up_to(std::max<i64>(AHEAD / std::max<i64>(stride * i64(sizeof(stored)), 1), 1), group); }
};

// Sums that one accumulator set keeps along k, so that enough of them are under way.
constexpr int dot_unroll(int m, int n) {
  int room = ACC * 2 / 3 / (m * n), most = m == 1 ? 8 : 4, u = 1;
  while (u * 2 <= room && u * 2 <= most) u *= 2;
  return u;
}

// out[m * os + i] = Σ_k x[m][k] w[i][k] for M rows of x and S weight rows, N of them side by side. FETCH: rows `ahead` are asked for.
template <int M, int N, int S, bool FETCH>
static inline void dot_set(const element* const* x, const stored* w, i64 ws, i64 depth, const stored* ahead, float* out, i64 os) {
  constexpr int U = dot_unroll(M, N);
  vf sums[S * M];
  each<S / N>(EACH_OF(g) {
    constexpr int i = g * N;
    vf acc[U * N * M];
    each<U * N * M>(EACH_OF(j) { acc[j] = vf{}; });
    const stored *row = w + i * ws, *next = ahead + i * ws;
    i64 k = 0;
    for (; k + U * STEP <= depth; k += U * STEP)
      each<U>(EACH_OF(u) {
        const i64 at = k + u * STEP;
        vu b[N];
        each<N>(EACH_OF(n) {
          b[n] = load_stored(row + n * ws + at);
          if (M > 1) b[n] = in_register(b[n]);
          if (FETCH) __builtin_prefetch(next + n * ws + at, 0, 2);
        });
        each<M>(EACH_OF(m) {
          vu a = load_units(x[m] + at);
          each<N>(EACH_OF(n) { acc[(u * N + n) * M + m] = madd(acc[(u * N + n) * M + m], a, b[n]); });
        });
      });
    for (; k < depth; k += STEP) {
      i64 left = depth - k;
      each<N>(EACH_OF(n) {
        vu b = left < STEP ? load_part_stored(row + n * ws + k, left) : load_stored(row + n * ws + k);
        each<M>(EACH_OF(m) { acc[n * M + m] = madd(acc[n * M + m], left < STEP ? load_part(x[m] + k, left) : load_units(x[m] + k), b); });
      });
    }
    each<N * M>(EACH_OF(j) {
      sums[i * M + j] = acc[j];
      each<U - 1>(EACH_OF(u) { sums[i * M + j] += acc[(u + 1) * N * M + j]; });
    });
  });
  each<M>(EACH_OF(m) {
    if constexpr (S == 4) sum4(sums[m], sums[M + m], sums[2 * M + m], sums[3 * M + m], out + m * os);
    else out[m * os] = sum_lanes(sums[m]);
  });
}

// M rows of x against n weight rows, those from `first` of `all` on.
template <int M>
static void dot_group(const element* const* x, const Stream& all, i64 first, i64 n, bool fetch, i64 depth, float* out, i64 os) {
  constexpr int N = M > 4 ? 2 : 1;
  const i64 far = all.distance(DOT_SET);
  i64 i = 0;
  for (; i + DOT_SET <= n; i += DOT_SET) {
    const stored* w = all.base + (first + i) * all.stride;
    if (M > 1 && fetch) dot_set<M, N, DOT_SET, true>(x, w, all.stride, depth, all.at(first + i, far), out + i, os);
    else dot_set<M, N, DOT_SET, false>(x, w, all.stride, depth, w, out + i, os);
  }
  for (; i < n; i++) {
    const stored* w = all.base + (first + i) * all.stride;
    dot_set<M, 1, 1, false>(x, w, all.stride, depth, w, out + i, os);
  }
}

// out[m][i] for any m and all weight rows: rows of x in groups, weight rows in blocks that stay cached across the groups.
// `fetch`: the weights are not cached yet.
static void dots(const element* const* x, i64 m, const Stream& all, i64 depth, float* out, i64 os, bool fetch) {
  const i64 groups = (m + DOT_ROWS - 1) / DOT_ROWS, block = groups > 1 ? DOT_BLOCK : all.rows;
  for (i64 i = 0; i < all.rows; i += block) {
    i64 n = std::min(block, all.rows - i), done = 0;
    for (i64 g = 0; g < groups; g++) {
      i64 take = (m - done + groups - g - 1) / (groups - g);
      const element* const* xg = x + done;
      float* o = out + done * os + i;
      switch (take) {
        case 1: dot_group<1>(xg, all, i, n, fetch && g == 0, depth, o, os); break;
        case 2: dot_group<2>(xg, all, i, n, fetch && g == 0, depth, o, os); break;
        case 3: dot_group<3>(xg, all, i, n, fetch && g == 0, depth, o, os); break;
        case 4: dot_group<4>(xg, all, i, n, fetch && g == 0, depth, o, os); break;
        case 5: dot_group<5>(xg, all, i, n, fetch && g == 0, depth, o, os); break;
        default: dot_group<6>(xg, all, i, n, fetch && g == 0, depth, o, os);
      }
      done += take;
    }
  }
}
