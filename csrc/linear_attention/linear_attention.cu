// Linear attention on CUDA: which sweeps (linear_sweep.h) make it, and the small kernels between them.
//
// Where sequences times heads fill the GPU, a block walks over all of a sequence (schedule A). Where they are
// few, sequences are cut into segments (schedule B): a first sweep from zeros finds what each segment adds to
// the state, a scan over the segments of a sequence turns that into the state before each of them, and the
// second sweep starts from there. Which one, and the length of segments, follows from shapes and the number
// of SMs alone: what is expected to take the least time.
//
// The backward has three sweeps: forwards for dq, in reverse for dv and for dk. Under GVA, dq and dk of a key
// head are sums over value heads that have states of their own; they are added up in float32 afterwards. The
// gradient of log_decay at t is the sum over s >= t of <q_s, dq_s> - <k_s, dk_s>, plus <S, dS> of the final
// state.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/cuda_device.h"
#include "common/cuda_scratch.h"
#include "common/elements.cuh"
#include "linear_attention/linear_sweep.cuh"

namespace statecore {
namespace {

// ---- scans of a block
constexpr int kScanThreads = 512, kScanWarps = kScanThreads / 32;

// op over the threads before this one, `nothing` for the first; `all` over all of them. `memory` may be used
// again after the next barrier.
template <class Op>
__device__ int scan_block(int x, int nothing, const Op& op, int* memory, int& all) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const auto scan_warp = [&](int y) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, y, distance);
      if (lane >= distance) y = op(before, y);
    }
    return y;
  };
  const int until = scan_warp(x);
  if (lane == 31) memory[warp] = until;
  __syncthreads();
  const int warps = scan_warp(lane < kScanWarps ? memory[lane] : nothing);
  all = __shfl_sync(0xffffffffu, warps, 31);
  const int before_warp = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0));
  const int before_lane = __shfl_up_sync(0xffffffffu, until, 1);
  const int own = lane > 0 ? before_lane : nothing;
  return warp > 0 ? op(before_warp, own) : own;
}

// ---- the plan: segments, and chunks where steps end
struct Plan {
  Segments segments;
  PlannedSegment* planned;
  PlannedChunk* chunks;  // or null
  int chunk;             // its longest
  const int32_t* step_ids;
  int64_t ids_batch;
  const int32_t* initial_step;
};

