// Products in tiles (AMX): 16 rows of 16 pairs of bf16, times 16 pairs of 16 lanes, added to 16 x 16 floats; two by two such sums at a time.
//
// Either operand may be the weights. As the model holds them they are the rows, which tiles read where they lie, and tokens are the
// panel; weights packed ahead (packed.h), or columns that a panel was made of, are the panel, and tokens are the rows.
// Whether a process may use tiles is asked when it first calls: the processor has them and the kernel grants the state they need. A
// thread sets them up for one call and releases them behind it; outside of that, and without them, products are vectors.
#pragma once
#include "dots.h"

#if defined(PAIRS) && defined(MOE_AMX_EMULATED)
#include "amx_emulated.h"
#define TILES
#elif defined(PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#define TILES
#endif

constexpr i64 TILE = 16;  // rows, units of depth and lanes of a tile

#if defined(TILES)
// From so many rows of an expert on tiles are used, two at least: docs/cpu.md has the measurements. Tests and benchmarks change it.
#ifndef TILES_FROM
#define TILES_FROM 5
#endif
static i64 tiles_from = TILES_FROM;

#if defined(MOE_AMX_EMULATED)
static bool tiles_allowed() { return true; }
#else
static bool tiles_allowed() {
  static const bool allowed = [] {
    constexpr unsigned BF16 = 1u << 22, TILES_THEMSELVES = 1u << 24;  // cpuid, leaf 7, edx
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;                  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILES_THEMSELVES)) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return allowed;
}
#endif

static thread_local bool tiles_on = false;

// A thread's tiles, for as long as this lives.
struct Tiles {
  struct Setting {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
  };
  const bool on;
  explicit Tiles(bool wanted) : on(wanted) {
    if (!on) return;
    alignas(64) static const Setting setting;
    _tile_loadconfig(&setting);
    tiles_on = true;
  }
  ~Tiles() {
    if (!on) return;
    _tile_release();
    tiles_on = false;
  }
  Tiles(const Tiles&) = delete;
};

// One operand of a product: rows of a block of depth, and (of the rows) where the second tile's begin. Bytes.
struct TileRows {
  const char *first, *second;
  i64 stride;
};

