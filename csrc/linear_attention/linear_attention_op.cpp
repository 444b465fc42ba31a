#include "linear_attention/linear_attention_op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cuda_backend.h"

namespace statecore {

void check_head_groups(const char* const (&names)[3], int64_t query_heads, int64_t key_heads,
                       int64_t value_heads, bool grouped_values) {
  if (query_heads > 0 && key_heads > 0 && value_heads > 0) {
    if (key_heads == value_heads && query_heads % key_heads == 0) return;
    if (grouped_values && query_heads == key_heads && value_heads % key_heads == 0) return;
  }
  const auto& [q, k, v] = names;
  refuse("heads must be grouped as GQA (", k, " and ", v, " have equally many, ", q, " a multiple)",
         grouped_values ? " or GVA (q and k have equally many, v a multiple)" : "", ", got ", q, " ",
         query_heads, ", ", k, " ", key_heads, ", ", v, " ", value_heads);
}

namespace {

const void* hold(const Tensor& x, ScalarType type, HeldTensors& held) {
  held.push_back(torch::stable::contiguous(x.scalar_type() == type ? x : torch::stable::to(x, type)));
  return held.back().const_data_ptr();
}

void check_real(const char* name, const Tensor& x, const Tensor& q) {
  check_same_device(name, x, q);
  const bool wide = x.scalar_type() == ScalarType::Double && q.scalar_type() == ScalarType::Double;
  if (!wide) check_dtype(name, x, ScalarType::Float);
}

// What all linear attention operators have in common.
LinearAttentionInputs checked_heads(const char* const (&names)[3], const Tensor& q, const Tensor& k,
                                    const Tensor& v, bool grouped_values,
                                    const std::optional<Tensor>& cu_seqlens, std::optional<double> scale) {
  LinearAttentionInputs p{};
  p.dtype = element_dtype(q);
  check_dim(names[0], q, 4, "[B, T, Hq, Dk]");
  check_dim(names[1], k, 4, "[B, T, Hk, Dk]");
  check_dim(names[2], v, 4, "[B, T, Hv, Dv]");
  p.batch = q.size(0), p.tokens = q.size(1), p.query_heads = q.size(2), p.key_width = q.size(3);
  p.key_heads = k.size(2), p.value_heads = v.size(2), p.value_width = v.size(3);
  check_shape(names[1], k, {p.batch, p.tokens, p.key_heads, p.key_width});
  check_shape(names[2], v, {p.batch, p.tokens, p.value_heads, p.value_width});
  check_head_groups(names, p.query_heads, p.key_heads, p.value_heads, grouped_values);
  if (p.key_width < 1)
    refuse(names[0], " and ", names[1], " must have a width of at least 1, got shape ", shape_text(q));
  if (p.value_width < 1) refuse(names[2], " must have a width of at least 1, got shape ", shape_text(v));
  const Tensor* const tensors[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    check_dtype(names[i], *tensors[i], q.scalar_type());
    check_same_device(names[i], *tensors[i], q);
    check_last_contiguous(names[i], *tensors[i]);
  }
  p.sequences = p.batch;
  if (cu_seqlens) {
    p.sequences = check_cu_seqlens(*cu_seqlens, q);
    p.cu_seqlens = int32_data(*cu_seqlens);
  }
  p.scale = scale.value_or(1 / std::sqrt(double(p.key_width)));
  p.q = heads_view(q), p.k = heads_view(k), p.v = heads_view(v);
  return p;
}

// Ids are >= 0, or -1 where no step has begun, and no sequence continues with a smaller one.
void check_initial_step(const Tensor& initial_step, const Tensor& step_ids,
                        const std::optional<Tensor>& cu_seqlens, const Tensor& q, int64_t sequences) {
  check_shape("initial_step", initial_step, {sequences});
  check_dtype("initial_step", initial_step, ScalarType::Int);
  check_same_device("initial_step", initial_step, q);
  if (!checks_contents(initial_step)) return;
  const Tensor last_ids = on_cpu(initial_step), all_ids = on_cpu(step_ids);
  const Tensor offsets = cu_seqlens ? on_cpu(*cu_seqlens) : Tensor();
  const int32_t* starts = cu_seqlens ? int32_data(offsets) : nullptr;
  for (int64_t n = 0; n < sequences; ++n) {
    const int32_t last = int32_data(last_ids)[n];
    if (last < -1)
      refuse("initial_step must be >= 0, or -1 where nothing was seen, got ", last, " at [", n, "]");
    const int32_t* ids = int32_data(all_ids) + (starts ? 0 : n) * all_ids.stride(0);
    int64_t t = starts ? starts[n] : 0;
    const int64_t end = starts ? starts[n + 1] : all_ids.size(1);
    while (t < end && ids[t] == -1) ++t;
    if (t < end && ids[t] < last)
      refuse("step_ids must not decrease from one call to the next: initial_step[", n, "] is ", last,
             ", but the sequence goes on with ", ids[t]);
  }
}

}  // namespace

const void* checked_reals(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                          const Tensor& q, HeldTensors& held) {
  check_shape(name, x, shape);
  check_real(name, x, q);
  return hold(x, state_type(element_dtype(q)), held);
}

const void* checked_alpha(const Tensor& alpha, const Tensor& q, HeldTensors& held) {
  check_dim("alpha", alpha, 1, "[A]");
  check_real("alpha", alpha, q);
  return hold(alpha, state_type(element_dtype(q)), held);
}

LinearAttentionInputs checked_linear_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& log_decay,
                                            const std::optional<Tensor>& initial_state,
                                            const std::optional<Tensor>& cu_seqlens,
                                            std::optional<double> scale, HeldTensors& held) {
  LinearAttentionInputs p = checked_heads({"q", "k", "v"}, q, k, v, true, cu_seqlens, scale);
  if (log_decay) {
    const void* data = checked_reals("log_decay", *log_decay, {p.batch, p.tokens, p.value_heads}, q, held);
    p.log_decay = {data, p.tokens * p.value_heads, p.value_heads, 1};
  }
  if (initial_state)
    p.initial_states = checked_reals("initial_state", *initial_state,
                                     {p.sequences, p.value_heads, p.key_width, p.value_width}, q, held);
  return p;
}

