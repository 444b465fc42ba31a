// The border between linear_attention.cu, which composes sweeps, and the kernels that sweep.
//
// A sweep is one pass over the chunks of sequences, forwards or in reverse, that carries a state
// S [key, value]:
//
//   forwards   S_t = e^{g_t} S_{t-1} + k_t^T v_t               out_t = q_t S_t
//   in reverse S_t = k_t^T v_t + e^{g_{t+1}} S_{t+1}           out_t = q_t S_t
//
// Forwards it is linear attention, and the gradient of q with (dO, v, k) in the place of (q, k, v) and S
// transposed; in reverse it is the gradient of v with (k, q, dO) and that of k with (v, dO, q), whose state
// is the gradient of S (transposed).
#pragma once

#include "common/ceil_div.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_splits.h"

namespace statecore {

constexpr int kSweepValues = 64;  // columns of the state that a block has

// An operand of a sweep: virtual head h (see SweepParams::group) reads head h / head_divisor.
struct SweepOperand : HeadsView {
  int32_t head_divisor = 1;
};

// float32 states [kind, split, head, key, value] in any order of dimensions; strides count elements. State
// head h of a sweep has the state of head h / head_divisor, which the first of them stores. States are
// multiplied by `factor` when loaded or stored.
struct SweepStates {
  float* data = nullptr;
  int64_t kind = 0, split = 0, head = 0;
  int32_t key = 0, value = 0;
  int32_t head_divisor = 1;
  float factor = 1;
};

struct SweepParams {
  DType dtype;
  bool reverse = false;
  int64_t batch = 0;  // rows
  Splits splits;

  // A state head has a state of its own, which a block carries over `group` virtual heads, from
  // state_head * group on: k and v of all of them go into the state, and their results are summed.
  int32_t state_heads = 0, group = 1;
  int32_t key_width = 0, value_width = 0;

  SweepOperand q, k, v;
  SweepOperand log_decay;  // float32, or null
  bool zero_v = false;     // v counts as 0

  SweepStates initial, final;  // null: zeros; not stored
  // Of splits that start from zeros: how the state before a split enters the state behind it,
  // [splits, state_heads, 9]. The first number is the factor e^{sum of g}; where steps end, all are a 3x3
  // matrix on (running, start, prompt).
  float* transitions = nullptr;

  // Where steps end: start and prompt states of each block's part of the state, in the order of its threads.
  int32_t states = 1;
  const float* alpha = nullptr;
  int64_t alphas = 0;
  float* step_states = nullptr;  // sweep_step_state_floats()

  // Results times out_factor, contiguous [B, T, state_heads, value_width], rounded or in float32; without
  // either only the state is computed.
  void* out = nullptr;
  float* out_float = nullptr;
  float out_factor = 1;

  // gated_out = segment_out + sigmoid(gate) * out; all or none.
  HeadsView gate;
  const void* segment_out = nullptr;
  void* gated_out = nullptr;

  // For the gradient of log_decay: dot products of the rows of out and dot_operand, as partial sums over 16
  // columns each, [value_width / 16, B, state_heads, T].
  float* row_dots = nullptr;
  SweepOperand dot_operand;
};

// Blocks that share a state of this width.
constexpr int value_tiles(int value_width) { return ceil_div(value_width, kSweepValues); }

inline int64_t sweep_blocks(const SweepParams& p) {
  return p.splits.capacity * p.state_heads * value_tiles(p.value_width);
}

// Key widths that kernels are compiled for.
constexpr int padded_key_width(int key_width) { return key_width <= 64 ? 64 : 128; }

inline int64_t sweep_step_state_floats(const SweepParams& p) {
  return p.states == 3 ? sweep_blocks(p) * 2 * kSweepValues * padded_key_width(p.key_width) : 0;
}

void linear_sweep(const SweepParams& params, void* stream);

}  // namespace statecore
