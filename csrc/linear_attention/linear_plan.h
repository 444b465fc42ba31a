// Which tokens the CPU backend computes together: chunks of up to a given length, none across the end of a
// step, and splits, which are runs of consecutive chunks (carry.h).
#pragma once

#include <vector>

#include "common/range.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/step_end.h"

namespace statecore {

struct TokenChunk {
  int64_t begin;   // first token of the row
  int32_t length;  // tokens, all of one step
  bool padding;
};

struct CarrySplit {
  Range chunks;
  int32_t ended_step;  // the step that ends before this split, or kNoStep
};

struct LinearSequence {
  int64_t row;  // of the batch
  Range splits;
};

struct LinearPlan {
  std::vector<TokenChunk> chunks;
  std::vector<CarrySplit> splits;
  std::vector<LinearSequence> sequences;
  bool has_local_states;  // splits compute local states of their own, see carry.h
};

LinearPlan plan_linear(const LinearAttentionInputs& inputs, int chunk_length);

// Of the state alone, which every token and head reads and writes at least once.
int64_t state_multiply_adds(const LinearAttentionInputs& inputs);

}  // namespace statecore
