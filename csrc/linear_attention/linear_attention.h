// Linear attention: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t, out_t = scale * q_t S_t, and the same with a
// state that is corrected at the end of every reasoning step (step_end.h). arXiv 2602.01198 sections 3 and 4,
// arXiv 2405.21060; contracts: statecore/ops.py.
//
// The border between tensors and kernels: backends take these structs and know nothing of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/heads_view.h"

namespace statecore {

// B batch, T tokens, N sequences, Hq query, Hk key, Hv value heads, Ho = max(Hq, Hv), Dk and Dv widths.
// Either Hk == Hv and Hq is a multiple of it (GQA), or Hq == Hk and Hv is a multiple of it (GVA). Real is
// float, or double where dtype is kFloat64.
struct LinearAttentionInputs {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t batch, tokens, sequences;
  int64_t query_heads, key_heads, value_heads;
  int64_t key_width, value_width;
  double scale;

  HeadsView q;          // [B, T, Hq, Dk]
  HeadsView k;          // [B, T, Hk, Dk]
  HeadsView v;          // [B, T, Hv, Dv]
  HeadsView log_decay;  // Real [B, T, Hv, 1], or null: no decay

  const int32_t* cu_seqlens = nullptr;  // [N + 1], or null: every row of the batch is one sequence

  // States per value head: 1, or 3 (running, start, prompt) where steps end. With steps there is no decay.
  int64_t states = 1;
  const void* initial_states = nullptr;  // Real [states, N, Hv, Dk, Dv], or null: zeros
  const int32_t* step_ids = nullptr;     // [B, T], rows ids_batch apart; null where states is 1
  int64_t ids_batch = 0;
  const int32_t* initial_step = nullptr;  // [N], or null: -1 everywhere
  const void* alpha = nullptr;            // Real [alphas]
  int64_t alphas = 0;
};

struct LinearAttentionParams : LinearAttentionInputs {
  // Results, contiguous, every element written.
  void* out = nullptr;           // [B, T, Ho, Dv]
  void* final_states = nullptr;  // Real [states, N, Hv, Dk, Dv]

  // For mixed_attention: gated_out = segment_out + sigmoid(gate) * out. All three, or none.
  HeadsView gate = {};                // [B, T, Ho, Dv]
  const void* segment_out = nullptr;  // [B, T, Ho, Dv] contiguous
  void* gated_out = nullptr;          // [B, T, Ho, Dv] contiguous
};

struct LinearAttentionBackwardParams : LinearAttentionInputs {
  HeadsView grad_out = {};                  // [B, T, Ho, Dv]
  const void* grad_final_states = nullptr;  // Real [states, N, Hv, Dk, Dv] contiguous

  // Results, contiguous, every element written.
  void* grad_q = nullptr;               // [B, T, Hq, Dk]
  void* grad_k = nullptr;               // [B, T, Hk, Dk]
  void* grad_v = nullptr;               // [B, T, Hv, Dv]
  void* grad_log_decay = nullptr;       // Real [B, T, Hv], or null
  void* grad_initial_states = nullptr;  // Real [states, N, Hv, Dk, Dv], or null
};

// Extra memory: 24 bytes per chunk of tokens and about 1 MiB per thread at widths of 128 (more under GVA,
// whose backward holds a state for each value head of a group); for the gradient of log_decay 8 bytes per
// token and value head.
void linear_attention_cpu(const LinearAttentionParams& params);
void linear_attention_backward_cpu(const LinearAttentionBackwardParams& params);

// Take dtype float32, bfloat16 or float16; widths that are multiples of 16, up to 128; q, k, v, grad_out and
// gate whose data and strides are multiples of 16 bytes; fewer than 2^31 tokens per row. `scratch` has as
// many bytes as *_scratch() says, which depends on shapes and on which pointers are null; `stream` is a
// cudaStream_t.
int64_t linear_attention_cuda_scratch(const LinearAttentionParams& params);
void linear_attention_cuda(const LinearAttentionParams& params, void* scratch, void* stream);
int64_t linear_attention_backward_cuda_scratch(const LinearAttentionBackwardParams& params);
void linear_attention_backward_cuda(const LinearAttentionBackwardParams& params, void* scratch, void* stream);

}  // namespace statecore