// One block a sequence. Chunks begin where the id changes and every `chunk` tokens from there: that takes a
// scan for the last change, their numbers one for the sum, and the step that ends one for the last id, which
// is the largest (padding may lie between).
__global__ void __launch_bounds__(kScanThreads) plan_sequences(Plan p) {
  STATECORE_SHARED(int, last_changes, kScanWarps);
  STATECORE_SHARED(int, last_ids, kScanWarps);
  STATECORE_SHARED(int, counts, kScanWarps);
  constexpr int kOwn = 8;  // tokens of a thread
  const Segments& s = p.segments;
  const int64_t n = blockIdx.x;
  const int thread = int(threadIdx.x);
  const TokenRange tokens = sequence_tokens(s, n);
  PlannedSegment* const segments = p.planned + first_slot(s, n, tokens);
  const int count = segment_count(s, tokens);
  const int64_t next_slot = n + 1 == s.sequences ? s.slots : first_slot(s, n + 1, sequence_tokens(s, n + 1));
  for (int64_t i = thread; i < next_slot - first_slot(s, n, tokens); i += kScanThreads) {
    const int64_t begin = tokens.begin + i * s.length;
    const int64_t end = s.length == 0 ? tokens.end : min(begin + s.length, int64_t(tokens.end));
    segments[i] = {i < count ? int32_t(n) : -1, int32_t(begin), int32_t(end), 0, 0};
  }
  if (!p.chunks) return;
  __syncthreads();

  const int32_t* ids = p.step_ids + (s.cu_seqlens ? 0 : n) * p.ids_batch;
  PlannedChunk* const chunks = p.chunks + first_chunk_of(s, n, tokens);
  int change = tokens.begin, last_id = p.initial_step ? p.initial_step[n] : -1;  // before the present tile
  int written = 0;
  for (int64_t tile = tokens.begin; tile < tokens.end; tile += kOwn * kScanThreads) {
    const int64_t first = tile + kOwn * thread;
    int32_t own[kOwn], before = first > tokens.begin && first < tokens.end ? ids[first - 1] : -1;
    uint32_t changes = 0, begins = 0;
    int last_change = -1, largest = -1;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = first + i < tokens.end ? ids[first + i] : -1;
      largest = max(largest, own[i]);
      if (first + i >= tokens.end) continue;
      if (first + i == tokens.begin || own[i] != (i ? own[i - 1] : before))
        changes |= 1u << i, last_change = int(first + i);
    }
    const auto larger = [](int a, int b) { return max(a, b); };
    int all_changes, all_ids, all;
    int from = max(scan_block(last_change, -1, larger, last_changes, all_changes), change);
    int last = max(scan_block(largest, -1, larger, last_ids, all_ids), last_id);
    change = max(all_changes, change), last_id = max(all_ids, last_id);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (first + i >= tokens.end) continue;
      if (changes >> i & 1u) from = int(first + i);
      if ((first + i - from) % p.chunk == 0) begins |= 1u << i;
    }
    int at = written + scan_block(__popc(begins), 0, [](int a, int b) { return a + b; }, counts, all);
    written += all;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t token = first + i;
      if (token >= tokens.end) continue;
      if (s.length > 0 && (token - tokens.begin) % s.length == 0) {
        const int64_t segment = (token - tokens.begin) / s.length;
        segments[segment].first_chunk = at;
        if (segment > 0) segments[segment - 1].end_chunk = at;
      }
      if (!(begins >> i & 1u)) continue;
      int32_t ended = own[i] == -1 ? kPaddingChunk : kNothingEnded;
      if (last >= 0 && own[i] > last) ended = last;
      last = max(last, own[i]);
      chunks[at++] = {int32_t(token), ended};
    }
  }
  if (thread == 0) {
    chunks[written] = {tokens.end, kNothingEnded};
    if (count > 0) segments[count - 1].end_chunk = written;
  }
}

// ---- from what segments add to the states before them (in reverse: after them), in place
struct StateScan {
  Segments segments;
  bool reverse;
  int32_t states, heads;
  int64_t size;             // elements of a state
  float* added;             // [states, slots, heads, size]
  const float* transition;  // [slots, heads, 9]
  const float* initial;     // [states, N, heads, size] or null, times its factor
  float* final;             // the same
  float initial_factor, final_factor;
};

constexpr int kStateThreads = 64;  // of 4 elements; states have a multiple of as many

__device__ __forceinline__ float4 scaled(float factor, float4 x) {
  return make_float4(factor * x.x, factor * x.y, factor * x.z, factor * x.w);
}
__device__ __forceinline__ float4 plus_scaled(float4 sum, float factor, float4 x) {
  return make_float4(fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z),
                     fmaf(factor, x.w, sum.w));
}

// Each thread has 4 elements of a state's kinds, and what kAhead segments add to them on the way at once.
__global__ void __launch_bounds__(kStateThreads) scan_segments(StateScan p) {
  constexpr int kKinds = 3, kAhead = 4;
  const int64_t parts = p.size / (4 * kStateThreads);
  const int64_t item = blockIdx.x / parts;
  const int64_t n = item / p.heads, head = item % p.heads;
  const int64_t offset = (blockIdx.x % parts * kStateThreads + threadIdx.x) * 4;
  const TokenRange tokens = sequence_tokens(p.segments, n);
  const int64_t first = first_slot(p.segments, n, tokens);
  const int count = segment_count(p.segments, tokens);
  const auto state = [&](float* states, int64_t rows, int kind, int64_t row) {
    return reinterpret_cast<float4*>(states + ((kind * rows + row) * p.heads + head) * p.size + offset);
  };
  const auto slot = [&](int i) { return first + (p.reverse ? count - 1 - i : i); };

  float4 x[kKinds] = {};
  if (p.initial)
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind)
      if (kind < p.states)
        x[kind] =
            scaled(p.initial_factor, *state(const_cast<float*>(p.initial), p.segments.sequences, kind, n));
  for (int i = 0; i < count; i += kAhead) {
    float4 sum[kAhead][kKinds] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind)
        if (i + a < count && kind < p.states)
          sum[a][kind] = *state(p.added, p.segments.slots, kind, slot(i + a));
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a >= count) break;
      const float* m = p.transition + (slot(i + a) * p.heads + head) * 9;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        if (kind >= p.states) break;
        *state(p.added, p.segments.slots, kind, slot(i + a)) = x[kind];
