// The experts op as the dispatcher calls it: operands that were seen before go to their kernel without any Python.
//
// What a call's parameters come to (which kernel, its arguments but for the tokens) is worked out in Python, when they are first
// seen (../experts.py), and remembered here under everything that was looked at. What is unknown goes to the Python op, as does a call
// that wants a gradient.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "args.h"

namespace {

using at::Tensor;
using at::TensorList;
typedef int (*Kernel)(const Args*);

constexpr size_t MOST = 4096;  // operands that are remembered

// The op's plain arguments, as ops/schemas.py names them.
struct Plain {
  at::IntArrayRef act_ops;
  at::ArrayRef<double> act_consts;
  i64 form, num_experts;
  bool stacked, up_transposed, down_transposed, weight_on_input;
  i64 num_identity;
};

// Everything about a call's parameters but their values.
struct Key {
  std::vector<i64> seen;
  size_t hash = 0;
  bool operator==(const Key& o) const { return hash == o.hash && seen == o.seen; }

  void add(i64 v) {
    seen.push_back(v);
    hash = (hash ^ size_t(v)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  void add(const Tensor& t) {
    add(reinterpret_cast<i64>(t.const_data_ptr()));
    add(i64(t.scalar_type()));
    add(t.dim());
    for (i64 n : t.sizes()) add(n);
    for (i64 s : t.strides()) add(s);
  }
  void add(TensorList ts) {
    add(i64(ts.size()));
    for (const Tensor& t : ts) add(t);
  }
  void of(const Tensor& x, TensorList up, TensorList down, TensorList up_bias, TensorList down_bias, const Plain& p) {
    seen.clear(), hash = 0;
    add(i64(x.scalar_type()));
    add(x.dim() == 2 ? x.size(1) : -1);
    add(up), add(down), add(up_bias), add(down_bias);
    add(i64(p.act_ops.size()));
    for (i64 v : p.act_ops) add(v);
    for (double v : p.act_consts) {
      i64 bits;
      memcpy(&bits, &v, 8);
      add(bits);
    }
    add(p.form), add(p.num_experts), add(p.num_identity);
    add(p.stacked | p.up_transposed << 1 | p.down_transposed << 2 | p.weight_on_input << 3);
  }
};
struct HashOf {
  size_t operator()(const Key& k) const { return k.hash; }
};

// A parameter that packed panels were made of, where it lay then and how often it had been written to. The weak pointer keeps the address
// of the parameter from being given to another; that of its memory is kept by ../frozen.py.
struct Source {
  c10::weak_intrusive_ptr<c10::TensorImpl> parameter;
  const c10::StorageImpl* memory;
  i64 version;
  Source(const Tensor& t, i64 v) : parameter(t.getIntrusivePtr()), memory(t.storage().unsafeGetStorageImpl()), version(v) {}
  bool holds() const {
    if (parameter.expired()) return false;
    const c10::TensorImpl* p = parameter._unsafe_get_target();
    return p->unsafe_storage().unsafeGetStorageImpl() == memory && i64(p->version_counter().current_version()) == version;
  }
};

struct Plan {
  Args args;
  Kernel kernel;
  std::vector<i64> ops;
  std::vector<float> consts;
  std::vector<const void*> bases[4];
  std::vector<Source> sources;  // where panels are read in their place
  std::vector<Tensor> packed;

  Plan(const Args& a, Kernel k, i64 n_consts) : args(a), kernel(k), ops(a.act_ops, a.act_ops + a.n_act), consts(a.act_consts, a.act_consts + n_consts) {
    args.act_ops = ops.data(), args.act_consts = consts.data();
    own(args.up, 0, a.halves * (a.up_expert ? 1 : a.experts));
    own(args.down, 1, a.down_expert ? 1 : a.experts);
    own(args.up_bias, 2, a.halves * (a.up_bias_expert ? 1 : a.experts));
    own(args.down_bias, 3, a.down_bias_expert ? 1 : a.experts);
  }
  void own(const void* const*& list, size_t which, i64 n) {
    if (list) bases[which].assign(list, list + n), list = bases[which].data();
  }
  bool holds() const {
    for (const Source& s : sources)
      if (!s.holds()) return false;
    return true;
  }
};

std::unordered_map<Key, std::shared_ptr<const Plan>, HashOf> plans;
std::shared_mutex plans_lock;

std::shared_ptr<const Plan> find(const Key& key) {
  std::shared_lock<std::shared_mutex> lock(plans_lock);
  auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

// What the Python op is asked about on this thread.
struct Asked {
  Key key;
  bool open = false;
};
thread_local Asked asked;

bool rows_fit(const Tensor& x, const Tensor& ids, const Tensor& weights) {
  return x.dim() == 2 && ids.dim() == 2 && weights.sizes() == ids.sizes() && x.size(0) == ids.size(0) && ids.numel() > 0;
}

// Undefined where there is no memory.
Tensor run(const Plan& p, const Tensor& x, const Tensor& ids, const Tensor& weights, const std::optional<Tensor>& add) {
  const Tensor tokens = x.stride(1) == 1 ? x : x.contiguous(), i = ids.to(at::kLong).contiguous(), w = weights.to(at::kFloat).contiguous();
  const Tensor base = add ? add->to(x.scalar_type()).contiguous() : Tensor();
  Tensor out = at::detail::empty_cpu({x.size(0), p.args.out_features}, x.scalar_type());
  Args a = p.args;
  a.tokens = i.size(0), a.k = i.size(1), a.threads = at::get_num_threads();
  a.x = tokens.const_data_ptr(), a.x_stride = tokens.stride(0);
  a.ids = i.const_data_ptr<i64>(), a.weights = w.const_data_ptr<float>();
  a.add = base.defined() ? base.const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  return p.kernel(&a) ? Tensor() : out;
}

#define EXPERTS_ARGUMENTS                                                                                                                   \
  const Tensor &x, const Tensor &ids, const Tensor &weights, TensorList up, TensorList down, TensorList up_bias, TensorList down_bias,       \
      const std::optional<Tensor>&add, at::IntArrayRef act_ops, at::ArrayRef<double> act_consts, i64 form, i64 num_experts, bool stacked,     \
      bool up_transposed, bool down_transposed, bool weight_on_input, i64 num_identity
#define EXPERTS_GIVEN                                                                                                                       \
  x, ids, weights, up, down, up_bias, down_bias, add, act_ops, act_consts, form, num_experts, stacked, up_transposed, down_transposed,       \
      weight_on_input, num_identity
typedef Tensor Experts(EXPERTS_ARGUMENTS);

auto op(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Experts>(); }

Tensor experts(EXPERTS_ARGUMENTS) {
  static thread_local Key key;
  key.of(x, up, down, up_bias, down_bias, {act_ops, act_consts, form, num_experts, stacked, up_transposed, down_transposed, weight_on_input, num_identity});
  const std::shared_ptr<const Plan> plan = find(key);
  if (plan && rows_fit(x, ids, weights) && plan->holds()) {
    Tensor out = run(*plan, x, ids, weights, add);
    if (out.defined()) return out;
  }
  static const auto first = op("moe_compile::cpu_experts_first");
  struct Ask {
    Ask() { asked.key = key, asked.open = true; }
    ~Ask() { asked.open = false; }
  } ask;
  return first.call(EXPERTS_GIVEN);
}

bool wants_gradient(TensorList ts) {
  for (const Tensor& t : ts)
    if (t.requires_grad()) return true;
  return false;
}

Tensor experts_autograd(EXPERTS_ARGUMENTS) {
  static const auto below = op("moe_compile::experts"), with_gradient = op("moe_compile::cpu_experts_gradient");
  const bool wanted = c10::GradMode::is_enabled() &&
      (x.requires_grad() || weights.requires_grad() || (add && add->requires_grad()) || wants_gradient(up) || wants_gradient(down) ||
       wants_gradient(up_bias) || wants_gradient(down_bias));
  if (wanted) return with_gradient.call(EXPERTS_GIVEN);
  at::AutoDispatchBelowAutograd guard;
  return below.call(EXPERTS_GIVEN);
}

// What the parameters that this thread has just asked about come to: `args` the address of an Args without tokens, `kernel` of a function.
// `sources`, `versions`: the parameters that were packed, if they were. Nothing is remembered that nobody asked about.
void remember(i64 args, i64 kernel, i64 consts, TensorList sources, at::IntArrayRef versions, TensorList packed) {
  if (!asked.open) return;
  auto plan = std::make_shared<Plan>(*reinterpret_cast<const Args*>(args), reinterpret_cast<Kernel>(kernel), consts);
  for (size_t i = 0; i < versions.size(); i++) plan->sources.emplace_back(sources[i], versions[i]);
  plan->packed = packed.vec();
  std::unique_lock<std::shared_mutex> lock(plans_lock);
  if (plans.size() >= MOST) plans.clear();
  plans[asked.key] = std::move(plan);
}

// All plans, and their hold on packed weights, go.
void forget() {
  std::unique_lock<std::shared_mutex> lock(plans_lock);
  plans.clear();
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_compile, CPU, m) { m.impl("experts", &experts); }
TORCH_LIBRARY_IMPL(moe_compile, AutogradCPU, m) { m.impl("experts", &experts_autograd); }
TORCH_LIBRARY_IMPL(moe_compile, CompositeExplicitAutograd, m) {
  m.impl("cpu_remember", &remember);
  m.impl("cpu_forget", &forget);
}
