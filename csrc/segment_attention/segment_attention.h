// Segment attention: softmax attention of token i over the tokens j <= i of its sequence that belong to the
// prompt (id 0) or to the reasoning step of i. arXiv 2602.01198 section 3; contract: statecore/ops.py.
//
// The border between tensors and kernels: a backend is handed these structs and knows nothing of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/heads_view.h"

namespace statecore {

// B batch, Tq queries, Tk >= Tq keys (the queries are the last Tq tokens), N sequences, Hq query heads, Hk
// key and value heads (Hq is a multiple), Dk and Dv widths. "Real" is float, for dtype kFloat64 double.
struct SegmentAttentionInputs {
  DType dtype;  // of q, k, v and of results of their kind
  int64_t batch, queries, keys, sequences;
  int64_t query_heads, kv_heads;
  int64_t key_width, value_width;
  double scale;

  HeadsView q;  // [B, Tq, Hq, Dk]
  HeadsView k;  // [B, Tk, Hk, Dk]
  HeadsView v;  // [B, Tk, Hk, Dv]

  const int32_t* cu_seqlens = nullptr;  // [N + 1], or null: every row of the batch is one sequence
  // [B, Tk], ids_batch between rows. -1 is padding; the others do not decrease within a sequence.
  const int32_t* step_ids = nullptr;
  int64_t ids_batch = 0;
};

struct SegmentAttentionParams : SegmentAttentionInputs {
  // Results, contiguous, every element written. Padding gets out = 0 and lse = -inf.
  void* out = nullptr;                // [B, Tq, Hq, Dv] in out_dtype
  DType out_dtype = DType::kFloat32;  // or dtype; kFloat32 spares 16-bit inputs a rounding
  void* lse = nullptr;                // Real [B, Hq, Tq], natural logarithm
};

struct SegmentAttentionBackwardParams : SegmentAttentionInputs {
  // Results of the forward, contiguous.
  const void* out = nullptr;  // [B, Tq, Hq, Dv] in dtype
  const void* lse = nullptr;  // Real [B, Hq, Tq]

  HeadsView grad_out = {};         // [B, Tq, Hq, Dv]
  const void* grad_lse = nullptr;  // Real [B, Hq, Tq] contiguous, or null

  // Results, contiguous, every element written.
  void* grad_q = nullptr;  // [B, Tq, Hq, Dk]
  void* grad_k = nullptr;  // [B, Tk, Hk, Dk]
  void* grad_v = nullptr;  // [B, Tk, Hk, Dv]
};

// Extra memory: 8 bytes per token of k, and about 6 (Dk + Dv) KiB per thread.
void segment_attention_cpu(const SegmentAttentionParams& params);

// Extra memory: 8 bytes per token of k, about 12 (Dk + Dv) KiB per thread, and accumulators of grad_k and
// grad_v, Real [Tk, Dk + Dv] for one key head of the longest sequence: one set per thread where sequences and
// heads are many, about 16 in all where they are few.
void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params);

// dtype float32, bfloat16 or float16; widths a multiple of 16 up to 128; q, k, v and grad_out start at a
// multiple of 16 bytes and have such strides. `scratch` has the number of bytes that the _scratch function
// computes from shapes alone, and must stay valid until `stream`, a cudaStream_t, has passed the call.
int64_t segment_attention_cuda_scratch(const SegmentAttentionParams& params);
void segment_attention_cuda(const SegmentAttentionParams& params, void* scratch, void* stream);
int64_t segment_attention_backward_cuda_scratch(const SegmentAttentionBackwardParams& params);
void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* scratch,
                                     void* stream);

}  // namespace statecore