#pragma unroll
        for (int from = 0; from < kKinds; ++from)
          if (from < p.states) sum[a][kind] = plus_scaled(sum[a][kind], m[3 * kind + from], x[from]);
      }
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) x[kind] = sum[a][kind];
    }
  }
  if (p.final)
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind)
      if (kind < p.states) *state(p.final, p.segments.sequences, kind, n) = scaled(p.final_factor, x[kind]);
}

void launch_scan(const StateScan& p, void* stream) {
  const int64_t blocks = p.segments.sequences * p.heads * (p.size / (4 * kStateThreads));
  if (blocks == 0) return;
  launch("scan_segments", scan_segments,
         {dim3(checked_blocks("linear attention", blocks)), dim3(kStateThreads)}, stream, p);
}

// ---- GVA: sums over the value heads of a group, rounded
__global__ void __launch_bounds__(256)
    sum_groups(DType dtype, const float* parts, void* sums, int64_t rows, int group, int width) {
  const int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (i >= rows * width) return;
  const float* from = parts + i / width * group * width + i % width;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int g = 0; g < group; ++g)
    sum = plus_scaled(sum, 1, *reinterpret_cast<const float4*>(from + int64_t(g) * width));
  store_vec4(dtype, sums, i, sum);
}

void launch_sum_groups(DType dtype, const float* parts, void* sums, int64_t rows, int group, int width,
                       void* stream) {
  const int64_t blocks = (rows * width / 4 + 255) / 256;
  if (blocks == 0) return;
  launch("sum_groups", sum_groups, {dim3(checked_blocks("linear attention", blocks)), dim3(256)}, stream,
         dtype, parts, sums, rows, group, width);
}

// ---- the gradient of log_decay
struct DecayGradient {
  Segments segments;
  int64_t batch;
  int32_t heads, query_group;  // value heads, query heads of each
  const float* reads;          // <q, dq> in parts, [parts, B, heads * query_group, T]
  const float* writes;         // <k, dk> in parts, [parts, B, heads, T]
  int32_t parts;
  const float *final_states, *grad_final_states;  // [N, heads, size]
  int64_t size;
  float* gradient;  // [B, T, heads]
};

constexpr int kDecayThreads = 256, kDecayGroup = 16;

// Sum over the threads from this one on (excluding it), and over all.
__device__ double scan_later(double x, double* memory, double* groups, double& all) {
  const int thread = int(threadIdx.x);
  __syncthreads();  // of earlier use
  memory[thread] = x;
  __syncthreads();
  if (thread < kDecayThreads / kDecayGroup) {
    double sum = 0;
    for (int i = 0; i < kDecayGroup; ++i) sum += memory[thread * kDecayGroup + i];
    groups[thread] = sum;
  }
  __syncthreads();
  double later = 0;
  all = 0;
  for (int i = kDecayThreads / kDecayGroup - 1; i >= 0; --i) {
    all += groups[i];
    if (i > thread / kDecayGroup) later += groups[i];
  }
  for (int i = (thread / kDecayGroup + 1) * kDecayGroup - 1; i > thread; --i) later += memory[i];
  return later;
}

