// The arguments of the experts kernels; ../call.py mirrors the struct field by field.
#pragma once
#include <cstdint>

typedef int64_t i64;

struct Args {
  i64 tokens, k, experts, identity, hidden, inter, out_features;
  i64 halves, weight_on_input, threads, n_act;
  const void* x;         // [tokens, hidden], rows x_stride apart
  const void* grad;      // backward: [tokens, out_features], contiguous
  const i64* ids;        // [tokens, k]
  const float* weights;  // [tokens, k]
  const void* const* up;         // base pointers of gate (and up): one per half (stacked) or per expert and half
  const void* const* down;
  const void* packed_up;         // or null: what moe_pack made of up and down (packed.h), read in their place
  const void* packed_down;
  const void* const* up_bias;    // or null
  const void* const* down_bias;  // or null
  const void* add;       // or null: [tokens, out_features], contiguous
  const i64* act_ops;
  const float* act_consts;
  void* out;             // forward: [tokens, out_features]; backward: grad of x or null
  void* pre;             // [tokens * k, halves * inter] or null
  float* grad_weights;   // backward: [tokens, k] or null
  void* const* grad_up;  // like up, null entries are not wanted
  void* const* grad_down;
  void* const* grad_up_bias;
  void* const* grad_down_bias;
  i64 x_stride;
  i64 up_expert, up_n, up_k;      // strides of the up tensors: expert (stacked), output, input; 0 expert stride: a list
  i64 down_expert, down_n, down_k;
  i64 up_bias_expert, up_bias_n, down_bias_expert;
  i64 grad_up_expert, grad_up_n, grad_up_k;
  i64 grad_down_expert, grad_down_n, grad_down_k;
};
