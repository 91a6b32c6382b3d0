// Entry point of the gradient library. Returns 0, or 1 when there is no memory.
#include "backward.h"

extern "C" int moe_experts_backward(const Args* args) {
  try {
    Forward forward(*args);
    Backward{*args, forward, nullptr, nullptr, nullptr}.run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
