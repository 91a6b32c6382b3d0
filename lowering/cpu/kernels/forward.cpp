// Entry point of the forward library. Returns 0, or 1 when there is no memory.
#include "forward.h"

extern "C" int moe_experts_forward(const Args* args) {
  try {
    Forward f(*args);
    run(f, 8);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