// One block a sequence and value head, from the last token to the first.
__global__ void __launch_bounds__(kDecayThreads, 2) decay_gradient(DecayGradient p) {
  STATECORE_SHARED(double, memory, kDecayThreads);
  STATECORE_SHARED(double, groups, kDecayThreads / kDecayGroup);
  constexpr int kOwn = 8;  // tokens of a thread
  const int64_t n = blockIdx.x / unsigned(p.heads), head = blockIdx.x % unsigned(p.heads);
  const int64_t row = p.segments.cu_seqlens ? 0 : n, time = p.segments.tokens;
  const int thread = int(threadIdx.x);
  const TokenRange tokens = sequence_tokens(p.segments, n);

  double later = 0;  // of the tiles after the present one
  {
    double product = 0;
    const int64_t at = (n * p.heads + head) * p.size;
    for (int64_t i = thread; i < p.size; i += kDecayThreads)
      product += double(p.final_states[at + i]) * double(p.grad_final_states[at + i]);
    scan_later(product, memory, groups, later);
  }
  constexpr int kTile = kOwn * kDecayThreads;
  const int64_t tiles = (int64_t(tokens.end) - tokens.begin + kTile - 1) / kTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = tokens.begin + tile * kTile + kOwn * thread;
    double own[kOwn], sum = 0;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      const int64_t token = first + i;
      if (token < tokens.end) {
        for (int part = 0; part < p.parts; ++part) {
          const int64_t item = (part * p.batch + row) * p.heads + head;
          for (int g = 0; g < p.query_group; ++g)
            sum += double(p.reads[(item * p.query_group + g) * time + token]);
          sum -= double(p.writes[item * time + token]);
        }
      }
      own[i] = sum;
    }
    double all;
    const double after = later + scan_later(sum, memory, groups, all);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (first + i < tokens.end)
        p.gradient[(row * time + first + i) * p.heads + head] = float(after + own[i]);
    later += all;
  }
}

// ---- which schedule
// Sweeps as the choice sees them: blocks a segment, and the time that a block takes for a chunk.
struct SweepTime {
  int64_t blocks;
  double chunk;
};
struct SweepTimes {
  std::vector<SweepTime> results, added;  // what both schedules do, and what B does before
};

// The time of a chunk is 1 where it is read and written, and these where it only adds to a state, and for a
// segment in a scan. Estimated; they need not be exact, for segments are powers of two.
constexpr double kAddedChunk = 0.5, kScannedSegment = 0.5;
constexpr int64_t kBlocksOnSm = 2;         // of a sweep
constexpr int64_t kShortestSegment = 128;  // tokens

// Tokens of a segment: those that the least time is expected of, or 0 for schedule A. Packed sequences are
// taken to be equally long, since how long they are is known on the device alone.
int32_t segment_length(const LinearAttentionInputs& p, const SweepTimes& sweeps) {
  const int64_t sequences = std::max<int64_t>(p.sequences, 1);
  const int64_t longest = p.cu_seqlens ? (p.tokens + sequences - 1) / sequences : p.tokens;
  const int64_t places = kBlocksOnSm * current_cuda_device().multiprocessors;
  const auto up = [](int64_t x, int64_t by) { return (x + by - 1) / by; };
  const auto time_of = [&](const std::vector<SweepTime>& some, int64_t length) {
    double time = 0;
    for (const SweepTime& sweep : some)
      time +=
          double(up(sequences * up(longest, length) * sweep.blocks, places) * up(length, 64)) * sweep.chunk;
    return time;
  };
  int32_t best = 0;
  double least = time_of(sweeps.results, std::max<int64_t>(longest, 1));
  for (int64_t length = kShortestSegment; length < longest; length *= 2) {
    const double scans = double(up(longest, length)) * kScannedSegment * double(sweeps.added.size());
    const double time = time_of(sweeps.results, length) + time_of(sweeps.added, length) + scans;
    if (time < least) least = time, best = int32_t(length);
  }
  return best;
}

Plan plan_of(const LinearAttentionInputs& p, const SweepTimes& sweeps, ScratchAllocator& parts) {
  Plan plan{};
  Segments& s = plan.segments;
  s.sequences = s.slots = p.sequences;
  s.tokens = p.tokens;
  s.cu_seqlens = p.cu_seqlens;
  s.length = segment_length(p, sweeps);
  if (s.length > 0)
    s.slots = p.cu_seqlens ? p.tokens / s.length + p.sequences
                           : p.sequences * ((p.tokens + s.length - 1) / s.length);
  if (p.step_ids || (p.cu_seqlens && s.length > 0))
    s.planned = plan.planned = parts.take<PlannedSegment>(s.slots);
  if (p.step_ids) {
    s.chunks = plan.chunks = parts.take<PlannedChunk>(p.batch * p.tokens + p.sequences);
    plan.chunk = sweep_chunk(p.dtype);
    plan.step_ids = p.step_ids, plan.ids_batch = p.ids_batch;
    plan.initial_step = p.initial_step;
  }
  return plan;
}

