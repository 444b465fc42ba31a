// Linear attention on CUDA: composes sweeps (linear_sweep.h) and the small kernels between them.
//
// The forward is one sweep. The backward has three: forwards for dq, in reverse for dv and for dk. Where
// sequences are split (linear_schedule.h) each direction begins with a sweep for the local states of splits
// and a scan over splits. Under GVA, dq and dk of a key head are sums over value heads that have states of
// their own; they are added up in float32 afterwards. The gradient of log_decay comes from what the sweeps
// for dq and dk leave (linear_decay_gradient.h).
#include <algorithm>
#include <initializer_list>

#include "common/cuda_scratch.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_decay_gradient.h"
#include "linear_attention/linear_group_sums.h"
#include "linear_attention/linear_scan.h"
#include "linear_attention/linear_schedule.h"
#include "linear_attention/linear_splits.h"
#include "linear_attention/linear_sweep.h"
#include "linear_attention/linear_sweep_sm90.h"

namespace statecore {
namespace {

int64_t out_heads(const LinearAttentionInputs& p) { return std::max(p.query_heads, p.value_heads); }
int64_t state_size(const LinearAttentionInputs& p) { return p.key_width * p.value_width; }

void run_sweep(const SweepParams& sweep, void* stream) {
  if (linear_sweep_sm90_supports(sweep)) return linear_sweep_sm90(sweep, stream);
  linear_sweep(sweep, stream);
}

// ---- sweeps of an operator
// States [kinds, rows, Hv, Dk, Dv] of a sweep whose keys are k and values are v, or the other way round.
SweepStates sweep_states(const LinearAttentionInputs& p, const void* data, int64_t rows, int64_t state_heads,
                         bool transposed, double factor) {
  SweepStates s;
  s.data = static_cast<float*>(const_cast<void*>(data));
  s.head = state_size(p), s.split = p.value_heads * s.head, s.kind = rows * s.split;
  s.key = transposed ? 1 : int32_t(p.value_width), s.value = transposed ? int32_t(p.value_width) : 1;
  s.head_divisor = int32_t(state_heads / p.value_heads);
  s.factor = float(factor);
  return s;
}

enum class SweepResult { kOut, kLocalState, kGradQ, kGradLocalState, kGradV, kGradK };

// The operands of a sweep. Gradients, local states of theirs included, need grad_out.
SweepParams make_sweep(SweepResult result, const LinearAttentionInputs& p, const HeadsView& grad_out,
                       const Splits& splits) {
  const bool forwards =
      result == SweepResult::kOut || result == SweepResult::kGradQ || result == SweepResult::kLocalState;
  SweepParams s{};
  s.dtype = p.dtype;
  s.reverse = !forwards;
  s.batch = p.batch;
  s.splits = splits;
  const int64_t virtual_heads = result == SweepResult::kLocalState ? p.value_heads : out_heads(p);
  s.group = forwards ? 1 : int32_t(virtual_heads / p.value_heads);
  s.state_heads = int32_t(virtual_heads / s.group);

  const auto operand = [&](const HeadsView& x, int64_t heads) {
    return SweepOperand{x, int32_t(std::max<int64_t>(virtual_heads / heads, 1))};
  };
  const SweepOperand q = operand(p.q, p.query_heads), k = operand(p.k, p.key_heads),
                     v = operand(p.v, p.value_heads), dout = operand(grad_out, out_heads(p));
  switch (result) {
    case SweepResult::kOut:
    case SweepResult::kLocalState: s.q = q, s.k = k, s.v = v; break;
    case SweepResult::kGradQ: s.q = dout, s.k = v, s.v = k, s.dot_operand = q; break;
    case SweepResult::kGradV:
    case SweepResult::kGradLocalState: s.q = k, s.k = q, s.v = dout; break;
    case SweepResult::kGradK: s.q = v, s.k = dout, s.v = q, s.dot_operand = k; break;
  }
  const bool transposed = result == SweepResult::kGradQ || result == SweepResult::kGradK;
  s.key_width = int32_t(transposed ? p.value_width : p.key_width);
  s.value_width = int32_t(transposed ? p.key_width : p.value_width);
  if (p.log_decay.data) s.log_decay = {p.log_decay, int32_t(s.state_heads / p.value_heads)};
  s.states = int32_t(p.states);
  s.alpha = static_cast<const float*>(p.alpha), s.alphas = p.alphas;
  return s;
}

// ---- split sequences: the states between splits
struct SplitStates {
  float *states = nullptr, *transitions = nullptr;  // [kinds, splits, Hv, Dk, Dv], [splits, Hv, 9]
};

SplitStates take_split_states(const LinearAttentionInputs& p, const Splits& splits,
                              ScratchAllocator& allocator) {
  if (splits.length == 0) return {};
  const int64_t heads = splits.capacity * p.value_heads;
  return {allocator.take<float>(p.states * heads * state_size(p)), allocator.take<float>(9 * heads)};
}

struct ScaledStates {
  const void* data;  // or null
  double factor;
};

// Fills split_states with the state before each split (in reverse: after it), and `final`.
void compute_split_states(SweepParams local_state, const LinearAttentionInputs& p,
                          const SplitStates& split_states, ScaledStates initial, ScaledStates final,
                          void* stream) {
  const Splits& splits = local_state.splits;
  local_state.final =
      sweep_states(p, split_states.states, splits.capacity, local_state.state_heads, false, 1);
  local_state.transitions = split_states.transitions;
  run_sweep(local_state, stream);
  launch_split_scan(
      {splits, local_state.reverse, local_state.states, int32_t(p.value_heads), state_size(p),
       split_states.states, split_states.transitions, static_cast<const float*>(initial.data),
       static_cast<float*>(const_cast<void*>(final.data)), float(initial.factor), float(final.factor)},
      stream);
}

// Sweeps run one after another, so that all use the same memory.
void take_step_states(std::initializer_list<SweepParams*> sweeps, ScratchAllocator& allocator) {
  int64_t floats = 0;
  for (const SweepParams* sweep : sweeps) floats = std::max(floats, sweep_step_state_floats(*sweep));
  float* const step_states = allocator.take<float>(floats);
  for (SweepParams* sweep : sweeps) sweep->step_states = step_states;
}

// ---- the forward
struct Forward {
  SplitPlan plan;
  SplitStates split_states;
  SweepParams local_state, out;
};

Forward prepare_forward(const LinearAttentionParams& p, ScratchAllocator& allocator) {
  Forward f;
  const int64_t v_tiles = value_tiles(int(p.value_width));
  const ScheduleCosts costs{{{out_heads(p) * v_tiles, 1}}, {{p.value_heads * v_tiles, kLocalStateChunkTime}}};
  f.plan = make_split_plan(p, choose_split_length(p, costs), allocator);
  const Splits& splits = f.plan.splits;
  f.split_states = take_split_states(p, splits, allocator);
  f.local_state = make_sweep(SweepResult::kLocalState, p, {}, splits);
  f.out = make_sweep(SweepResult::kOut, p, {}, splits);

  const int64_t heads = f.out.state_heads;
  if (splits.length > 0) {
    f.out.initial = sweep_states(p, f.split_states.states, splits.capacity, heads, false, 1);
  } else {
    f.out.initial = sweep_states(p, p.initial_states, p.sequences, heads, false, 1);
    f.out.final = sweep_states(p, p.final_states, p.sequences, heads, false, 1);
  }
  f.out.out = p.out, f.out.out_factor = float(p.scale);
  f.out.gate = p.gate, f.out.segment_out = p.segment_out, f.out.gated_out = p.gated_out;
  if (splits.length > 0)
    take_step_states({&f.local_state, &f.out}, allocator);
  else
    take_step_states({&f.out}, allocator);
  return f;
}

// ---- the backward
struct Backward {
  SplitPlan plan;
  SplitStates split_states;  // of the forward, then of the gradient
  SweepParams local_state, grad_q, grad_local_state, grad_v, grad_k;
  float* final_states = nullptr;   // of the forward, for the gradient of log_decay
  float* group_addends = nullptr;  // GVA: of dq, then of dk
};

int32_t backward_split_length(const LinearAttentionInputs& p) {
  const int64_t k_tiles = value_tiles(int(p.key_width)), v_tiles = value_tiles(int(p.value_width));
  const double group = double(out_heads(p)) / double(std::max<int64_t>(p.value_heads, 1));
  const ScheduleCosts costs{{{out_heads(p) * k_tiles, 1},        // dq
                             {p.value_heads * v_tiles, group},   // dv
                             {p.value_heads * k_tiles, group}},  // dk
                            {{p.value_heads * v_tiles, kLocalStateChunkTime},
                             {p.value_heads * v_tiles, kLocalStateChunkTime * group}}};
  return choose_split_length(p, costs);
}

// The forward state, for dq.
void prepare_forwards(Backward& b, const LinearAttentionBackwardParams& p, ScratchAllocator& allocator) {
  const Splits& splits = b.plan.splits;
  const int64_t heads = b.grad_q.state_heads;
  if (p.log_decay.data) b.final_states = allocator.take<float>(p.sequences * p.value_heads * state_size(p));
  b.grad_q.out_factor = float(p.scale);
  if (splits.length > 0) {
    b.grad_q.initial = sweep_states(p, b.split_states.states, splits.capacity, heads, true, 1);
  } else {
    b.grad_q.initial = sweep_states(p, p.initial_states, p.sequences, heads, true, 1);
    b.grad_q.final = sweep_states(p, b.final_states, p.sequences, heads, true, 1);
  }
}

// The state's gradient, for dv and dk. Reverse sweeps carry it divided by the scale, so that what goes into
// it need not be scaled.
void prepare_reverse(Backward& b, const LinearAttentionBackwardParams& p) {
  const Splits& splits = b.plan.splits;
  const bool no_scale = float(p.scale) == 0;
  const double scale = no_scale ? 1 : p.scale;
  for (SweepParams* sweep : {&b.grad_local_state, &b.grad_v, &b.grad_k}) {
    sweep->out_factor = float(scale), sweep->zero_v = no_scale;
    const bool transposed = sweep == &b.grad_k;
    if (splits.length == 0)
      sweep->initial =
          sweep_states(p, p.grad_final_states, p.sequences, sweep->state_heads, transposed, 1 / scale);
    else if (sweep != &b.grad_local_state)
      sweep->initial =
          sweep_states(p, b.split_states.states, splits.capacity, sweep->state_heads, transposed, 1);
  }
  if (splits.length == 0)
    b.grad_v.final = sweep_states(p, p.grad_initial_states, p.sequences, b.grad_v.state_heads, false, scale);
}

Backward prepare_backward(const LinearAttentionBackwardParams& p, ScratchAllocator& allocator) {
  Backward b;
  b.plan = make_split_plan(p, backward_split_length(p), allocator);
  const Splits& splits = b.plan.splits;
  b.split_states = take_split_states(p, splits, allocator);
  b.local_state = make_sweep(SweepResult::kLocalState, p, p.grad_out, splits);
  b.grad_q = make_sweep(SweepResult::kGradQ, p, p.grad_out, splits);
  b.grad_local_state = make_sweep(SweepResult::kGradLocalState, p, p.grad_out, splits);
  b.grad_v = make_sweep(SweepResult::kGradV, p, p.grad_out, splits);
  b.grad_k = make_sweep(SweepResult::kGradK, p, p.grad_out, splits);
  prepare_forwards(b, p, allocator);
  prepare_reverse(b, p);

  const int64_t rows = p.batch * p.tokens;
  b.grad_v.out = p.grad_v;
  if (p.value_heads > p.key_heads) {
    b.group_addends = allocator.take<float>(rows * p.value_heads * p.key_width);
    b.grad_q.out_float = b.grad_k.out_float = b.group_addends;
  } else {
    b.grad_q.out = p.grad_q, b.grad_k.out = p.grad_k;
  }
  if (p.log_decay.data) {
    b.grad_q.row_dots = allocator.take<float>(p.key_width / 16 * rows * out_heads(p));
    b.grad_k.row_dots = allocator.take<float>(p.key_width / 16 * rows * p.value_heads);
  }
  take_step_states({&b.local_state, &b.grad_q, &b.grad_local_state, &b.grad_v, &b.grad_k}, allocator);
  return b;
}

DecayGradient decay_gradient_of(const Backward& b, const LinearAttentionBackwardParams& p) {
  DecayGradient g{};
  g.splits = b.plan.splits;
  g.batch = p.batch;
  g.heads = int32_t(p.value_heads), g.query_group = int32_t(out_heads(p) / p.value_heads);
  g.q_dots = b.grad_q.row_dots, g.k_dots = b.grad_k.row_dots;
  g.column_blocks = int32_t(p.key_width / 16);
  g.final_states = b.final_states, g.grad_final_states = static_cast<const float*>(p.grad_final_states);
  g.state_size = state_size(p);
  g.gradient = static_cast<float*>(p.grad_log_decay);
  return g;
}

}  // namespace

int64_t linear_attention_cuda_scratch(const LinearAttentionParams& p) {
  ScratchAllocator allocator(nullptr);
  prepare_forward(p, allocator);
  return allocator.bytes();
}

void linear_attention_cuda(const LinearAttentionParams& p, void* scratch, void* stream) {
  ScratchAllocator allocator(scratch);
  const Forward f = prepare_forward(p, allocator);
  launch_split_plan(f.plan, stream);
  if (f.plan.splits.length > 0)
    compute_split_states(f.local_state, p, f.split_states, {p.initial_states, 1}, {p.final_states, 1},
                         stream);
  run_sweep(f.out, stream);
}

int64_t linear_attention_backward_cuda_scratch(const LinearAttentionBackwardParams& p) {
  ScratchAllocator allocator(nullptr);
  prepare_backward(p, allocator);
  return allocator.bytes();
}

void linear_attention_backward_cuda(const LinearAttentionBackwardParams& p, void* scratch, void* stream) {
  ScratchAllocator allocator(scratch);
  const Backward b = prepare_backward(p, allocator);
  const bool split = b.plan.splits.length > 0;
  const int64_t key_rows = p.batch * p.tokens * p.key_heads;
  const int group = int(p.value_heads / p.key_heads);
  launch_split_plan(b.plan, stream);

  if (split)
    compute_split_states(b.local_state, p, b.split_states, {p.initial_states, 1}, {b.final_states, 1},
                         stream);
  run_sweep(b.grad_q, stream);
  if (b.group_addends)
    launch_group_sums(p.dtype, b.group_addends, p.grad_q, key_rows, group, int(p.key_width), stream);

  const double scale = b.grad_v.out_factor;
  if (split)
    compute_split_states(b.grad_local_state, p, b.split_states, {p.grad_final_states, 1 / scale},
                         {p.grad_initial_states, scale}, stream);
  run_sweep(b.grad_v, stream);
  run_sweep(b.grad_k, stream);
  if (b.group_addends)
    launch_group_sums(p.dtype, b.group_addends, p.grad_k, key_rows, group, int(p.key_width), stream);

  if (p.grad_log_decay) launch_decay_gradient(decay_gradient_of(b, p), stream);
}

}  // namespace statecore