LinearAttentionInputs checked_step_linear_inputs(const char* const (&names)[3], const Tensor& q,
                                                 const Tensor& k, const Tensor& v, const Tensor& step_ids,
                                                 const Tensor& alpha,
                                                 const std::optional<Tensor>& initial_states,
                                                 const std::optional<Tensor>& initial_step,
                                                 const std::optional<Tensor>& cu_seqlens,
                                                 std::optional<double> scale, HeldTensors& held) {
  LinearAttentionInputs p = checked_heads(names, q, k, v, false, cu_seqlens, scale);
  check_step_ids(step_ids, cu_seqlens, q, p.batch, p.tokens);
  p.step_ids = int32_data(step_ids);
  p.ids_batch = step_ids.stride(0);
  p.alpha = checked_alpha(alpha, q, held);
  p.alphas = alpha.size(0);
  p.states = 3;
  if (initial_states)
    p.initial_states = checked_reals("initial_states", *initial_states,
                                     {3, p.sequences, p.value_heads, p.key_width, p.value_width}, q, held);
  if (initial_step) {
    held.push_back(torch::stable::contiguous(*initial_step));
    p.initial_step = int32_data(held.back());
    check_initial_step(held.back(), step_ids, cu_seqlens, q, p.sequences);
  }
  return p;
}

