// One decoding token per batch row: the rank-1 update of the row's state, the read, and the end of a
// reasoning step where the token is its last (linear_attention/step_end.h). arXiv 2602.01198 sections 3 and
// 4; contract: statecore/ops.py.
//
// The interface between tensors and kernels: backends take this struct and do not depend on torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/heads_view.h"

namespace statecore {

// B batch rows, P slots in the pool of states, Hq query, Hk key and Hv value heads, grouped as in
// linear_attention.h, Ho = max(Hq, Hv), Dk and Dv widths. "Real" is float, or double for dtype kFloat64.
struct StateUpdateParams {
  DType dtype;  // of q, k, v and out
  int64_t batch, pool;
  int64_t query_heads, key_heads, value_heads;
  int64_t key_width, value_width;
  double scale;

  void* states;         // Real [state_kinds, P, Hv, Dk, Dv] contiguous, updated in place
  int64_t state_kinds;  // 3 (running, start of the step, prompt), or 1: no momentum correction

  HeadsView q;  // [B, 1, Hq, Dk]
  HeadsView k;  // [B, 1, Hk, Dk]
  HeadsView v;  // [B, 1, Hv, Dv]

  const void* log_decay = nullptr;     // Real [B, Hv], or null: no decay
  const int32_t* ends_step = nullptr;  // [B] the step that ends after this token, or -1; null: -1 everywhere
  const void* alpha = nullptr;         // Real [alphas]
  int64_t alphas = 0;
  const int32_t* slots = nullptr;  // [B] the slot of each row, or -1: skip the row; null: row b has slot b

  void* out;  // [B, Ho, Dv] contiguous; 0 for skipped rows
};

void state_update_cpu(const StateUpdateParams& params);

// Runs on `stream`, a cudaStream_t. dtype float32, bfloat16 or float16; widths a multiple of 16 up to
// 128; states is aligned to 16 bytes. The host reads no tensor contents, so slots outside the pool are
// skipped, too.
void state_update_cuda(const StateUpdateParams& params, void* stream);

}  // namespace statecore