void launch_plan(const Plan& plan, void* stream) {
  if (!plan.planned || plan.segments.sequences == 0) return;
  launch("plan_sequences", plan_sequences, {dim3(unsigned(plan.segments.sequences)), dim3(kScanThreads)},
         stream, plan);
}

int64_t out_heads(const LinearAttentionInputs& p) { return std::max(p.query_heads, p.value_heads); }
int64_t slices(int64_t width) { return (width + kSweepValues - 1) / kSweepValues; }
int64_t state_size(const LinearAttentionInputs& p) { return p.key_width * p.value_width; }

// States [kinds, rows, Hv, Dk, Dv] of a sweep whose keys are k and values are v, or the other way round.
SweepStates states_of(const LinearAttentionInputs& p, const void* data, int64_t rows, int64_t items,
                      bool transposed, double factor) {
  SweepStates s;
  s.data = static_cast<float*>(const_cast<void*>(data));
  s.head = state_size(p), s.slot = p.value_heads * s.head, s.kind = rows * s.slot;
  s.key = transposed ? 1 : int32_t(p.value_width), s.value = transposed ? int32_t(p.value_width) : 1;
  s.shared = int32_t(items / p.value_heads);
  s.factor = float(factor);
  return s;
}

enum class Role { kOut, kGradQ, kGradV, kGradK, kAdded, kGradAdded };

// What a sweep for `role` reads; `grad_out` of all but the first and kAdded.
Sweep sweep_for(Role role, const LinearAttentionInputs& p, const HeadsView& grad_out,
                const Segments& segments) {
  const bool forwards = role == Role::kOut || role == Role::kGradQ || role == Role::kAdded;
  Sweep s{};
  s.dtype = p.dtype;
  s.reverse = !forwards;
  s.batch = p.batch;
  s.segments = segments;
  const int64_t heads = role == Role::kAdded ? p.value_heads : out_heads(p);  // virtual ones
  s.group = forwards ? 1 : int32_t(heads / p.value_heads);
  s.items = int32_t(heads / s.group);
  const auto operand = [&](const HeadsView& x, int64_t its_heads) {
    return SweepOperand{x, int32_t(std::max<int64_t>(heads / its_heads, 1))};
  };
  const SweepOperand q = operand(p.q, p.query_heads), k = operand(p.k, p.key_heads),
                     v = operand(p.v, p.value_heads), dout = operand(grad_out, out_heads(p));
  switch (role) {
    case Role::kOut:
    case Role::kAdded: s.q = q, s.k = k, s.v = v; break;
    case Role::kGradQ: s.q = dout, s.k = v, s.v = k, s.partner = q; break;
    case Role::kGradV:
    case Role::kGradAdded: s.q = k, s.k = q, s.v = dout; break;
    case Role::kGradK: s.q = v, s.k = dout, s.v = q, s.partner = k; break;
  }
  const bool transposed = role == Role::kGradQ || role == Role::kGradK;
  s.key_width = int32_t(transposed ? p.value_width : p.key_width);
  s.value_width = int32_t(transposed ? p.key_width : p.value_width);
  if (p.log_decay.data) s.log_decay = {p.log_decay, int32_t(s.items / p.value_heads)};
  s.states = int32_t(p.states);
  s.alpha = static_cast<const float*>(p.alpha), s.alphas = p.alphas;
  return s;
}

// The states between segments and what carries them, in schedule B.
struct Between {
  float *states = nullptr, *transition = nullptr;
};

Between between_of(const LinearAttentionInputs& p, const Segments& s, ScratchAllocator& parts) {
  if (s.length == 0) return {};
  const int64_t heads = s.slots * p.value_heads;
  return {parts.take<float>(p.states * heads * state_size(p)), parts.take<float>(9 * heads)};
}

