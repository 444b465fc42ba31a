// One decoding token a row: rank-1 update of the row's state, read, and the end of a step where one ends
// (linear_attention/step_end.h).  arXiv 2602.01198 sections 3 and 4; contract: statecore/ops.py.
//
// The border between tensors and kernels: a backend is handed this struct and knows nothing of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

// B rows, P slots, Hq query, Hk key, Hv value heads grouped as in linear_attention.h, Dk and Dv widths.
// "Real" is float, for dtype kFloat64 double. Strides count elements.
struct StateUpdateParams {
  DType dtype;  // of q, k, v and out
  int64_t rows, slots;
  int64_t query_heads, key_heads, value_heads;
  int64_t key_width, value_width;
  double scale;

  void* states;         // Real [state_kinds, P, Hv, Dk, Dv] contiguous, changed in place
  int64_t state_kinds;  // 3 (running, start of the step, prompt), or 1: nothing is corrected

  const void* q;  // [B, Hq, Dk]
  const void* k;  // [B, Hk, Dk]
  const void* v;  // [B, Hv, Dv]
  int64_t q_row, q_head;
  int64_t k_row, k_head;
  int64_t v_row, v_head;

  const void* log_decay = nullptr;     // Real [B, Hv], or null: no decay
  const int32_t* ends_step = nullptr;  // [B] step that ends after this token, or -1; null: -1 everywhere
  const void* alpha = nullptr;         // Real [alphas]
  int64_t alphas = 0;
  const int32_t* row_slots = nullptr;  // [B] slot of a row, -1: skip the row; null: row b has slot b

  void* out;  // [B, max(Hq, Hv), Dv] contiguous; 0 for a skipped row
};

void state_update_cpu(const StateUpdateParams& params);

// Queued on `stream`, a cudaStream_t. Widths are multiples of 16 up to 128, states is aligned to 16 bytes; no
// float64. Nothing is read on the host: a slot outside the pool is skipped like -1.
void state_update_cuda(const StateUpdateParams& params, void* stream);

}  // namespace statecore
