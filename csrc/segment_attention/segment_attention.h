// Segment attention: softmax attention of token i over the tokens j <= i of its sequence that belong to the
// prompt (id 0) or to the step of i.  arXiv 2602.01198 section 3; contract: statecore/ops.py.
//
// The border between tensors and kernels: a backend is handed these structs and knows nothing of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace statecore {

// B batch, Tq queries, Tk >= Tq keys (the queries are the last Tq tokens), Hq query heads, Hk key and value
// heads, Dk and Dv widths. Strides count elements; the last dimension is contiguous everywhere.
struct SegmentAttentionParams {
  DType dtype;  // of q, k, v
  int64_t batch, queries, keys;
  int64_t query_heads, kv_heads;
  int64_t key_width, value_width;
  double scale;

  const void* q;  // [B, Tq, Hq, Dk]
  const void* k;  // [B, Tk, Hk, Dk]
  const void* v;  // [B, Tk, Hk, Dv]
  int64_t q_batch, q_time, q_head;
  int64_t k_batch, k_time, k_head;
  int64_t v_batch, v_time, v_head;

  const int32_t*
      step_ids;  // [B, Tk], ids_batch between rows; -1 (nobody there), or not decreasing in a sequence
  int64_t ids_batch;
  const int32_t* cu_seqlens;  // [sequences + 1], or null: every row of the batch is one sequence
  int64_t sequences;

  // Results, contiguous, every element written. A query of id -1 gets out = 0 and lse = -inf.
  void* out;        // [B, Tq, Hq, Dv] in out_dtype
  DType out_dtype;  // dtype, or kFloat32 for a caller that goes on computing with 16-bit inputs
  void* lse;        // [B, Hq, Tq] float32 (float64 for kFloat64), natural log
};

struct SegmentAttentionBackwardParams {
  // The forward's inputs and results; out and lse are read here and out_dtype is dtype.
  SegmentAttentionParams forward;

  const void* grad_out;  // [B, Tq, Hq, Dv] in dtype
  int64_t grad_out_batch, grad_out_time, grad_out_head;
  const void* grad_lse;  // [B, Hq, Tq] contiguous, in lse's type, or null

  // Results, contiguous, in dtype, every element written.
  void* grad_q;  // [B, Tq, Hq, Dk]
  void* grad_k;  // [B, Tk, Hk, Dk]
  void* grad_v;  // [B, Tk, Hk, Dv]
};

// Extra memory: 8 bytes a token of k, and about 6 (Dk + Dv) KiB a thread.
void segment_attention_cpu(const SegmentAttentionParams& params);

// Extra memory: 8 bytes a token of k and about 12 (Dk + Dv) KiB a thread, besides float32 sums (float64 for
// kFloat64) of grad_k and grad_v of one key head of the longest sequence: one such [Tk, Dk + Dv] a thread
// where sequences and heads are many, about 16 in all where they are few.
void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params);

// On a GPU, or its emulator: float32, bfloat16 or float16, widths that are multiples of 16 up to 128; q, k, v
// and grad_out begin at multiples of 16 bytes and so do their rows. `scratch` has as many bytes as _scratch
// says, from shapes alone, and belongs to the call until the stream has passed it.
int64_t segment_attention_cuda_scratch(const SegmentAttentionParams& params);
void segment_attention_cuda(const SegmentAttentionParams& params, void* scratch, void* stream);

int64_t segment_attention_backward_cuda_scratch(const SegmentAttentionBackwardParams& params);
void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* scratch,
                                     void* stream);

}  // namespace statecore