// Fills `between` with the states before all segments (in reverse: after them), and `final`.
void find_states(Sweep added, const LinearAttentionInputs& p, const Between& between, const void* initial,
                 double initial_factor, void* final, double final_factor, void* stream) {
  added.final = states_of(p, between.states, added.segments.slots, added.items, false, 1);
  added.transition = between.transition;
  launch_sweep(added, stream);
  launch_scan({added.segments, added.reverse, added.states, int32_t(p.value_heads), state_size(p),
               between.states, between.transition, static_cast<const float*>(initial),
               static_cast<float*>(final), float(initial_factor), float(final_factor)},
              stream);
}

struct Forward {
  Plan plan;
  Sweep added, out;
  Between between;
};

Forward forward_of(const LinearAttentionParams& p, ScratchAllocator& parts) {
  Forward f;
  const int64_t slices_of_v = slices(p.value_width);
  f.plan =
      plan_of(p, {{{out_heads(p) * slices_of_v, 1}}, {{p.value_heads * slices_of_v, kAddedChunk}}}, parts);
  const Segments& s = f.plan.segments;
  f.between = between_of(p, s, parts);
  f.added = sweep_for(Role::kAdded, p, {}, s);
  f.out = sweep_for(Role::kOut, p, {}, s);
  const bool cut = s.length > 0;
  if (cut) {
    f.out.initial = states_of(p, f.between.states, s.slots, f.out.items, false, 1);
  } else {
    f.out.initial = states_of(p, p.initial_states, p.sequences, f.out.items, false, 1);
    f.out.final = states_of(p, p.final_states, p.sequences, f.out.items, false, 1);
  }
  f.out.out = p.out, f.out.out_factor = float(p.scale);
  f.out.gate = p.gate, f.out.segment_out = p.segment_out, f.out.gated_out = p.gated_out;
  const int64_t floats = std::max(sweep_step_floats(f.out), cut ? sweep_step_floats(f.added) : 0);
  f.added.step_states = f.out.step_states = parts.take<float>(floats);
  return f;
}

struct Backward {
  Plan plan;
  Sweep added, grad_q, grad_added, grad_v, grad_k;
  Between between;  // of the forward states, then of their gradients
  float* final_states = nullptr;
  float* sums = nullptr;  // GVA: of dq, then of dk
};

Backward backward_of(const LinearAttentionBackwardParams& p, ScratchAllocator& parts) {
  Backward b;
  const int64_t slices_of_k = slices(p.key_width), slices_of_v = slices(p.value_width);
  const double group = double(out_heads(p)) / double(std::max<int64_t>(p.value_heads, 1));
  b.plan = plan_of(
      p,
      {{{out_heads(p) * slices_of_k, 1},
        {p.value_heads * slices_of_v, group},
        {p.value_heads * slices_of_k, group}},
       {{p.value_heads * slices_of_v, kAddedChunk}, {p.value_heads * slices_of_v, kAddedChunk * group}}},
      parts);
  const Segments& s = b.plan.segments;
  const bool cut = s.length > 0;
  b.between = between_of(p, s, parts);
  b.added = sweep_for(Role::kAdded, p, p.grad_out, s);
  b.grad_q = sweep_for(Role::kGradQ, p, p.grad_out, s);
  b.grad_added = sweep_for(Role::kGradAdded, p, p.grad_out, s);
  b.grad_v = sweep_for(Role::kGradV, p, p.grad_out, s);
  b.grad_k = sweep_for(Role::kGradK, p, p.grad_out, s);

  if (p.log_decay.data) b.final_states = parts.take<float>(p.sequences * p.value_heads * state_size(p));
  b.grad_q.out_factor = float(p.scale);
  if (cut) {
    b.grad_q.initial = states_of(p, b.between.states, s.slots, b.grad_q.items, true, 1);
  } else {
    b.grad_q.initial = states_of(p, p.initial_states, p.sequences, b.grad_q.items, true, 1);
    b.grad_q.final = states_of(p, b.final_states, p.sequences, b.grad_q.items, true, 1);
  }

  // The state of the reverse sweeps is the gradient of S divided by the scale, so that what goes into it
  // need not be scaled.
  const bool no_scale = float(p.scale) == 0;
  const double scale = no_scale ? 1 : p.scale;
  for (Sweep* sweep : {&b.grad_added, &b.grad_v, &b.grad_k}) {
    sweep->out_factor = float(scale), sweep->adds_nothing = no_scale;
    const bool transposed = sweep == &b.grad_k;
    if (cut && sweep != &b.grad_added)
      sweep->initial = states_of(p, b.between.states, s.slots, sweep->items, transposed, 1);
    if (!cut)
      sweep->initial = states_of(p, p.grad_final_states, p.sequences, sweep->items, transposed, 1 / scale);
  }
  if (!cut) b.grad_v.final = states_of(p, p.grad_initial_states, p.sequences, b.grad_v.items, false, scale);

  b.grad_v.out = p.grad_v;
  const int64_t rows = p.batch * p.tokens, heads = out_heads(p);
  if (p.value_heads > p.key_heads) {
    b.sums = parts.take<float>(rows * p.value_heads * p.key_width);
    b.grad_q.out_float = b.grad_k.out_float = b.sums;
  } else {
    b.grad_q.out = p.grad_q, b.grad_k.out = p.grad_k;
  }
  if (p.log_decay.data) {
    b.grad_q.products = parts.take<float>(p.key_width / 16 * rows * heads);
    b.grad_k.products = parts.take<float>(p.key_width / 16 * rows * p.value_heads);
  }
  int64_t floats = 0;
  for (const Sweep* sweep : {&b.added, &b.grad_q, &b.grad_added, &b.grad_v, &b.grad_k})
    floats = std::max(floats, sweep_step_floats(*sweep));
  float* step_states = parts.take<float>(floats);
  for (Sweep* sweep : {&b.added, &b.grad_q, &b.grad_added, &b.grad_v, &b.grad_k})
    sweep->step_states = step_states;
  return b;
}

}  // namespace

