// The cost model that decides how sequences are split.
//
// Unsplit, a block carries the state through a whole sequence: nothing is computed twice. That fills the GPU
// where sequences times heads are many. Where they are few, sequences are split: a first sweep, from zeros,
// computes each split's local state, a scan (linear_scan.h) turns those into the state before each split, and
// a second sweep starts from there.
#pragma once

#include <cstdint>
#include <vector>

#include "linear_attention/linear_attention.h"

namespace statecore {

struct SweepCost {
  int64_t blocks_per_split;
  double chunk_time;  // of a block, for 64 tokens; 1 where it computes results from its tokens
};

// Of a block that only adds to the state. Estimated: the choice is among powers of two, so that it need not
// be exact.
constexpr double kLocalStateChunkTime = 0.5;

struct ScheduleCosts {
  std::vector<SweepCost> results;       // sweeps in any case
  std::vector<SweepCost> local_states;  // sweeps before them, where sequences are split
};

// The split length, in tokens, with the least expected time on the current GPU; 0: do not split sequences.
// Depends only on shapes and the number of SMs. Packed sequences are assumed to be equally long, since only
// the device knows their lengths.
int32_t choose_split_length(const LinearAttentionInputs& inputs, const ScheduleCosts& costs);

}  // namespace statecore
