// From the local states of splits, which sweeps compute starting from zeros, to the state before each split.
#pragma once

#include "linear_attention/linear_splits.h"

namespace statecore {

// In sequence order
//
//   state before split i + 1 = transition of split i * state before split i + local state of split i
//
// and, where `reverse`, from the last split to the first: the state after each. In place.
struct SplitScan {
  Splits splits;
  bool reverse;
  int32_t states, heads;
  int64_t state_size;        // elements
  float* split_states;       // [states, splits, heads, state_size]: local, then before (after) each split
  const float* transitions;  // [splits, heads, 9]: matrices on (running, start, prompt)
  const float* initial;      // [states, N, heads, state_size] or null, times its factor
  float* final;              // the same
  float initial_factor, final_factor;
};

void launch_split_scan(const SplitScan& scan, void* stream);

}  // namespace statecore
