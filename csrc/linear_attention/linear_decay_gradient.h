// The gradient of log_decay, from what the sweeps for dq and dk leave:
//
//   grad_t = sum over s >= t of (<q_s, dq_s> - <k_s, dk_s>) + <S, dS> of the final state
#pragma once

#include "linear_attention/linear_splits.h"

namespace statecore {

struct DecayGradient {
  Splits splits;
  int64_t batch;
  int32_t heads, query_group;                     // value heads, query heads of each
  const float* q_dots;                            // <q, dq>, [column_blocks, B, heads * query_group, T]
  const float* k_dots;                            // <k, dk>, [column_blocks, B, heads, T]
  int32_t column_blocks;                          // partial sums of a dot product
  const float *final_states, *grad_final_states;  // [N, heads, state_size]
  int64_t state_size;
  float* gradient;  // [B, T, heads]
};

void launch_decay_gradient(const DecayGradient& p, void* stream);

}  // namespace statecore
