// Entry point of the library for weights in few bits. Returns 0, or 1 when there is no memory.
#define TILES_FROM 9  // up to eight rows are multiplied as codes are decoded
#include "coded_forward.h"

extern "C" int moe_experts_coded(const CodedArgs* args) {
  try {
    CodedForward f(*args);
    run(f, f.tiles ? 2 * TILE : 8);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int moe_tiles_from(i64 rows) { return tiles_from_now(rows); }
