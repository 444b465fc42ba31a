// From tensors to SegmentAttentionInputs, for the operators that contain segment attention.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/cuda_backend.h"
#include "common/op_inputs.h"
#include "segment_attention/segment_attention.h"

namespace statecore {

// ---- backends: what they take of tensors (`aligned` may be a copy), and their entry points
#if defined(STATECORE_CPU_BACKEND)
struct SegmentAttentionOnCpu {
  static Tensor aligned(const Tensor& x) { return x; }
  static void check(const SegmentAttentionInputs&) {}
  static void run(const SegmentAttentionParams& p, const Tensor&) { segment_attention_cpu(p); }
  static void run(const SegmentAttentionBackwardParams& p, const Tensor&) {
    segment_attention_backward_cpu(p);
  }
};
#endif

#if defined(STATECORE_CUDA_BACKEND)
struct SegmentAttentionOnCuda {
  static Tensor aligned(const Tensor& x) { return aligned_for_cuda(x); }
  static void check(const SegmentAttentionInputs& p);
  static void run(const SegmentAttentionParams& p, const Tensor& q);
  static void run(const SegmentAttentionBackwardParams& p, const Tensor& q);
};
#endif

// Refuses what statecore/ops.py says, on the CPU also by contents. The struct points into the tensors, which
// must outlive it; prepare_for() makes it fit for a backend.
SegmentAttentionInputs checked_segment_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& step_ids, const std::optional<Tensor>& cu_seqlens,
                                              std::optional<double> scale);

}  // namespace statecore
