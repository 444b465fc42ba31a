#include "segment_attention/segment_attention_op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "common/cuda_backend.h"

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

SegmentAttentionInputs checked_segment_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& step_ids, const std::optional<Tensor>& cu_seqlens,
                                              std::optional<double> scale) {
  SegmentAttentionInputs p{};
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
  p.step_ids = int32_data(step_ids);
  p.ids_batch = step_ids.stride(0);
  p.scale = scale.value_or(1 / std::sqrt(double(p.key_width)));
  p.q = heads_view(q), p.k = heads_view(k), p.v = heads_view(v);
  return p;
}

namespace {

template <class Backend>
std::tuple<Tensor, Tensor> segment_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& step_ids, std::optional<Tensor> cu_seqlens,
                                             std::optional<double> scale) {
  HeldTensors held;
  SegmentAttentionParams p{checked_segment_inputs(q, k, v, step_ids, cu_seqlens, scale)};
  prepare_for<Backend>(p, q, k, v, held);
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
  HeldTensors held;
  SegmentAttentionBackwardParams p{checked_segment_inputs(q, k, v, step_ids, cu_seqlens, scale)};
  const ScalarType lse_type = state_type(p.dtype);
  check_result("grad_out", grad_out, {p.batch, p.queries, p.query_heads, p.value_width}, q.scalar_type(), q);
  check_result("out", out, {p.batch, p.queries, p.query_heads, p.value_width}, q.scalar_type(), q);
  check_result("lse", lse, {p.batch, p.query_heads, p.queries}, lse_type, q);
  if (grad_lse) check_result("grad_lse", *grad_lse, {p.batch, p.query_heads, p.queries}, lse_type, q);
  prepare_for<Backend>(p, q, k, v, held);
  const auto hold = [&](Tensor x) { return held.emplace_back(std::move(x)).const_data_ptr(); };
  p.out = hold(Backend::aligned(torch::stable::contiguous(out)));
  p.lse = hold(torch::stable::contiguous(lse));
  if (grad_lse) p.grad_lse = hold(torch::stable::contiguous(*grad_lse));
  // Autograd hands over gradients of any layout: that of a sum has no strides at all.
  p.grad_out = heads_view(held.emplace_back(
      Backend::aligned(grad_out.stride(3) == 1 ? grad_out : torch::stable::contiguous(grad_out))));

  Tensor grad_q = torch::stable::new_empty(q, {p.batch, p.queries, p.query_heads, p.key_width});
  Tensor grad_k = torch::stable::new_empty(q, {p.batch, p.keys, p.kv_heads, p.key_width});
  Tensor grad_v = torch::stable::new_empty(q, {p.batch, p.keys, p.kv_heads, p.value_width});
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  Backend::run(p, q);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

#if defined(STATECORE_CUDA_BACKEND)
void SegmentAttentionOnCuda::check(const SegmentAttentionInputs& p) {
  check_cuda_dtype(p.dtype);
  check_cuda_width("q and k", p.key_width);
  check_cuda_width("v", p.value_width);
}

void SegmentAttentionOnCuda::run(const SegmentAttentionParams& p, const Tensor& q) {
  const CurrentStreamGuard guard(q);
  const Tensor scratch = cuda_scratch(segment_attention_cuda_scratch(p), q);
  segment_attention_cuda(p, scratch.mutable_data_ptr(), guard.stream());
}

void SegmentAttentionOnCuda::run(const SegmentAttentionBackwardParams& p, const Tensor& q) {
  const CurrentStreamGuard guard(q);
  const Tensor scratch = cuda_scratch(segment_attention_backward_cuda_scratch(p), q);
  segment_attention_backward_cuda(p, scratch.mutable_data_ptr(), guard.stream());
}
#endif

}  // namespace statecore

#if defined(STATECORE_CPU_BACKEND)
STATECORE_CPU_IMPL(m) {
  using namespace statecore;
  using On = SegmentAttentionOnCpu;
  m.impl("segment_attention", TORCH_BOX(&segment_attention<On>));
  m.impl("segment_attention_backward", TORCH_BOX(&segment_attention_backward<On>));
}
#endif

#if defined(STATECORE_CUDA_BACKEND)
STATECORE_CUDA_IMPL(m) {
  using namespace statecore;
  using On = SegmentAttentionOnCuda;
  m.impl("segment_attention", TORCH_BOX(&segment_attention<On>));
  m.impl("segment_attention_backward", TORCH_BOX(&segment_attention_backward<On>));
}
#endif
