// Entry points of the library for packed weights: packing them, and the experts op on them. Each returns 0, 1 when there is no memory, or
// 2 when the weights are no longer what was packed.
#define TILES_FROM 2  // packed weights lie as tiles read them
#include "packed.h"

extern "C" int moe_experts_forward(const Args* args) {
  try {
    PackedForward f(*args);
    if (!f.spots_agree()) return 2;
    f.tiles = tiles_allowed();
    run(f, COLS);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int moe_tiles_from(i64 rows) { return tiles_from_now(rows); }

// Bytes of packed up (which 0) or down (which 1) weights.
extern "C" i64 moe_packed_bytes(const Args* args, i64 which) {
  Packed p(*args);
  return args->experts * (which ? p.down_size() : p.up_size()) * i64(sizeof(packed));
}

// Huge pages for memory that nothing has been written to yet: a stream through many experts misses the translation caches less.
static void in_huge_pages([[maybe_unused]] const void* at, [[maybe_unused]] i64 bytes) {
#if defined(__linux__)
  const uintptr_t first = (uintptr_t(at) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = (uintptr_t(at) + uintptr_t(bytes)) / HUGE_PAGE * HUGE_PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Fills args->packed_up and args->packed_down.
extern "C" int moe_pack(const Args* args) {
  try {
    const Args& a = *args;
    PackedForward f(a);
    Packed p(a);
    in_huge_pages(a.packed_up, moe_packed_bytes(args, 0)), in_huge_pages(a.packed_down, moe_packed_bytes(args, 1));
    const i64 ups = p.up_panels() * a.halves, all = ups + p.down_panels();
#pragma omp parallel for schedule(static) num_threads(int(a.threads)) if (a.threads > 1)
    for (i64 i = 0; i < a.experts * all; i++) {
      i64 e = i / all, j = i % all;
      if (j < ups) pack_weights(f.up(j % a.halves, e), j / a.halves * COLS, const_cast<packed*>(p.up(e)) + j * units(a.hidden) * COLS);
      else pack_weights(f.down(e), (j - ups) * COLS, const_cast<packed*>(p.down(e)) + (j - ups) * units(a.inter) * COLS);
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
