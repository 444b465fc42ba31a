// Linear attention with a carried state: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t, out_t = scale * q_t S_t;
// and the same with a state that is corrected at the end of every reasoning step (step_end.h). arXiv
// 2602.01198 sections 3 and 4, arXiv 2405.21060; contracts: statecore/ops.py.
//
// The border between tensors and kernels: a backend is handed these structs and knows nothing of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/heads_view.h"

namespace statecore {

// B batch, T tokens, N sequences, Hq query, Hk key, Hv value heads, Ho = max(Hq, Hv), Dk and Dv widths.
// Either Hk == Hv and Hq is a multiple of it (GQA), or Hq == Hk and Hv is a multiple of it (GVA). "Real" is
// float, for dtype kFloat64 double.
struct LinearAttentionInputs {
  DType dtype;  // of q, k, v and of results of their kind
  int64_t batch, tokens, sequences;
  int64_t query_heads, key_heads, value_heads;
  int64_t key_width, value_width;
  double scale;

  HeadsView q;          // [B, T, Hq, Dk]
  HeadsView k;          // [B, T, Hk, Dk]
  HeadsView v;          // [B, T, Hv, Dv]
  HeadsView log_decay;  // Real [B, T, Hv, 1], or null: no decay

  const int32_t* cu_seqlens = nullptr;  // [N + 1], or null: every row of the batch is one sequence

  // States a value head: 1, or 3 (running, start of the step, prompt) where steps end; those have no decay.
  int64_t states = 1;
  const void* initial_states = nullptr;  // Real [states, N, Hv, Dk, Dv], or null: zeros
  const int32_t* step_ids = nullptr;     // [B, T], ids_batch between rows; null where states is 1
  int64_t ids_batch = 0;
  const int32_t* initial_step = nullptr;  // [N], or null: -1 everywhere
  const void* alpha = nullptr;            // Real [alphas]
  int64_t alphas = 0;
};

struct LinearAttentionParams : LinearAttentionInputs {
  // Results, contiguous, every element written.
  void* out = nullptr;           // [B, T, Ho, Dv]
  void* final_states = nullptr;  // Real [states, N, Hv, Dk, Dv]

  // Of mixed_attention: gated_out = segment_out + sigmoid(gate) * out. All three, or none.
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

// Extra memory: 24 bytes a chunk of tokens and about 1 MiB a thread at widths of 128 (more under GVA, whose
// backward holds a state for each value head of a group); 8 bytes a token and value head for the gradient of
// log_decay.
void linear_attention_cpu(const LinearAttentionParams& params);
void linear_attention_backward_cpu(const LinearAttentionBackwardParams& params);

// dtype float32, bfloat16 or float16; widths a multiple of 16 up to 128; q, k, v, grad_out and gate start at
// a multiple of 16 bytes and have such strides; tokens are fewer than 2^31 a row. `scratch` has as many bytes
// as the other function says, which looks at shapes and at which pointers are null; `stream` is a
// cudaStream_t.
int64_t linear_attention_cuda_scratch(const LinearAttentionParams& params);
void linear_attention_cuda(const LinearAttentionParams& params, void* scratch, void* stream);
int64_t linear_attention_backward_cuda_scratch(const LinearAttentionBackwardParams& params);
void linear_attention_backward_cuda(const LinearAttentionBackwardParams& params, void* scratch, void* stream);

}  // namespace statecore
