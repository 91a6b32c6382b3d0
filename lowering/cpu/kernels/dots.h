// Products for a handful of rows: vectors run along k of both operands, so that weight rows are read once, as they lie.
//
// Weights come from memory here, at its speed or not at all. Weight rows are taken one or two at a time, four behind one another in a set
// whose sums are folded together: memory then sees one linear stream. With several rows of x a set takes longer than the hardware looks
// ahead, so that each set asks for the one some 16 KB on, into the second-level cache. The first-level cache is for the rows of x: where
// they are too long for it, depth goes in blocks. Measurements: docs/cpu.md.
#pragma once
#if defined(__linux__)
#include <unistd.h>
#endif

#include "vec.h"

constexpr i64 ROWS = 128;                     // most rows of one task
constexpr i64 AHEAD = 16 << 10;               // bytes
constexpr i64 TOUCH = 2 << 10;                // bytes of the next stream that are asked for while one row of x goes along another
constexpr i64 DOT_ROWS = ACC / 2, DOT_SET = 4;  // rows of x in one go at most, weight rows in a set
constexpr i64 DOT_BLOCK = 16;                 // weight rows that stay cached while several blocks of depth, or groups of rows, pass

// Bytes of x that stay in the first-level cache while weights pass.
static i64 dot_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const i64 size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  static const i64 size = 0;
#endif
  return size > 0 ? size - size / 4 : 24 << 10;
}

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

// out[m * os + i] = [out +] Σ_k x[m][k] w[i][k] for M rows of x and S weight rows, N of them side by side. Rows `ahead` are asked for.
template <int M, int N, int S>
static inline void dot_set(
    const element* const* x, const stored* w, i64 ws, i64 k0, i64 k1, const stored* ahead, float* out, i64 os, bool more) {
  constexpr int U = dot_unroll(M, N);
  vf sums[S * M];
  each<S / N>(EACH_OF(g) {
    constexpr int i = g * N;
    vf acc[U * N * M];
    each<U * N * M>(EACH_OF(j) { acc[j] = vf{}; });
    const stored *row = w + i * ws, *next = ahead + i * ws;
    i64 k = k0;
    for (; k + U * STEP <= k1; k += U * STEP)
      each<U>(EACH_OF(u) {
        const i64 at = k + u * STEP;
        vu b[N];
        each<N>(EACH_OF(n) {
          b[n] = load_stored(row + n * ws + at);
          if (M > 1) b[n] = in_register(b[n]), __builtin_prefetch(next + n * ws + at, 0, 2);
        });
        each<M>(EACH_OF(m) {
          vu a = load_units(x[m] + at);
          if (N > 1) a = in_register(a);
          each<N>(EACH_OF(n) { acc[(u * N + n) * M + m] = madd(acc[(u * N + n) * M + m], a, b[n]); });
        });
      });
    for (; k < k1; k += STEP) {
      const i64 left = k1 - k;
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
    alignas(16) float s[S];
    if constexpr (S == 4) sum4(sums[m], sums[M + m], sums[2 * M + m], sums[3 * M + m], s);
    else s[0] = sum_lanes(sums[m]);
    each<S>(EACH_OF(i) { out[m * os + i] = more ? out[m * os + i] + s[i] : s[i]; });
  });
}

// M rows of x against n weight rows, those from `first` of `all` on, between k0 and k1.
template <int M>
static void dot_group(
    const element* const* x, const Stream& all, i64 first, i64 n, bool fetch, i64 k0, i64 k1, float* out, i64 os) {
  constexpr int N = M > 4 ? 2 : 1;
  const i64 far = all.distance(DOT_SET);
  i64 i = 0;
  for (; i + DOT_SET <= n; i += DOT_SET) {
    const stored* w = all.base + (first + i) * all.stride;
    dot_set<M, N, DOT_SET>(x, w, all.stride, k0, k1, fetch ? all.at(first + i, far) : w, out + i, os, k0 > 0);
  }
  for (; i < n; i++) {
    const stored* w = all.base + (first + i) * all.stride;
    for (int m = 0; m < M; m++) dot_set<1, 1, 1>(x + m, w, all.stride, k0, k1, w, out + m * os + i, os, k0 > 0);
  }
}

template <int... M>
static inline void dot_group_of(
    i64 m, const element* const* x, const Stream& all, i64 first, i64 n, bool fetch, i64 k0, i64 k1, float* out, i64 os,
    std::integer_sequence<int, M...>) {
  typedef void (*Kernel)(const element* const*, const Stream&, i64, i64, bool, i64, i64, float*, i64);
  static constexpr Kernel kernels[] = {dot_group<M + 1>...};
  kernels[m - 1](x, all, first, n, fetch, k0, k1, out, os);
}

// out[m][i] for any m and all weight rows: rows of x in groups, depth in blocks. `fetch`: the weights are not cached yet. `room`: memory for
// the rows of x, block by block of depth, so that a block fills the cache evenly; or null, and depth goes in one.
static void dots(const element* const* x, i64 m, const Stream& all, i64 depth, element* room, float* out, i64 os, bool fetch) {
  const i64 groups = (m + DOT_ROWS - 1) / DOT_ROWS, fits = dot_cache() / ((m + groups - 1) / groups * i64(sizeof(element)));
  const i64 parts = room && m > 1 ? (depth + fits - 1) / fits : 1, deep = up_to((depth + parts - 1) / parts, 4 * STEP);
  const i64 block = groups > 1 ? DOT_BLOCK : parts > 1 ? 4 * DOT_BLOCK : all.rows;
  for (i64 k = 0; parts > 1 && k < depth; k += deep)
    for (i64 r = 0; r < m; r++) memcpy(room + k * m + r * deep, x[r] + k, size_t(std::min(deep, depth - k)) * sizeof(element));
  if (m == 1 && all.next)  // the hardware follows a stream, but not to another place
    for (i64 b = 0; b < TOUCH; b += 64) __builtin_prefetch((const char*)all.next + b, 0, 2);
  const element* rows[ROWS];
  for (i64 i = 0; i < all.rows; i += block) {
    const i64 n = std::min(block, all.rows - i);
    for (i64 k = 0; k < depth; k += deep) {
      for (i64 r = 0; r < m; r++) rows[r] = parts > 1 ? room + k * m + r * deep - k : x[r];
      for (i64 g = 0, done = 0; g < groups; g++) {
        const i64 take = (m - done + groups - g - 1) / (groups - g);
        dot_group_of(
            take, rows + done, all, i, n, fetch && g == 0, k, std::min(depth, k + deep), out + done * os + i, os,
            std::make_integer_sequence<int, DOT_ROWS>());
        done += take;
      }
    }
  }
}
