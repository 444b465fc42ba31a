// From tensors to LinearAttentionInputs, for the operators that contain linear attention.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/cuda_backend.h"
#include "common/op_inputs.h"
#include "linear_attention/linear_attention.h"

namespace statecore {

// ---- backends: what they take of tensors (`aligned` may be a copy), and their entry points
#if defined(STATECORE_CPU_BACKEND)
struct LinearAttentionOnCpu {
  static Tensor aligned(const Tensor& x) { return x; }
  static void check(const LinearAttentionInputs&) {}
  static void run(const LinearAttentionParams& p, const Tensor&) { linear_attention_cpu(p); }
  static void run(const LinearAttentionBackwardParams& p, const Tensor&) { linear_attention_backward_cpu(p); }
};
#endif

#if defined(STATECORE_CUDA_BACKEND)
struct LinearAttentionOnCuda {
  static Tensor aligned(const Tensor& x) { return aligned_for_cuda(x); }
  static void check(const LinearAttentionInputs& p);
  static void run(const LinearAttentionParams& p, const Tensor& q);
  static void run(const LinearAttentionBackwardParams& p, const Tensor& q);
};
#endif

// Refuse what statecore/ops.py says, on the CPU also by contents. The structs point into the tensors and into
// `held`.
LinearAttentionInputs checked_linear_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& log_decay,
                                            const std::optional<Tensor>& initial_state,
                                            const std::optional<Tensor>& cu_seqlens,
                                            std::optional<double> scale, HeldTensors& held);

// `names` are those of q, k and v in messages.
LinearAttentionInputs checked_step_linear_inputs(const char* const (&names)[3], const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& step_ids,
                                                 const Tensor& alpha,
                                                 const std::optional<Tensor>& initial_states,
                                                 const std::optional<Tensor>& initial_step,
                                                 const std::optional<Tensor>& cu_seqlens,
                                                 std::optional<double> scale, HeldTensors& held);

// `grouped_values`: GVA is allowed too.
void check_head_groups(const char* const (&names)[3], int64_t query_heads, int64_t key_heads,
                       int64_t value_heads, bool grouped_values);

// float32 [A], or float64 beside float64 inputs: its data in the type of the states.
const void* checked_alpha(const Tensor& alpha, const Tensor& q, HeldTensors& held);

// A tensor of `shape` in float32, or float64 beside float64 inputs: its data in the type of the states.
const void* checked_reals(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                          const Tensor& q, HeldTensors& held);

}  // namespace statecore
