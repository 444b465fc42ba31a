// Mixed attention (arXiv 2602.01198 section 3): segment attention, then step linear attention whose epilogue
// gates its result and adds it to the first. It has no kernels of its own. The public operator, which drops
// what only the backward needs, is registered by statecore/ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda_backend.h"
#include "linear_attention/linear_attention_op.h"
#include "segment_attention/segment_attention_op.h"

namespace statecore {
namespace {

template <class SegmentBackend, class LinearBackend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lin_q, const Tensor& lin_k,
    const Tensor& lin_v, const Tensor& gate, const Tensor& step_ids, const Tensor& alpha,
    std::optional<Tensor> initial_states, std::optional<Tensor> initial_step,
    std::optional<Tensor> cu_seqlens, std::optional<double> scale, std::optional<double> lin_scale) {
  SegmentAttentionParams segment{checked_segment_inputs(q, k, v, step_ids, cu_seqlens, scale)};
  const int64_t batch = segment.batch, queries = segment.queries, heads = segment.query_heads;
  check_dim("lin_q", lin_q, 4, "[B, Tq, Hq, Lk]");
  check_shape("lin_q", lin_q, {batch, queries, heads, lin_q.size(3)});
  check_dtype("lin_q", lin_q, q.scalar_type());
  check_same_device("lin_q", lin_q, q);
  check_dim("lin_v", lin_v, 4, "[B, Tq, Hk, Dv]");
  check_shape("lin_v", lin_v, {batch, queries, lin_v.size(2), segment.value_width});
  check_shape("gate", gate, {batch, queries, heads, segment.value_width});
  check_dtype("gate", gate, q.scalar_type());
  check_same_device("gate", gate, q);
  check_last_contiguous("gate", gate);
  HeldTensors held;
  Tensor all_ids = step_ids;  // narrow() wants a variable
  const Tensor own_ids = torch::stable::narrow(all_ids, 1, segment.keys - queries, queries);
  LinearAttentionParams linear{checked_step_linear_inputs({"lin_q", "lin_k", "lin_v"}, lin_q, lin_k, lin_v,
                                                          own_ids, alpha, initial_states, initial_step,
                                                          cu_seqlens, lin_scale, held)};
  prepare_for<SegmentBackend>(segment, q, k, v, held);
  prepare_for<LinearBackend>(linear, lin_q, lin_k, lin_v, held);

  Tensor out = torch::stable::new_empty(q, {batch, queries, heads, segment.value_width});
  Tensor segment_out = torch::stable::empty_like(out), linear_out = torch::stable::empty_like(out);
  Tensor lse = torch::stable::new_empty(q, {batch, heads, queries}, state_type(segment.dtype));
  Tensor states = torch::stable::new_empty(
      q, {3, linear.sequences, linear.value_heads, linear.key_width, linear.value_width},
      state_type(linear.dtype));
  segment.out = segment_out.mutable_data_ptr();
  segment.out_dtype = segment.dtype;
  segment.lse = lse.mutable_data_ptr();
  SegmentBackend::run(segment, q);

  linear.out = linear_out.mutable_data_ptr();
  linear.final_states = states.mutable_data_ptr();
  linear.gate = heads_view(held.emplace_back(LinearBackend::aligned(gate)));
  linear.segment_out = segment_out.const_data_ptr();
  linear.gated_out = out.mutable_data_ptr();
  LinearBackend::run(linear, lin_q);
  return {out, states, segment_out, lse, linear_out};
}

}  // namespace
}  // namespace statecore

#if defined(STATECORE_CPU_BACKEND)
STATECORE_CPU_IMPL(m) {
  using namespace statecore;
  m.impl("mixed_attention_forward",
         TORCH_BOX((&mixed_attention_forward<SegmentAttentionOnCpu, LinearAttentionOnCpu>)));
}
#endif

#if defined(STATECORE_CUDA_BACKEND)
STATECORE_CUDA_IMPL(m) {
  using namespace statecore;
  m.impl("mixed_attention_forward",
         TORCH_BOX((&mixed_attention_forward<SegmentAttentionOnCuda, LinearAttentionOnCuda>)));
}
#endif
