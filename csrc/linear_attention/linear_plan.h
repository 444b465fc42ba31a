// Which tokens are computed together: chunks of up to a given length, none across the end of a step, and
// segments of consecutive chunks, which are what the state is carried across.
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

struct CarrySegment {
  Range chunks;
  int32_t ended;  // the step that ends before this segment, or kNoStep
};

struct LinearSequence {
  int64_t row;  // of the batch
  Range segments;
};

struct LinearPlan {
  std::vector<TokenChunk> chunks;
  std::vector<CarrySegment> segments;
  std::vector<LinearSequence> sequences;
  bool summed;  // see carry.h
};

LinearPlan plan_linear(const LinearAttentionInputs& inputs, int chunk_length);

// Of the state alone, which every token and head at least reads and writes.
int64_t state_multiply_adds(const LinearAttentionInputs& inputs);

}  // namespace statecore
