// The sweep for GPUs with the instructions of sm_90a.
#pragma once

#include "linear_attention/linear_sweep.h"

namespace statecore {

// Whether the current GPU and the kernel can run it: 16-bit elements, and tensors that TMA can address.
bool linear_sweep_sm90_supports(const SweepParams& params);

void linear_sweep_sm90(const SweepParams& params, void* stream);

}  // namespace statecore