int64_t linear_attention_cuda_scratch(const LinearAttentionParams& p) {
  ScratchAllocator parts(nullptr);
  forward_of(p, parts);
  return parts.bytes();
}

void linear_attention_cuda(const LinearAttentionParams& p, void* scratch, void* stream) {
  ScratchAllocator parts(scratch);
  const Forward f = forward_of(p, parts);
  launch_plan(f.plan, stream);
  if (f.plan.segments.length > 0)
    find_states(f.added, p, f.between, p.initial_states, 1, p.final_states, 1, stream);
  launch_sweep(f.out, stream);
}

int64_t linear_attention_backward_cuda_scratch(const LinearAttentionBackwardParams& p) {
  ScratchAllocator parts(nullptr);
  backward_of(p, parts);
  return parts.bytes();
}

void linear_attention_backward_cuda(const LinearAttentionBackwardParams& p, void* scratch, void* stream) {
  ScratchAllocator parts(scratch);
  const Backward b = backward_of(p, parts);
  const Segments& s = b.plan.segments;
  const int64_t rows = p.batch * p.tokens;
  const int group = int(p.value_heads / p.key_heads);
  launch_plan(b.plan, stream);

  if (s.length > 0) find_states(b.added, p, b.between, p.initial_states, 1, b.final_states, 1, stream);
  launch_sweep(b.grad_q, stream);
  if (b.sums)
    launch_sum_groups(p.dtype, b.sums, p.grad_q, rows * p.key_heads, group, int(p.key_width), stream);

  if (s.length > 0)
    find_states(b.grad_added, p, b.between, p.grad_final_states, 1 / double(b.grad_v.out_factor),
                p.grad_initial_states, b.grad_v.out_factor, stream);
  launch_sweep(b.grad_v, stream);
  launch_sweep(b.grad_k, stream);
  if (b.sums)
    launch_sum_groups(p.dtype, b.sums, p.grad_k, rows * p.key_heads, group, int(p.key_width), stream);

  if (p.grad_log_decay && p.sequences > 0) {
    const int32_t sums = int32_t(p.key_width / 16);
    launch("decay_gradient", decay_gradient,
           {dim3(checked_blocks("linear attention", p.sequences * p.value_heads)), dim3(kDecayThreads)},
           stream,
           DecayGradient{s, p.batch, int32_t(p.value_heads), int32_t(out_heads(p) / p.value_heads),
                         b.grad_q.products, b.grad_k.products, sums, b.final_states,
                         static_cast<const float*>(p.grad_final_states), state_size(p),
                         static_cast<float*>(p.grad_log_decay)});
  }
}

}  // namespace statecore
