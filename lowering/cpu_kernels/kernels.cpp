// Entry points; built once per storage type by lowering/cpu_build.py. They return 0, or 1 when there is no memory.
#include "backward.h"

static Forward prepare(const Args& a) { return {a, make_plan(a), {a.act_ops, a.act_consts, a.n_act}, nullptr, nullptr}; }

extern "C" int moe_experts_forward(const Args* args) {
  try {
    prepare(*args).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int moe_experts_backward(const Args* args) {
  try {
    Backward{*args, prepare(*args), nullptr, nullptr, nullptr}.run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
