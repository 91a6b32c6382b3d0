// The tile instructions in plain C++, for tests on processors without them (-DMOE_AMX_EMULATED): as Intel's manual has them, for
// tiles of 16 rows of 64 bytes. A tile that is used before they are set up ends the process.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "common.h"

struct EmulatedTiles {
  bool set = false;
  uint32_t tile[8][16][16];
  uint32_t (&at(int i))[16][16] {
    if (!set) fprintf(stderr, "a tile is used that was not set up\n"), abort();
    return tile[i];
  }
};
static thread_local EmulatedTiles emulated;

static void emulated_loadconfig(const void* setting) {
  const uint8_t* bytes = static_cast<const uint8_t*>(setting);
  for (int i = 0; i < 8; i++)
    if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[48 + i] != 16) fprintf(stderr, "other tiles than these\n"), abort();
  emulated.set = true;
}
static void emulated_release() { emulated.set = false; }
static void emulated_zero(int to) { memset(emulated.at(to), 0, 1024); }
static void emulated_loadd(int to, const void* base, i64 stride) {
  for (int i = 0; i < 16; i++) memcpy(emulated.at(to)[i], static_cast<const char*>(base) + i * stride, 64);
}
static void emulated_stored(int from, void* base, i64 stride) {
  for (int i = 0; i < 16; i++) memcpy(static_cast<char*>(base) + i * stride, emulated.at(from)[i], 64);
}
// Even and odd elements are summed apart, and both sums are added.
static void emulated_dpbf16ps(int to, int rows, int lanes) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      float sums[2] = {0.f, 0.f};
      for (int k = 0; k < 16; k++) {
        const uint32_t x = emulated.at(rows)[i][k], y = emulated.at(lanes)[k][j];
        sums[0] += bits_to_float(x << 16) * bits_to_float(y << 16), sums[1] += bits_to_float(x & 0xffff0000u) * bits_to_float(y & 0xffff0000u);
      }
      emulated.at(to)[i][j] = float_to_bits(bits_to_float(emulated.at(to)[i][j]) + (sums[0] + sums[1]));
    }
}

#undef _tile_loadconfig
#define _tile_loadconfig emulated_loadconfig
#undef _tile_release
#define _tile_release emulated_release
#undef _tile_zero
#define _tile_zero emulated_zero
#undef _tile_loadd
#define _tile_loadd emulated_loadd
#undef _tile_stored
#define _tile_stored emulated_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated_dpbf16ps