// 16 units of depth: MA tiles of rows times MB tiles of lanes, which lie side by side in the panel.
template <int MA, int MB>
__attribute__((always_inline)) static inline void tile_step(const TileRows& a, const char* b, i64 bs) {
  _tile_loadd(6, b, bs);
  _tile_loadd(4, a.first, a.stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (MB > 1) {
    _tile_loadd(7, b + 64, bs);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (MA > 1) {
    _tile_loadd(5, a.second, a.stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (MB > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// The last units of depth, fewer than a tile has: copies with zeros behind them.
template <int MA, int MB>
static void tile_rest(const TileRows& a, const char* b, i64 bs, i64 left) {
  alignas(64) char rows[MA * TILE * 64] = {}, lanes[TILE * MB * 64] = {};
  for (i64 i = 0; i < TILE; i++) memcpy(rows + i * 64, a.first + i * a.stride, size_t(left * 4));
  for (i64 i = 0; MA > 1 && i < TILE; i++) memcpy(rows + (TILE + i) * 64, a.second + i * a.stride, size_t(left * 4));
  for (i64 k = 0; k < left; k++) memcpy(lanes + k * MB * 64, b + k * bs, MB * 64);
  asm volatile("" ::: "memory");  // the compiler does not know what a tile is loaded from
  tile_step<MA, MB>({rows, rows + (MA - 1) * TILE * 64, 64}, lanes, MB * 64);
}

// 32 lines that are asked for with every block of depth: `apart` bytes from one another, and from block to block.
struct Lines {
  const char* at = nullptr;
  i64 apart = 0, step = 0;
};

// out[i][0 .. MB tiles) = Σ_k rows[i][k] panel[k][.] for one or two tiles of rows, whose sums go to `to`, os floats apart.
template <int MA, int MB>
static void tile_sums(TileRows a, const char* b, i64 bs, i64 n_units, float* const to[2], i64 os, const Lines& lines) {
  asm volatile("" ::: "memory");  // as above
  _tile_zero(0);
  if constexpr (MB > 1) _tile_zero(1);
  if constexpr (MA > 1) _tile_zero(2);
  if constexpr (MA > 1 && MB > 1) _tile_zero(3);
  const char* ahead = lines.at;
  i64 k = 0;
  for (; k + TILE <= n_units; k += TILE, a.first += 64, a.second += 64, b += TILE * bs, ahead += ahead ? lines.step : 0) {
    if (const char* line = ahead)
      for (int i = 0; i < 32; i++, line += lines.apart) __builtin_prefetch(line, 0, 2);
    tile_step<MA, MB>(a, b, bs);
  }
  if (k < n_units) tile_rest<MA, MB>(a, b, bs, n_units - k);
  _tile_stored(0, to[0], os * 4);
  if constexpr (MB > 1) _tile_stored(1, to[0] + TILE, os * 4);
  if constexpr (MA > 1) _tile_stored(2, to[1], os * 4);
  if constexpr (MA > 1 && MB > 1) _tile_stored(3, to[1] + TILE, os * 4);
}

// Rows as they are read: evenly spaced, and how many may be read, which may be more than there are.
struct Spaced {
  const element* const* rows;
  i64 n, readable;
  i64 stride() const { return n > 1 ? (rows[1] - rows[0]) * i64(sizeof(element)) : 0; }
  bool even() const {
    for (i64 r = 2; r < n; r++)
      if (rows[r] - rows[r - 1] != rows[1] - rows[0]) return false;
    return true;
  }
  const char* at(i64 r) const { return reinterpret_cast<const char*>(rows[0]) + r * stride(); }
};

// One tile of lanes, or two, of all rows. The last rows are taken with those before them again where a tile would not be full.
template <int MB>
static void tile_lanes(const char* b, i64 bs, const Spaced& in, i64 n_units, float* out, i64 os, const Stream& s, bool linear) {
  if (in.n < TILE) {
    alignas(64) float sums[TILE * MB * TILE];
    float* to[2] = {sums, sums};
    tile_sums<1, MB>({in.at(0), in.at(0), in.stride()}, b, bs, n_units, to, MB * TILE, linear ? Lines{b + AHEAD, 64, TILE * bs} : Lines{});
    for (i64 r = 0; r < in.n; r++) memcpy(out + r * os, sums + r * MB * TILE, MB * TILE * sizeof(float));
    return;
  }
  const i64 far = s.base ? s.distance(2 * TILE) : 0;
  for (i64 r = 0; r < in.n; r += 2 * TILE) {
    const i64 first = std::min(r, in.n - TILE), second = std::min(r + TILE, in.n - TILE);
    float* to[2] = {out + first * os, out + second * os};
    const Lines lines = s.base ? Lines{reinterpret_cast<const char*>(s.at(first, far)), s.stride * i64(sizeof(stored)), 64}
        : linear && !r ? Lines{b + AHEAD, 64, TILE * bs} : Lines{};
    const TileRows a{in.at(first), in.at(second), in.stride()};
    if (r + TILE < in.n) tile_sums<2, MB>(a, b, bs, n_units, to, os, lines);
    else tile_sums<1, MB>(a, b, bs, n_units, to, os, lines);
  }
}

// out[r][0 .. lanes) = Σ_k rows[r][k] panel[k][lane], a panel `stride` units wide; false where tiles do not take it. `s`: the rows as they
// lie in memory, where they come from there; `linear`: the panel does.
static bool tile_product(const unit* panel, i64 stride, i64 lanes, const Spaced& in, i64 n_units, float* out, i64 os, const Stream& s, bool linear) {
  if (!tiles_on || in.readable < TILE || !in.even()) return false;
  for (i64 l = 0; l < lanes; l += 2 * TILE) {
    const char* b = reinterpret_cast<const char*>(panel + l);
    const i64 bs = stride * i64(sizeof(unit));
    if (lanes - l > TILE) tile_lanes<2>(b, bs, in, n_units, out + l, os, l ? Stream{} : s, linear);
    else tile_lanes<1>(b, bs, in, n_units, out + l, os, l ? Stream{} : s, linear && bs == 64);
  }
  return true;
}

// For the libraries' entry point of that name: tiles from `rows` on where that is not 0; tells whether this process may use any.
static int tiles_from_now(i64 rows) {
  if (rows) tiles_from = std::max<i64>(rows, 2);
  return tiles_allowed();
}
#else
constexpr i64 tiles_from = INT64_MAX;
constexpr bool tiles_on = false;
constexpr bool tiles_allowed() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
struct Spaced {
  const element* const* rows;
  i64 n, readable;
};
template <class P>
static bool tile_product(const P*, i64, i64, const Spaced&, i64, float*, i64, const Stream&, bool) { return false; }
static int tiles_from_now(i64) { return 0; }
#endif
