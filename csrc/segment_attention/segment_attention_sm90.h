// The forward of segment attention for GPUs that have the instructions of sm_90a.
#pragma once

#include "segment_attention/segment_plan.cuh"

namespace statecore {

// Whether it is for this GPU and this problem: 16-bit elements, a positive scale, and tensors that TMA can
// address.
bool segment_attention_sm90_takes(const SegmentAttentionParams& params);

// After make_plan() on the same stream.
void segment_attention_sm90(const SegmentAttentionParams& params, const DevicePlan& plan, void* stream);

}  // namespace statecore
