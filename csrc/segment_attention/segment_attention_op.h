// From tensors to SegmentAttentionParams, for the operators that contain segment attention.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "segment_attention/segment_attention.h"

namespace statecore {

// Refuses what statecore/ops.py says (on the CPU also by contents of step_ids and cu_seqlens) and fills in
// everything but out, out_dtype and lse. The struct points into the tensors, which must outlive it.
SegmentAttentionParams checked_segment_params(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                                              const torch::stable::Tensor& v,
                                              const torch::stable::Tensor& step_ids,
                                              const std::optional<torch::stable::Tensor>& cu_seqlens,
                                              std::optional<double> scale);

// ---- on CUDA
// Refuses what the kernels do not take. Tensors that they cannot load 16 bytes at a time are copied; the
// struct then points into the copies, which `held` keeps.
void prepare_for_cuda(SegmentAttentionParams& params, const torch::stable::Tensor& q,
                      const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                      std::vector<torch::stable::Tensor>& held);

// Of the prepared struct with its results filled in; q says which GPU.
void run_segment_attention_on_cuda(const SegmentAttentionParams& params, const torch::stable::Tensor& q);

}  // namespace statecore
