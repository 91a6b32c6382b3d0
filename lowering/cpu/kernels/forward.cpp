// Entry point of the forward library. Returns 0, or 1 when there is no memory.
#include "forward.h"

extern "C" int moe_experts_forward(const Args* args) {
  try {
    Forward f = Forward::in_tiles(*args);
    run(f, f.tiles ? 2 * TILE : 8);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int moe_tiles_from(i64 rows) { return tiles_from_now(rows); }