namespace {

// (out, states)
template <class Backend>
std::tuple<Tensor, Tensor> run_forward(const LinearAttentionInputs& inputs, const Tensor& q,
                                       torch::headeronly::IntHeaderOnlyArrayRef states_shape) {
  LinearAttentionParams p{inputs};
  Tensor out =
      torch::stable::new_empty(q, {p.batch, p.tokens, std::max(p.query_heads, p.value_heads), p.value_width});
  Tensor states = torch::stable::new_empty(q, states_shape, state_type(p.dtype));
  p.out = out.mutable_data_ptr();
  p.final_states = states.mutable_data_ptr();
  Backend::run(p, q);
  return {out, states};
}

struct Gradients {
  Tensor q, k, v, log_decay, initial_states;
};

// Shaped like an optional argument, in the type of the states; empty where the argument is absent.
Tensor new_gradient(const std::optional<Tensor>& like, const Tensor& q) {
  if (!like) return torch::stable::new_empty(q, {0});
  return torch::stable::new_empty(q, like->sizes(), state_type(element_dtype(q)));
}

template <class Backend>
Gradients run_backward(const LinearAttentionInputs& inputs, const Tensor& grad_out,
                       const void* grad_final_states, const Tensor& q, const std::optional<Tensor>& log_decay,
                       const std::optional<Tensor>& initial_states) {
  LinearAttentionBackwardParams p{inputs};
  check_shape("grad_out", grad_out,
              {p.batch, p.tokens, std::max(p.query_heads, p.value_heads), p.value_width});
  check_dtype("grad_out", grad_out, q.scalar_type());
  check_same_device("grad_out", grad_out, q);
  // Autograd hands over gradients of any layout: that of a sum has no strides at all.
  const Tensor dense_grad_out = Backend::aligned(torch::stable::contiguous(grad_out));
  Gradients grads{torch::stable::new_empty(q, {p.batch, p.tokens, p.query_heads, p.key_width}),
                  torch::stable::new_empty(q, {p.batch, p.tokens, p.key_heads, p.key_width}),
                  torch::stable::new_empty(q, {p.batch, p.tokens, p.value_heads, p.value_width}),
                  new_gradient(log_decay, q), new_gradient(initial_states, q)};
  p.grad_out = heads_view(dense_grad_out);
  p.grad_final_states = grad_final_states;
  p.grad_q = grads.q.mutable_data_ptr();
  p.grad_k = grads.k.mutable_data_ptr();
  p.grad_v = grads.v.mutable_data_ptr();
  if (log_decay) p.grad_log_decay = grads.log_decay.mutable_data_ptr();
  if (initial_states) p.grad_initial_states = grads.initial_states.mutable_data_ptr();
  Backend::run(p, q);
  // float32 arguments beside float64 inputs get float32 gradients.
  if (log_decay) grads.log_decay = torch::stable::to(grads.log_decay, log_decay->scalar_type());
  if (initial_states)
    grads.initial_states = torch::stable::to(grads.initial_states, initial_states->scalar_type());
  return grads;
}

template <class Backend>
std::tuple<Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            std::optional<Tensor> log_decay,
                                            std::optional<Tensor> initial_state,
                                            std::optional<Tensor> cu_seqlens, std::optional<double> scale) {
  HeldTensors held;
  auto inputs = checked_linear_inputs(q, k, v, log_decay, initial_state, cu_seqlens, scale, held);
  prepare_for<Backend>(inputs, q, k, v, held);
  return run_forward<Backend>(inputs, q,
                              {inputs.sequences, inputs.value_heads, inputs.key_width, inputs.value_width});
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& grad_out, const Tensor& grad_final_state, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> log_decay, std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens,
    std::optional<double> scale) {
  HeldTensors held;
  auto inputs = checked_linear_inputs(q, k, v, log_decay, initial_state, cu_seqlens, scale, held);
  prepare_for<Backend>(inputs, q, k, v, held);
  const void* grad_final =
      checked_reals("grad_final_state", grad_final_state,
                    {inputs.sequences, inputs.value_heads, inputs.key_width, inputs.value_width}, q, held);
  auto [gq, gk, gv, gd, gs] =
      run_backward<Backend>(inputs, grad_out, grad_final, q, log_decay, initial_state);
  return {gq, gk, gv, gd, gs};
}

