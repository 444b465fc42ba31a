// The forward of segment attention for GPUs with the instructions of sm_90a.
#pragma once

#include "segment_attention/segment_plan.cuh"

namespace statecore {

// Needs sm_90a, 16-bit elements, a positive scale, and tensors that TMA can address.
bool segment_attention_sm90_supports(const SegmentAttentionParams& params);

// After make_plan() on the same stream.
void segment_attention_sm90(const SegmentAttentionParams& params, const DevicePlan& plan, void* stream);

}  // namespace statecore
