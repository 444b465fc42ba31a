// The schemas of torch.ops.statecore, and of the test library (see common/cuda_backend.h). Implementations
// are registered in <op>/<op>_op.cpp; gradients, fake implementations, autocast and the composite
// mixed_attention in statecore/ops.py, whose docstrings define shapes, formulas and errors.

#include "common/cuda_backend.h"

STABLE_TORCH_LIBRARY(STATECORE_LIBRARY, m) {
  // ---- public operators
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, *, float? scale=None) -> (Tensor out, Tensor final_state)");
  m.def(
      "segment_attention(Tensor q, Tensor k, Tensor v, Tensor step_ids, Tensor? cu_seqlens=None, *, "
      "float? scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "step_linear_attention(Tensor q, Tensor k, Tensor v, Tensor step_ids, Tensor alpha, "
      "Tensor? initial_states=None, Tensor? initial_step=None, Tensor? cu_seqlens=None, *, "
      "float? scale=None) -> (Tensor out, Tensor states)");
  m.def(
      "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor lin_q, Tensor lin_k, Tensor lin_v, Tensor gate, "
      "Tensor step_ids, Tensor alpha, Tensor? initial_states=None, Tensor? initial_step=None, "
      "Tensor? cu_seqlens=None, *, float? scale=None, float? lin_scale=None) -> (Tensor out, Tensor states)");
  m.def(
      "state_update(Tensor(a!) states, Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, "
      "Tensor? ends_step=None, Tensor? alpha=None, Tensor? slots=None, *, float? scale=None) -> Tensor out");

  // ---- for autograd; the gradient of an absent optional argument is an empty tensor
  m.def(
      "linear_attention_backward(Tensor grad_out, Tensor grad_final_state, Tensor q, Tensor k, Tensor v, "
      "Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, float? scale) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, Tensor grad_initial_state)");
  m.def(
      "segment_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor step_ids, Tensor? cu_seqlens, float? scale) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "step_linear_attention_backward(Tensor grad_out, Tensor grad_states, Tensor q, Tensor k, Tensor v, "
      "Tensor step_ids, Tensor alpha, Tensor? initial_states, Tensor? initial_step, Tensor? cu_seqlens, "
      "float? scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_states)");
  m.def(
      "mixed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor lin_q, Tensor lin_k, Tensor lin_v, "
      "Tensor gate, Tensor step_ids, Tensor alpha, Tensor? initial_states, Tensor? initial_step, "
      "Tensor? cu_seqlens, float? scale, float? lin_scale) "
      "-> (Tensor out, Tensor states, Tensor segment_out, Tensor lse, Tensor linear_out)");

  // ---- build information
  m.def("cpu_isa() -> str");
  m.def("cuda_architectures() -> str");
  m.def("torch_has_cuda() -> bool");
}
