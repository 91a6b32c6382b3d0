// Entry point of the forward library. Returns 0, or 1 when there is no memory.
#include "forward.h"

extern "C" int moe_experts_forward(const Args* args) {
  try {
    Forward{*args, make_plan(*args), {args->act_ops, args->act_consts, args->n_act}, nullptr, nullptr}.run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
