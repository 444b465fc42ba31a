// The border between linear_attention.cu, which decides what is swept, and the kernel that sweeps.
//
// A sweep walks over the tokens of segments, forwards or in reverse, and carries a state S [key, value]:
//
//   forwards   S_t = e^{g_t} S_{t-1} + k_t^T v_t               out_t = q_t S_t
//   in reverse S_t = k_t^T v_t + e^{g_{t+1}} S_{t+1}           out_t = q_t S_t
//
// Forwards it is linear attention, and the gradient of q with (dO, v, k) in the place of (q, k, v) and S
// transposed; in reverse it is the gradient of v with (k, q, dO) and that of k with (v, dO, q), whose state
// is the gradient of S (transposed).
#pragma once

#include "linear_attention/linear_attention.h"

namespace statecore {

constexpr int kSweepValues = 64;  // columns of the state that a block owns

// Tokens that are computed together. A segment's length is a multiple of it.
constexpr int sweep_chunk(DType dtype) { return dtype == DType::kFloat32 ? 32 : 64; }

// Of a plan in device memory: tokens from `begin` to the next chunk's, all of one step.
struct PlannedChunk {
  int32_t begin;
  int32_t ended;  // the step that ends before this chunk, or:
};
constexpr int32_t kNothingEnded = -1;
constexpr int32_t kPaddingChunk = -2;  // tokens that are not there: results 0, the state is left alone

struct PlannedSegment {
  int32_t sequence;                // -1: this slot has no segment
  int32_t begin, end;              // tokens of the row
  int32_t first_chunk, end_chunk;  // of the sequence's, where steps end
};

// What the state is carried across by one block: all of a sequence, or `length` tokens of it. Their number on
// the device is not known to the host; each has a slot, some slots have none.
struct Segments {
  int64_t slots = 0, sequences = 0;
  int64_t tokens = 0;                       // of a row of the batch
  const int32_t* cu_seqlens = nullptr;      // null: sequence n is row n
  int32_t length = 0;                       // 0: a sequence is one segment
  const PlannedSegment* planned = nullptr;  // null: they follow from the rest
  const PlannedChunk* chunks = nullptr;     // null: none ends before its length. See first_chunk_of().
};

// Operand of a sweep: HeadsView, read by virtual head h (see Sweep::group) at head h / shared.
struct SweepOperand : HeadsView {
  int32_t shared = 1;
};

// float32 states [kind, slot, head, key, value] in any order of dimensions; strides count elements. Item i of
// a sweep has head i / shared, and is written by the first that has it. Numbers are stored times `factor`.
struct SweepStates {
  float* data = nullptr;
  int64_t kind = 0, slot = 0, head = 0;
  int32_t key = 0, value = 0;
  int32_t shared = 1;
  float factor = 1;
};

struct Sweep {
  DType dtype;
  bool reverse = false;
  int64_t batch = 0;  // rows
  Segments segments;

  // A block has one item, which has a state, and carries it over `group` virtual heads, item * group ...,
  // whose k and v all go into the state and whose results are summed.
  int32_t items = 0, group = 1;
  int32_t key_width = 0, value_width = 0;

  SweepOperand q, k, v;
  SweepOperand log_decay;     // float32, or null
  bool adds_nothing = false;  // v counts as 0

  SweepStates initial, final;  // null: zeros; not stored
  // Of a segment that started from zeros: what it makes of the state before it, [slot, item, 9]. The first is
  // the factor e^{sum of g}; where steps end, a 3x3 matrix on (running, start, prompt).
  float* transition = nullptr;

  // Step ends: start and prompt of each block's part of the state, in the order of its threads.
  int32_t states = 1;
  const float* alpha = nullptr;
  int64_t alphas = 0;
  float* step_states = nullptr;  // sweep_step_floats()

  // Results times out_factor, contiguous [B, T, items, value_width]; neither: only the state is computed.
  void* out = nullptr;
  float* out_float = nullptr;  // the same in float32, not rounded
  float out_factor = 1;

  // gated_out = segment_out + sigmoid(gate) * out; all or none.
  HeadsView gate;
  const void* segment_out = nullptr;
  void* gated_out = nullptr;

  // Of the gradient of log_decay: sums over 16 columns of out times partner, [value_width / 16, B, items, T].
  float* products = nullptr;
  SweepOperand partner;
};

int64_t sweep_step_floats(const Sweep& sweep);
void launch_sweep(const Sweep& sweep, void* stream);

}  // namespace statecore
