// Entry point of the library for weights in few bits. Returns 0, or 1 when there is no memory.
#include "coded_forward.h"

extern "C" int moe_experts_coded(const CodedArgs* args) {
  try {
    CodedForward f(*args);
    run(f, 8);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
