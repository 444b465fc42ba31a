// From tensors to StateUpdateParams.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/cuda_backend.h"
#include "linear_attention/linear_attention_op.h"
#include "state_update/state_update.h"

namespace statecore {
namespace {

// ---- backends: what they accept beyond the shared checks, and their entry points. Kernels take q, k and v
// of any alignment.
#if defined(STATECORE_CPU_BACKEND)
struct StateUpdateOnCpu {
  static void check(const StateUpdateParams&) {}
  static void run(const StateUpdateParams& p, const Tensor&) { state_update_cpu(p); }
};
#endif

#if defined(STATECORE_CUDA_BACKEND)
struct StateUpdateOnCuda {
  static void check(const StateUpdateParams& p) {
    check_cuda_dtype(p.dtype);
    check_cuda_width("q and k", p.key_width);
    check_cuda_width("v", p.value_width);
    if (reinterpret_cast<uintptr_t>(p.states) % 16 != 0)
      refuse("states must start at a multiple of 16 bytes on CUDA; call .clone() on it first");
  }
  static void run(const StateUpdateParams& p, const Tensor& q) {
    const CurrentStreamGuard guard(q);
    state_update_cuda(p, guard.stream());
  }
};
#endif

// x [B, H, D]
HeadsView token_heads_view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), 0, x.stride(1)}; }

void set_heads(StateUpdateParams& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  p.dtype = element_dtype(q);
  check_dim("q", q, 3, "[B, Hq, Dk]");
  check_dim("k", k, 3, "[B, Hk, Dk]");
  check_dim("v", v, 3, "[B, Hv, Dv]");
  p.batch = q.size(0), p.query_heads = q.size(1), p.key_width = q.size(2);
  p.key_heads = k.size(1), p.value_heads = v.size(1), p.value_width = v.size(2);
  check_shape("k", k, {p.batch, p.key_heads, p.key_width});
  check_shape("v", v, {p.batch, p.value_heads, p.value_width});
  check_head_groups({"q", "k", "v"}, p.query_heads, p.key_heads, p.value_heads, true);
  if (p.key_width < 1) refuse("q and k must have a width of at least 1, got shape ", shape_text(q));
  if (p.value_width < 1) refuse("v must have a width of at least 1, got shape ", shape_text(v));
  for (const auto& [name, x] : {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_dtype(name, *x, q.scalar_type());
    check_same_device(name, *x, q);
    check_last_contiguous(name, *x);
  }
  p.q = token_heads_view(q), p.k = token_heads_view(k), p.v = token_heads_view(v);
}

void set_states(StateUpdateParams& p, const Tensor& states, const Tensor& q) {
  check_dim("states", states, 5, "[3 or 1, P, Hv, Dk, Dv]");
  p.state_kinds = states.size(0), p.pool = states.size(1);
  if (p.state_kinds != 1 && p.state_kinds != 3)
    refuse("states must have 3 states a slot, or 1 without momentum correction, got shape ",
           shape_text(states));
  check_shape("states", states, {p.state_kinds, p.pool, p.value_heads, p.key_width, p.value_width});
  check_dtype("states", states, state_type(p.dtype));
  check_same_device("states", states, q);
  check_contiguous("states", states);
  p.states = states.mutable_data_ptr();
}

// x [B] of int32, contiguous.
const Tensor& checked_rows(const char* name, const Tensor& x, int64_t batch, const Tensor& q,
                           HeldTensors& held) {
  check_shape(name, x, {batch});
  check_dtype(name, x, ScalarType::Int);
  check_same_device(name, x, q);
  return held.emplace_back(torch::stable::contiguous(x));
}

void check_ends_step(const int32_t* ends_step, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b)
    if (ends_step[b] < -1)
      refuse("ends_step must be >= 0, or -1 if the step continues, got ", ends_step[b], " at [", b, "]");
}

// Slots are -1 or in the pool, and none occurs twice: the result would depend on the order of updates.
void check_slots(const int32_t* slots, int64_t batch, int64_t pool) {
  std::vector<std::pair<int32_t, int64_t>> used;
  used.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    if (slots[b] < -1 || slots[b] >= pool)
      refuse("slots must be in [0, ", pool, "), or -1 to skip the row, got ", slots[b], " at [", b, "]");
    if (slots[b] >= 0) used.push_back({slots[b], b});
  }
  std::sort(used.begin(), used.end());
  for (size_t i = 1; i < used.size(); ++i)
    if (used[i].first == used[i - 1].first)
      refuse("slots must name no slot twice, got ", used[i].first, " at [", used[i - 1].second, "] and [",
             used[i].second, "]");
}

void set_step_ends(StateUpdateParams& p, const std::optional<Tensor>& ends_step,
                   const std::optional<Tensor>& alpha, const Tensor& q, HeldTensors& held) {
  if (alpha) {
    p.alpha = checked_alpha(*alpha, q, held);
    p.alphas = alpha->size(0);
  }
  if (!ends_step) return;
  if (p.state_kinds == 3 && !alpha)
    refuse("alpha must be given with ends_step where states has 3 states a slot");
  const Tensor& rows = checked_rows("ends_step", *ends_step, p.batch, q, held);
  p.ends_step = int32_data(rows);
  if (checks_contents(rows)) check_ends_step(int32_data(on_cpu(rows)), p.batch);
}

void set_slots(StateUpdateParams& p, const std::optional<Tensor>& slots, const Tensor& q, HeldTensors& held) {
  if (slots) {
    const Tensor& rows = checked_rows("slots", *slots, p.batch, q, held);
    p.slots = int32_data(rows);
    if (checks_contents(rows)) check_slots(int32_data(on_cpu(rows)), p.batch, p.pool);
  } else if (p.pool < p.batch) {
    refuse("states must have a slot for each of the ", p.batch, " rows when slots is not given, got ",
           p.pool);
  }
}

template <class Backend>
Tensor state_update(const Tensor& states, const Tensor& q, const Tensor& k, const Tensor& v,
                    std::optional<Tensor> log_decay, std::optional<Tensor> ends_step,
                    std::optional<Tensor> alpha, std::optional<Tensor> slots, std::optional<double> scale) {
  StateUpdateParams p{};
  HeldTensors held;
  set_heads(p, q, k, v);
  set_states(p, states, q);
  if (log_decay) p.log_decay = checked_reals("log_decay", *log_decay, {p.batch, p.value_heads}, q, held);
  set_step_ends(p, ends_step, alpha, q, held);
  set_slots(p, slots, q, held);
  p.scale = scale.value_or(1 / std::sqrt(double(p.key_width)));
  Backend::check(p);
  Tensor out = torch::stable::new_empty(q, {p.batch, std::max(p.query_heads, p.value_heads), p.value_width});
  p.out = out.mutable_data_ptr();
  Backend::run(p, q);
  return out;
}

}  // namespace
}  // namespace statecore

#if defined(STATECORE_CPU_BACKEND)
STATECORE_CPU_IMPL(m) {
  using namespace statecore;
  m.impl("state_update", TORCH_BOX(&state_update<StateUpdateOnCpu>));
}
#endif

#if defined(STATECORE_CUDA_BACKEND)
STATECORE_CUDA_IMPL(m) {
  using namespace statecore;
  m.impl("state_update", TORCH_BOX(&state_update<StateUpdateOnCuda>));
}
#endif
