#include "segment_attention/segment_attention_op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "common/cuda_backend.h"
#include "common/tensor_checks.h"

namespace statecore {
namespace {

void check_element_tensor(const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(name, t, q.scalar_type());
  check_same_device(name, t, q);
  check_last_contiguous(name, t);
}

void check_result(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType type,
                  const Tensor& q) {
  check_shape(name, t, shape);
  check_dtype(name, t, type);
  check_same_device(name, t, q);
}

}  // namespace

SegmentAttentionParams checked_segment_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& step_ids, const std::optional<Tensor>& cu_seqlens,
                                              std::optional<double> scale) {
  SegmentAttentionParams p{};
  p.dtype = element_dtype(q);
  check_dim("q", q, 4, "[B, Tq, Hq, Dk]");
  check_dim("k", k, 4, "[B, Tk, Hk, Dk]");
  check_dim("v", v, 4, "[B, Tk, Hk, Dv]");
  p.batch = q.size(0), p.queries = q.size(1), p.query_heads = q.size(2), p.key_width = q.size(3);
  p.keys = k.size(1), p.kv_heads = k.size(2), p.value_width = v.size(3);
  check_shape("k", k, {p.batch, p.keys, p.kv_heads, p.key_width});
  check_shape("v", v, {p.batch, p.keys, p.kv_heads, p.value_width});
  if (p.kv_heads < 1 || p.query_heads < 1 || p.query_heads % p.kv_heads != 0)
    refuse("q must have a multiple of the ", p.kv_heads, " heads of k and v, got ", p.query_heads);
  if (p.key_width < 1) refuse("q and k must have a width of at least 1, got shape ", shape_text(q));
  if (p.value_width < 1) refuse("v must have a width of at least 1, got shape ", shape_text(v));
  if (p.keys < p.queries)
    refuse("k must have at least as many tokens as q, got ", p.keys, " for ", p.queries, " queries");
  check_last_contiguous("q", q);
  check_element_tensor("k", k, q);
  check_element_tensor("v", v, q);
  p.sequences = p.batch;
  if (cu_seqlens) {
    if (p.keys != p.queries)
      refuse("k and q must have the same number of tokens when cu_seqlens is given, got ", p.keys, " and ",
             p.queries);
    p.sequences = check_cu_seqlens(*cu_seqlens, q);
    p.cu_seqlens = int32_data(*cu_seqlens);
  }
  check_step_ids(step_ids, cu_seqlens, q, p.batch, p.keys);

  p.scale = scale.value_or(1 / std::sqrt(double(p.key_width)));
  p.q = q.const_data_ptr(), p.q_batch = q.stride(0), p.q_time = q.stride(1), p.q_head = q.stride(2);
  p.k = k.const_data_ptr(), p.k_batch = k.stride(0), p.k_time = k.stride(1), p.k_head = k.stride(2);
  p.v = v.const_data_ptr(), p.v_batch = v.stride(0), p.v_time = v.stride(1), p.v_head = v.stride(2);
  p.step_ids = int32_data(step_ids);
  p.ids_batch = step_ids.stride(0);
  return p;
}

#if defined(STATECORE_CUDA_BACKEND)
namespace {

// x where the kernels can load it, kept by `held`.
const Tensor& held_for_cuda(const Tensor& x, std::vector<Tensor>& held) {
  held.push_back(aligned_for_cuda(x));
  return held.back();
}

}  // namespace

void prepare_for_cuda(SegmentAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                      std::vector<Tensor>& held) {
  check_cuda_dtype(p.dtype);
  check_cuda_width("q and k", p.key_width);
  check_cuda_width("v", p.value_width);
  const Tensor& own_q = held_for_cuda(q, held);
  p.q = own_q.const_data_ptr();
  p.q_batch = own_q.stride(0), p.q_time = own_q.stride(1), p.q_head = own_q.stride(2);
  const Tensor& own_k = held_for_cuda(k, held);
  p.k = own_k.const_data_ptr();
  p.k_batch = own_k.stride(0), p.k_time = own_k.stride(1), p.k_head = own_k.stride(2);
  const Tensor& own_v = held_for_cuda(v, held);
  p.v = own_v.const_data_ptr();
  p.v_batch = own_v.stride(0), p.v_time = own_v.stride(1), p.v_head = own_v.stride(2);
}

void run_segment_attention_on_cuda(const SegmentAttentionParams& p, const Tensor& q) {
  const CurrentStreamGuard guard(q);
  const Tensor scratch = cuda_scratch(segment_attention_cuda_scratch(p), q);
  segment_attention_cuda(p, scratch.mutable_data_ptr(), guard.stream());
}
#endif

