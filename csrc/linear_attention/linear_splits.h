// How sequences are divided among the blocks of a sweep (linear_sweep.h).
//
// A split is a run of consecutive chunks of one sequence, through which one block carries a state: the whole
// sequence where sequences and heads fill the GPU, a part of it where they do not (linear_schedule.h). The
// tokens of a chunk are computed together; no chunk crosses the end of a reasoning step.
#pragma once

#include "common/cuda_scratch.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/step_end.h"

namespace statecore {

// Tokens of a chunk, at most. The length of a split is a multiple of it.
constexpr int sweep_chunk_length(int64_t element_bytes) { return element_bytes == 2 ? 64 : 32; }

// The tokens from `begin` to the next chunk's, all of one step.
struct PlannedChunk {
  int32_t begin;
  int32_t ended_step;  // the step that ends before this chunk, or kNoStep, or kPaddingChunk
};
constexpr int32_t kPaddingChunk = -2;  // results are 0, the state stays as it is

struct PlannedSplit {
  int32_t sequence;                // -1: this index is unused
  int32_t begin, end;              // tokens of the row
  int32_t first_chunk, end_chunk;  // of the sequence's planned chunks
};

// The splits of a call, as kernels see them. Only the device knows how many splits packed sequences have: the
// host reserves `capacity` indices, some of which stay unused.
struct Splits {
  int64_t capacity = 0, sequences = 0;
  int64_t tokens = 0;                     // of a row of the batch
  const int32_t* cu_seqlens = nullptr;    // null: sequence n is row n
  int32_t length = 0;                     // tokens of a split; 0: every sequence is one split
  const PlannedSplit* planned = nullptr;  // null: splits follow from the other members
  const PlannedChunk* chunks = nullptr;   // null: all chunks of a split but the last are full
};

// The plan of a call, as far as the device has to make it: splits, and chunks where steps end.
struct SplitPlan {
  Splits splits;
  PlannedSplit* planned_splits;  // written by the plan kernel; null: nothing to plan
  PlannedChunk* planned_chunks;  // null: there are no steps
  int chunk_length;
  const int32_t* step_ids;
  int64_t ids_batch;
  const int32_t* initial_step;
};

// split_length 0: every sequence is one split.
SplitPlan make_split_plan(const LinearAttentionInputs& inputs, int32_t split_length,
                          ScratchAllocator& allocator);
void launch_split_plan(const SplitPlan& plan, void* stream);

}  // namespace statecore