template <class Backend>
std::tuple<Tensor, Tensor> step_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& step_ids, const Tensor& alpha,
                                                 std::optional<Tensor> initial_states,
                                                 std::optional<Tensor> initial_step,
                                                 std::optional<Tensor> cu_seqlens,
                                                 std::optional<double> scale) {
  HeldTensors held;
  auto inputs = checked_step_linear_inputs({"q", "k", "v"}, q, k, v, step_ids, alpha, initial_states,
                                           initial_step, cu_seqlens, scale, held);
  prepare_for<Backend>(inputs, q, k, v, held);
  return run_forward<Backend>(
      inputs, q, {3, inputs.sequences, inputs.value_heads, inputs.key_width, inputs.value_width});
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> step_linear_attention_backward(
    const Tensor& grad_out, const Tensor& grad_states, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& step_ids, const Tensor& alpha, std::optional<Tensor> initial_states,
    std::optional<Tensor> initial_step, std::optional<Tensor> cu_seqlens, std::optional<double> scale) {
  HeldTensors held;
  auto inputs = checked_step_linear_inputs({"q", "k", "v"}, q, k, v, step_ids, alpha, initial_states,
                                           initial_step, cu_seqlens, scale, held);
  prepare_for<Backend>(inputs, q, k, v, held);
  const void* grad_final =
      checked_reals("grad_states", grad_states,
                    {3, inputs.sequences, inputs.value_heads, inputs.key_width, inputs.value_width}, q, held);
  auto [gq, gk, gv, gd, gs] =
      run_backward<Backend>(inputs, grad_out, grad_final, q, std::nullopt, initial_states);
  return {gq, gk, gv, gs};
}

}  // namespace

#if defined(STATECORE_CUDA_BACKEND)
void LinearAttentionOnCuda::check(const LinearAttentionInputs& p) {
  check_cuda_dtype(p.dtype);
  check_cuda_width("q and k", p.key_width);
  check_cuda_width("v", p.value_width);
}

void LinearAttentionOnCuda::run(const LinearAttentionParams& p, const Tensor& q) {
  const CurrentStreamGuard guard(q);
  Tensor scratch = cuda_scratch(linear_attention_cuda_scratch(p), q);
  linear_attention_cuda(p, scratch.mutable_data_ptr(), guard.stream());
}

void LinearAttentionOnCuda::run(const LinearAttentionBackwardParams& p, const Tensor& q) {
  const CurrentStreamGuard guard(q);
  Tensor scratch = cuda_scratch(linear_attention_backward_cuda_scratch(p), q);
  linear_attention_backward_cuda(p, scratch.mutable_data_ptr(), guard.stream());
}
#endif

}  // namespace statecore

#if defined(STATECORE_CPU_BACKEND)
STATECORE_CPU_IMPL(m) {
  using namespace statecore;
  using On = LinearAttentionOnCpu;
  m.impl("linear_attention", TORCH_BOX(&linear_attention<On>));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward<On>));
  m.impl("step_linear_attention", TORCH_BOX(&step_linear_attention<On>));
  m.impl("step_linear_attention_backward", TORCH_BOX(&step_linear_attention_backward<On>));
}
#endif

#if defined(STATECORE_CUDA_BACKEND)
STATECORE_CUDA_IMPL(m) {
  using namespace statecore;
  using On = LinearAttentionOnCuda;
  m.impl("linear_attention", TORCH_BOX(&linear_attention<On>));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward<On>));
  m.impl("step_linear_attention", TORCH_BOX(&step_linear_attention<On>));
  m.impl("step_linear_attention_backward", TORCH_BOX(&step_linear_attention_backward<On>));
}
#endif