namespace {

#if defined(STATECORE_CPU_BACKEND)
struct Cpu {
  static void prepare(SegmentAttentionParams&, const Tensor&, const Tensor&, const Tensor&,
                      std::vector<Tensor>&) {}
  static Tensor dense(const Tensor& x) { return x; }
  static void run(const SegmentAttentionParams& p, const Tensor&) { segment_attention_cpu(p); }
  static void run(const SegmentAttentionBackwardParams& p, const Tensor&) {
    segment_attention_backward_cpu(p);
  }
};
#endif

#if defined(STATECORE_CUDA_BACKEND)
struct Cuda {
  static constexpr auto prepare = prepare_for_cuda;
  static Tensor dense(const Tensor& x) { return aligned_for_cuda(x); }
  static void run(const SegmentAttentionParams& p, const Tensor& q) { run_segment_attention_on_cuda(p, q); }
  static void run(const SegmentAttentionBackwardParams& p, const Tensor& q) {
    const CurrentStreamGuard guard(q);
    const Tensor scratch = cuda_scratch(segment_attention_backward_cuda_scratch(p), q);
    segment_attention_backward_cuda(p, scratch.mutable_data_ptr(), guard.stream());
  }
};
#endif

template <class Backend>
std::tuple<Tensor, Tensor> segment_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& step_ids, std::optional<Tensor> cu_seqlens,
                                             std::optional<double> scale) {
  SegmentAttentionParams p = checked_segment_params(q, k, v, step_ids, cu_seqlens, scale);
  std::vector<Tensor> held;
  Backend::prepare(p, q, k, v, held);
  Tensor out = torch::stable::new_empty(q, {p.batch, p.queries, p.query_heads, p.value_width});
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.query_heads, p.queries}, state_type(p.dtype));
  p.out = out.mutable_data_ptr();
  p.out_dtype = p.dtype;
  p.lse = lse.mutable_data_ptr();
  Backend::run(p, q);
  return {out, lse};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& step_ids, std::optional<Tensor> cu_seqlens,
    std::optional<double> scale) {
  SegmentAttentionBackwardParams p{};
  p.forward = checked_segment_params(q, k, v, step_ids, cu_seqlens, scale);
  const SegmentAttentionParams& f = p.forward;
  const ScalarType lse_type = state_type(f.dtype);
  check_result("grad_out", grad_out, {f.batch, f.queries, f.query_heads, f.value_width}, q.scalar_type(), q);
  check_result("out", out, {f.batch, f.queries, f.query_heads, f.value_width}, q.scalar_type(), q);
  check_result("lse", lse, {f.batch, f.query_heads, f.queries}, lse_type, q);
  if (grad_lse) check_result("grad_lse", *grad_lse, {f.batch, f.query_heads, f.queries}, lse_type, q);
  std::vector<Tensor> held;
  Backend::prepare(p.forward, q, k, v, held);
  // Autograd hands over gradients of any layout: that of a sum has no strides at all.
  const Tensor dense_grad_out =
      Backend::dense(grad_out.stride(3) == 1 ? grad_out : torch::stable::contiguous(grad_out));
  const Tensor dense_out = Backend::dense(torch::stable::contiguous(out));
  const Tensor dense_lse = torch::stable::contiguous(lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  p.forward.out = const_cast<void*>(dense_out.const_data_ptr());
  p.forward.out_dtype = f.dtype;
  p.forward.lse = const_cast<void*>(dense_lse.const_data_ptr());
  p.grad_out = dense_grad_out.const_data_ptr();
  p.grad_out_batch = dense_grad_out.stride(0);
  p.grad_out_time = dense_grad_out.stride(1);
  p.grad_out_head = dense_grad_out.stride(2);
  p.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;

  Tensor grad_q = torch::stable::new_empty(q, {f.batch, f.queries, f.query_heads, f.key_width});
  Tensor grad_k = torch::stable::new_empty(q, {f.batch, f.keys, f.kv_heads, f.key_width});
  Tensor grad_v = torch::stable::new_empty(q, {f.batch, f.keys, f.kv_heads, f.value_width});
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  Backend::run(p, q);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace statecore

#if defined(STATECORE_CPU_BACKEND)
STATECORE_CPU_IMPL(m) {
  using namespace statecore;
  m.impl("segment_attention", TORCH_BOX(&segment_attention<Cpu>));
  m.impl("segment_attention_backward", TORCH_BOX(&segment_attention_backward<Cpu>));
}
#endif

#if defined(STATECORE_CUDA_BACKEND)
STATECORE_CUDA_IMPL(m) {
  using namespace statecore;
  m.impl("segment_attention", TORCH_BOX(&segment_attention<Cuda>));
  m.impl("segment_attention_backward", TORCH_BOX(&segment_attention_backward<Cuda>));
}
#endif
