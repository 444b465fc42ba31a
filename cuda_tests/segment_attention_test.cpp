// The CUDA kernels of segment_attention on the emulator: their plan against its definition, results against
// the CPU backend in float64. Built twice, with the plain emulator and with the one that checks accesses,
// which runs the smaller cases.

#include "segment_attention/segment_attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/tile_kernels.h"
#include "segment_attention/segment_plan.cuh"
#include "segment_attention/segment_plan.h"
#include "simt/simt.h"

using namespace statecore;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right && ++failures <= 30) std::printf("FAILED: %s\n", what.c_str());
}

// Global memory of the emulator.
class Buffer {
 public:
  Buffer(const char* name, int64_t bytes) : data_(simt::alloc_global(bytes, name)), bytes_(bytes) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { simt::free_global(data_); }
  char* data() const { return static_cast<char*>(data_); }
  int64_t bytes() const { return bytes_; }
  std::string copy() const { return {data(), size_t(bytes_)}; }
  void poison() const { std::memset(data_, 0xff, bytes_); }

 private:
  void* data_;
  int64_t bytes_;
};

// ---- ids
using Ids = std::vector<int32_t>;

// A prompt of lengths[0] tokens (id `first`), then one step per further length.
Ids ids_of(const std::vector<int>& lengths, int32_t first = 0) {
  Ids ids;
  for (int length : lengths) ids.insert(ids.end(), length, first++);
  return ids;
}

Ids random_ids(int length, int prompt, int longest, double padding, std::mt19937& random) {
  Ids ids;
  int32_t id = 0;
  int left = prompt;
  for (int i = 0; i < length; ++i) {
    while (left == 0) ++id, left = int(random() % longest + (random() % 3 ? 1 : 0));
    --left;
    ids.push_back(id);
  }
  for (int32_t& x : ids)
    if (random() % 1000 < padding * 1000) x = -1;
  return ids;
}

void set_padding(Ids& ids, int begin, int end) { std::fill(ids.begin() + begin, ids.begin() + end, -1); }

Ids joined(const std::vector<Ids>& parts) {
  Ids ids;
  for (const Ids& part : parts) ids.insert(ids.end(), part.begin(), part.end());
  return ids;
}

// ---- the plan alone
struct PlanProblem {
  PlanProblem(int64_t batch, int64_t queries, const Ids& ids, const Ids& cu_seqlens, bool watched = true)
      : ids_buffer("step_ids", ids.size() * 4), cu_buffer("cu_seqlens", cu_seqlens.size() * 4) {
    p.batch = batch, p.queries = queries, p.keys = batch ? int64_t(ids.size()) / batch : 0;
    p.query_heads = p.kv_heads = 1;
    p.ids_batch = p.keys, p.sequences = batch;
    std::memcpy(ids_buffer.data(), ids.data(), ids.size() * 4);
    std::memcpy(cu_buffer.data(), cu_seqlens.data(), cu_seqlens.size() * 4);
    p.step_ids = reinterpret_cast<const int32_t*>(ids_buffer.data());
    if (!cu_seqlens.empty()) {
      p.cu_seqlens = reinterpret_cast<const int32_t*>(cu_buffer.data());
      p.sequences = int64_t(cu_seqlens.size()) - 1;
    }
    ScratchAllocator count(nullptr);
    device_plan(p, count);
    scratch = std::make_unique<Buffer>("scratch", count.bytes());
    ScratchAllocator allocator(scratch->data());
    plan = device_plan(p, allocator);
    simt::forget_blocks();
    if (watched) {
      simt::watch_blocks(plan.visible_end, batch * p.keys * 4, "visible_end");
      simt::watch_blocks(plan.tile, plan.tiles * sizeof(TokenTile), "tiles");
    }
    make_plan(plan, nullptr);
  }

  SegmentAttentionInputs p{};
  Buffer ids_buffer, cu_buffer;
  std::unique_ptr<Buffer> scratch;
  DevicePlan plan;
};

void test_plan(const std::string& name, int64_t batch, int64_t queries, const Ids& ids,
               const Ids& cu_seqlens) {
  const PlanProblem problem(batch, queries, ids, cu_seqlens);
  const SegmentAttentionInputs& p = problem.p;
  const DevicePlan& plan = problem.plan;
  const SegmentPlan wanted = plan_segments(p);
  std::vector<int> covered(batch * p.keys);
  for (int64_t i = 0; i < batch * p.keys; ++i)
    expect(plan.visible_end[i] == wanted.visible_end[i],
           name + ": token " + std::to_string(i) + " is visible up to " +
               std::to_string(plan.visible_end[i]) + ", not " + std::to_string(wanted.visible_end[i]));
  std::vector<int> times(plan.tiles);
  for (int64_t i = 0; i < query_tiles(p, plan); ++i) ++times.at(plan.query_tile(int(i)));
  for (int index = 0; index < plan.tiles; ++index) {
    const TokenTile& tile = plan.tile[index];
    const int64_t row = int64_t(tile.batch) * p.keys;
    const std::string where = name + ": tile " + std::to_string(index);
    expect(tile.begin >= 0 && tile.end - tile.begin <= kTileTokens && tile.end <= p.keys,
           where + " lies outside");
    expect(times[index] == (tile.end > plan.first_query || (!cu_seqlens.empty() && queries > 0)),
           where + " is computed " + std::to_string(times[index]) + " times");
    if (tile.begin >= tile.end) continue;
    int max_end = 0, min_end = INT32_MAX, first_valid = -1;
    for (int t = tile.begin; t < tile.end; ++t) {
      ++covered[row + t];
      max_end = std::max<int>(max_end, wanted.visible_end[row + t]);
      min_end = std::min<int>(min_end, wanted.visible_end[row + t]);
      if (wanted.visible_end[row + t] && first_valid < 0) first_valid = t;
    }
    expect(tile.max_end == max_end && tile.min_end == min_end, where + ": ends");
    // k_blocks: those with visible keys, each once, in order.
    std::vector<int> visited;
    for (int t = tile.prompt_begin; t < tile.prompt_end; ++t) visited.push_back(t);
    for (int t = tile.own_begin; t <= index; ++t) visited.push_back(t);
    expect(std::is_sorted(visited.begin(), visited.end(), std::less_equal<int>()), where + ": order");
    std::vector<int> useful;
    for (int other = 0; other <= index && first_valid >= 0; ++other) {
      const TokenTile& keys = plan.tile[other];
      bool visible = false;
      for (int j = keys.begin; j < keys.end && keys.batch == tile.batch; ++j)
        for (int i = std::max(j, tile.begin); i < tile.end; ++i)
          visible |= wanted.visible_end[row + i] != 0 && i < wanted.visible_end[row + j];
      if (visible) useful.push_back(other);
    }
    expect(std::includes(visited.begin(), visited.end(), useful.begin(), useful.end()),
           where + " misses visible keys");
    // Others are visited only in between: tiles of padding, and steps between the tile's first and last one.
    expect(visited.empty() == useful.empty(), where + " visits k_blocks without visible keys");
    if (!useful.empty() && !visited.empty())
      expect(visited.front() == useful.front() && visited.back() == index, where + " visits too much");
    size_t tokens_between = 0;
    for (int other : visited)
      if (!std::binary_search(useful.begin(), useful.end(), other))
        for (int j = plan.tile[other].begin; j < plan.tile[other].end; ++j)
          tokens_between += ids[row + j] >= 0;
    expect(tokens_between == 0, where + " visits tokens that none of its queries sees");
  }
  expect(std::all_of(covered.begin(), covered.end(), [](int n) { return n == 1; }),
         name + ": tokens in tiles");
}

void test_plans() {
  std::mt19937 random(3);
  simt::schedule() = {};
  test_plan("nothing", 0, 0, {}, {});
  test_plan("no tokens", 3, 0, {}, {});
  test_plan("no sequences", 1, 0, {}, {0});
  test_plan("causal", 1, 1000, ids_of({0, 1000}), {});
  test_plan("a prompt alone", 1, 130, ids_of({130}), {});
  test_plan("only padding", 2, 100, Ids(200, -1), {});
  test_plan("steps of a tile", 1, 640, ids_of({64, 64, 128, 64, 320}), {});
  test_plan("far neighbours", 1, 12000, ids_of({5000, 7000}), {});
  Ids gaps = ids_of({300, 9000, 12000});
  set_padding(gaps, 100, 200), set_padding(gaps, 290, 9000), set_padding(gaps, 9500, 21000);
  test_plan("tiles of padding in between", 1, 300, gaps, {});
  for (int i = 0; i < (simt::checks_races() ? 15 : 200); ++i) {
    const int length = int(random() % 700), batch = 1 + int(random() % 3);
    const double padding = i % 4 == 0 ? 0.3 : i % 4 == 1 ? 0.97 : 0;
    std::vector<Ids> rows;
    const int prompt = int(random() % (i % 3 ? 50 : 400)), longest = int(random() % (i % 2 ? 5 : 200)) + 1;
    for (int b = 0; b < batch; ++b) {
      rows.push_back(random_ids(length, prompt, longest, padding, random));
      if (i % 5 == 0 && length > 0) {
        const int from = int(random() % length);
        set_padding(rows.back(), from, from + int(random() % (length - from)));
      }
    }
    const std::string name = "random ids " + std::to_string(i);
    test_plan(name, batch, length ? int(random() % (length + 1)) : 0, joined(rows), {});
    std::vector<Ids> sequences;
    Ids cu_seqlens{0};
    for (int n = int(random() % 12); n > 0; --n) {
      sequences.push_back(
          random_ids(random() % 3 ? int(random() % 150) : 0, prompt % 30, longest, padding, random));
      cu_seqlens.push_back(cu_seqlens.back() + int(sequences.back().size()));
    }
    const Ids packed = joined(sequences);
    test_plan(name + ", packed", 1, packed.size(), packed, cu_seqlens);
  }
}

// Invalid contents, refused only with STATECORE_CHECK=1, give wrong results but no access out of bounds.
void test_wrong_contents() {
  std::mt19937 random(8);
  for (int i = 0; i < 40; ++i) {
    const int tokens = int(random() % 400);
    Ids ids(tokens), offsets(random() % 6 + 1);
    for (int32_t& id : ids) id = int(random() % 7) - 3;
    for (int32_t& offset : offsets) offset = int(random() % 1000) - 300;
    for (const Ids& cu_seqlens : {Ids{}, offsets}) try {
        const PlanProblem problem(1, tokens, ids, cu_seqlens, /*watched=*/false);  // sequences may overlap
        for (int t = 0; t < problem.plan.tiles; ++t) {
          const TokenTile& tile = problem.plan.tile[t];
          expect(tile.batch == 0 && 0 <= tile.begin && tile.begin <= tile.end && tile.end <= tokens &&
                     tile.end - tile.begin <= kTileTokens && 0 <= tile.prompt_begin &&
                     tile.prompt_end <= t + 1 && tile.own_begin >= tile.prompt_end && tile.max_end <= tokens,
                 "wrong contents: a tile lies outside");
        }
      } catch (const simt::Error& error) {
        expect(false, std::string("wrong contents: ") + error.what());
      }
  }
}

// ---- operators
struct Case {
  std::string name;
  DType dtype;
  int64_t query_heads, kv_heads, key_width, value_width;
  int64_t batch, queries;
  Ids ids;
  Ids cu_seqlens{};
  double scale = 0;  // 0: 1 / sqrt(Dk)
  double q_factor = 1;
  bool poison = false;                // padding holds NaN and infinity, which must not be read
  double tolerance = 1;               // factor, for scores so large that their last bits count
  DType out_dtype = DType::kFloat64;  // kFloat64: dtype
};

void to_dtype(DType dtype, const std::vector<double>& from, void* to) {
  std::vector<float> x(from.begin(), from.end());
  x.resize(padded(int(x.size())));
  tile_kernels<float>().store(dtype, to, 0, 1, int(from.size()), x.data(), 0);
}

std::vector<double> from_dtype(DType dtype, const void* from, int64_t count) {
  if (dtype == DType::kFloat64)
    return {static_cast<const double*>(from), static_cast<const double*>(from) + count};
  std::vector<float> x(padded(int(count)));
  tile_kernels<float>().load(dtype, from, 0, 1, int(count), x.data(), 0);
  return {x.begin(), x.begin() + count};
}

std::vector<double> rounded(DType dtype, const std::vector<double>& x) {
  std::vector<char> bytes(x.size() * 8 + 64);
  to_dtype(dtype, x, bytes.data());
  return from_dtype(dtype, bytes.data(), int64_t(x.size()));
}

double relative_error(const std::vector<double>& got, const std::vector<double>& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (got[i] == wanted[i]) continue;  // infinities too
    difference += (got[i] - wanted[i]) * (got[i] - wanted[i]);
  }
  for (double x : wanted)
    if (std::isfinite(x)) norm += x * x;
  return difference == 0 ? 0 : std::sqrt(difference / norm);  // NaN stays NaN
}

// A tensor of a case [B, T, H, D], in float64 for the CPU and in the case's type, with gaps between rows, for
// the kernels. The values are representable in that type.
class Input {
 public:
  Input(const char* name, DType dtype, int64_t batch, int64_t time, int64_t heads, int64_t width,
        double factor, std::mt19937& random)
      : batch_(batch),
        time_(time),
        heads_(heads),
        width_(width),
        dtype_(dtype),
        gap_(16 / element_bytes(dtype)),
        exact(batch * time * heads * width),
        buffer(name, batch * time * (heads * width + gap_) * element_bytes(dtype)) {
    std::normal_distribution<double> normal;
    for (double& x : exact) x = factor * normal(random);
    exact = rounded(dtype, exact);
    store();
  }
  void set_row(int64_t row_of_batch, int64_t t, double value) {
    std::fill_n(exact.begin() + (row_of_batch * time_ + t) * heads_ * width_, heads_ * width_, value);
    store();
  }
  HeadsView exact_view() const { return contiguous_heads(exact.data(), time_, heads_, width_); }
  HeadsView view() const { return {buffer.data(), time_ * time_stride(), time_stride(), width_}; }

 private:
  int64_t batch_, time_, heads_, width_;
  DType dtype_;
  int64_t gap_;

  int64_t time_stride() const { return heads_ * width_ + gap_; }
  void store() {
    for (int64_t i = 0; i < batch_ * time_; ++i)
      to_dtype(dtype_, {exact.begin() + i * heads_ * width_, exact.begin() + (i + 1) * heads_ * width_},
               buffer.data() + i * time_stride() * element_bytes(dtype_));
  }

 public:
  std::vector<double> exact;
  Buffer buffer;
};

// Compares results with those in float64: float32 results up to `limit`, 16-bit results up to `factor` times
// the error of rounding the exact ones.
void expect_close(const std::string& what, DType dtype, double limit, double factor,
                  const std::vector<double>& got, const std::vector<double>& wanted) {
  const double error = relative_error(got, wanted);
  const double allowed = dtype == DType::kFloat32 || dtype == DType::kFloat64
                             ? limit
                             : factor * relative_error(rounded(dtype, wanted), wanted) + 1e-6;
  expect(error <= allowed, what + " differs by " + std::to_string(error * 1e6) + "e-6, allowed " +
                               std::to_string(allowed * 1e6) + "e-6");
}

struct Run {
  simt::Order order;
  simt::Async async;
};
constexpr Run kRuns[] = {{simt::Order::kForward, simt::Async::kLate},
                         {simt::Order::kReverse, simt::Async::kEarly},
                         {simt::Order::kRandom, simt::Async::kRandom}};
// ... and for specialised warps:
constexpr Run kMoreRuns[] = {{simt::Order::kForward, simt::Async::kEarly},
                             {simt::Order::kReverse, simt::Async::kLate},
                             {simt::Order::kRandom, simt::Async::kLate}};

class Problem {
 public:
  Problem(const Case& c, std::mt19937& random)
      : c_(c),
        keys_(c.batch ? int64_t(c.ids.size()) / c.batch : 0),
        q_("q", c.dtype, c.batch, c.queries, c.query_heads, c.key_width, c.q_factor, random),
        k_("k", c.dtype, c.batch, keys_, c.kv_heads, c.key_width, 1, random),
        v_("v", c.dtype, c.batch, keys_, c.kv_heads, c.value_width, 1, random),
        grad_out_("grad_out", c.dtype, c.batch, c.queries, c.query_heads, c.value_width, 1, random),
        ids_("step_ids", c.ids.size() * 4),
        cu_("cu_seqlens", c.cu_seqlens.size() * 4),
        out_dtype_(c.out_dtype == DType::kFloat64 ? c.dtype : c.out_dtype) {
    std::memcpy(ids_.data(), c.ids.data(), c.ids.size() * 4);
    std::memcpy(cu_.data(), c.cu_seqlens.data(), c.cu_seqlens.size() * 4);
    if (c.poison) {
      const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t t = 0; t < keys_; ++t)
          if (c.ids[b * keys_ + t] < 0) {
            k_.set_row(b, t, nan);
            v_.set_row(b, t, infinity);
            if (t < keys_ - c.queries) continue;
            q_.set_row(b, t - (keys_ - c.queries), nan);
            grad_out_.set_row(b, t - (keys_ - c.queries), nan);
          }
    }
    out_elements_ = c.batch * c.queries * c.query_heads * c.value_width;
    lse_elements_ = c.batch * c.queries * c.query_heads;
    exact_out_.resize(out_elements_), exact_lse_.resize(lse_elements_);
    SegmentAttentionParams p{inputs(DType::kFloat64)};
    p.out = exact_out_.data(), p.out_dtype = DType::kFloat64, p.lse = exact_lse_.data();
    segment_attention_cpu(p);

    std::normal_distribution<double> normal;
    grad_lse_.resize(lse_elements_);
    for (double& x : grad_lse_) x = float(normal(random));
    exact_grad_q_.resize(c.batch * c.queries * c.query_heads * c.key_width);
    exact_grad_k_.resize(c.batch * keys_ * c.kv_heads * c.key_width);
    exact_grad_v_.resize(c.batch * keys_ * c.kv_heads * c.value_width);
    SegmentAttentionBackwardParams b{inputs(DType::kFloat64)};
    b.out = p.out, b.lse = p.lse;
    b.grad_out = grad_out_.exact_view(), b.grad_lse = grad_lse_.data();
    b.grad_q = exact_grad_q_.data(), b.grad_k = exact_grad_k_.data(), b.grad_v = exact_grad_v_.data();
    segment_attention_backward_cpu(b);
  }

  void test_forward(const simt::Device& device = {}) {
    simt::device() = device;
    Buffer out("out", out_elements_ * element_bytes(out_dtype_)), lse("lse", lse_elements_ * 4);
    SegmentAttentionParams p{inputs(c_.dtype)};
    p.out = out.data(), p.out_dtype = out_dtype_, p.lse = lse.data();
    std::string first;
    std::vector<Run> runs(std::begin(kRuns), std::end(kRuns));
    if (device.arch == 90) runs.insert(runs.end(), std::begin(kMoreRuns), std::end(kMoreRuns));
    for (const Run& run : runs) {
      simt::schedule() = {run.order, 7, run.async};
      Buffer scratch("scratch", segment_attention_cuda_scratch(p));
      out.poison(), lse.poison();
      simt::forget_blocks();
      simt::watch_blocks(out.data(), out.bytes(), "out");
      simt::watch_blocks(lse.data(), lse.bytes(), "lse");
      try {
        segment_attention_cuda(p, scratch.data(), nullptr);
      } catch (const simt::Error& error) {
        expect(false, c_.name + ": " + error.what());
      }
      const std::string bits = out.copy() + lse.copy();
      if (!first.empty()) expect(bits == first, c_.name + ": other bits in another order of threads");
      first = bits;
    }
    expect_close(c_.name + ": out", out_dtype_ == c_.dtype ? c_.dtype : DType::kFloat32,
                 c_.dtype == DType::kFloat32    ? 1e-5
                 : c_.dtype == DType::kBFloat16 ? 3e-3
                                                : 3e-4,
                 1.5, from_dtype(out_dtype_, out.data(), out_elements_), exact_out_);
    expect_close(c_.name + ": lse", DType::kFloat32, 1e-5, 1.5,
                 from_dtype(DType::kFloat32, lse.data(), lse_elements_), exact_lse_);
  }

  // From the exact results of the forward, rounded.
  void test_backward() {
    if (out_dtype_ != c_.dtype) return;
    const int64_t bytes = element_bytes(c_.dtype);
    Buffer out("out", out_elements_ * bytes), lse("lse", lse_elements_ * 4),
        grad_lse("grad_lse", lse.bytes());
    Buffer grad_q("grad_q", exact_grad_q_.size() * bytes), grad_k("grad_k", exact_grad_k_.size() * bytes);
    Buffer grad_v("grad_v", exact_grad_v_.size() * bytes);
    to_dtype(c_.dtype, exact_out_, out.data());
    to_dtype(DType::kFloat32, exact_lse_, lse.data());
    to_dtype(DType::kFloat32, grad_lse_, grad_lse.data());
    SegmentAttentionBackwardParams b{inputs(c_.dtype)};
    b.out = out.data(), b.lse = lse.data();
    b.grad_out = grad_out_.view(), b.grad_lse = grad_lse.data();
    b.grad_q = grad_q.data(), b.grad_k = grad_k.data(), b.grad_v = grad_v.data();
    std::string first;
    for (const Run& run : kRuns) {
      simt::schedule() = {run.order, 7, run.async};
      Buffer scratch("scratch", segment_attention_backward_cuda_scratch(b));
      simt::forget_blocks();
      for (Buffer* x : {&grad_q, &grad_k, &grad_v}) {
        x->poison();
        simt::watch_blocks(x->data(), x->bytes(), "gradients");
      }
      try {
        segment_attention_backward_cuda(b, scratch.data(), nullptr);
      } catch (const simt::Error& error) {
        expect(false, c_.name + ", backward: " + error.what());
      }
      const std::string bits = grad_q.copy() + grad_k.copy() + grad_v.copy();
      if (!first.empty())
        expect(bits == first, c_.name + ": gradients of other bits in another order of threads");
      first = bits;
    }
    const auto compare = [&](const char* what, const Buffer& got, const std::vector<double>& wanted) {
      expect_close(c_.name + ": " + what, c_.dtype, 1e-4 * c_.tolerance, 1.5 * c_.tolerance,
                   from_dtype(c_.dtype, got.data(), int64_t(wanted.size())), wanted);
    };
    compare("grad_q", grad_q, exact_grad_q_);
    compare("grad_k", grad_k, exact_grad_k_);
    compare("grad_v", grad_v, exact_grad_v_);
  }

 private:
  SegmentAttentionInputs inputs(DType dtype) const {
    SegmentAttentionInputs p{};
    p.dtype = dtype;
    p.batch = c_.batch, p.queries = c_.queries, p.keys = keys_;
    p.query_heads = c_.query_heads, p.kv_heads = c_.kv_heads;
    p.key_width = c_.key_width, p.value_width = c_.value_width;
    p.scale = c_.scale != 0 ? c_.scale : 1 / std::sqrt(double(c_.key_width));
    const bool exact = dtype == DType::kFloat64;
    p.q = exact ? q_.exact_view() : q_.view();
    p.k = exact ? k_.exact_view() : k_.view();
    p.v = exact ? v_.exact_view() : v_.view();
    p.step_ids = reinterpret_cast<const int32_t*>(ids_.data());
    p.ids_batch = keys_, p.sequences = c_.batch;
    if (!c_.cu_seqlens.empty()) {
      p.cu_seqlens = reinterpret_cast<const int32_t*>(cu_.data());
      p.sequences = int64_t(c_.cu_seqlens.size()) - 1;
    }
    return p;
  }

  Case c_;
  int64_t keys_;
  Input q_, k_, v_, grad_out_;
  Buffer ids_, cu_;
  DType out_dtype_;
  int64_t out_elements_, lse_elements_;
  std::vector<double> exact_out_, exact_lse_, grad_lse_, exact_grad_q_, exact_grad_k_, exact_grad_v_;
};

std::vector<Case> cases() {
  using enum DType;
  std::mt19937 random(9);
  Ids scattered = random_ids(150, 30, 40, 0.3, random);
  Ids padded_row = ids_of({20, 30, 40, 10});
  set_padding(padded_row, 0, 7), set_padding(padded_row, 90, 100);
  std::vector<Case> all{
      {"bfloat16 64", kBFloat16, 2, 1, 64, 64, 1, 150, ids_of({70, 50, 30})},
      {"float16 128", kFloat16, 1, 1, 128, 128, 1, 100, ids_of({30, 70})},
      {"float 64", kFloat32, 2, 1, 48, 64, 1, 130, ids_of({10, 60, 3, 57})},
      {"scattered padding", kFloat16, 2, 2, 32, 16, 1, 150, scattered, {}, 0, 1, true},
      {"a cache with padding", kBFloat16, 3, 1, 16, 64, 1, 40, scattered, {}, 0, 1, true},
      {"padding", kFloat32, 1, 1, 16, 16, 2, 100, joined({padded_row, ids_of({0, 100})}), {}, 0, 1, true},
      {"packed",
       kBFloat16,
       1,
       1,
       64,
       32,
       1,
       150,
       joined({ids_of({3, 20}), ids_of({0, 1}), ids_of({40, 80}), ids_of({0, 6})}),
       {0, 0, 23, 24, 24, 144, 150}},
      {"one query", kFloat16, 2, 1, 64, 64, 2, 1, joined({ids_of({10, 60}), ids_of({70})})},
      {"only padding", kBFloat16, 1, 1, 16, 16, 1, 70, Ids(70, -1), {}, 0, 1, true},
      {"no queries", kBFloat16, 1, 1, 16, 16, 2, 0, Ids(140, 1)},
      {"nothing", kBFloat16, 1, 1, 16, 16, 0, 0, {}},
      {"large scores", kFloat32, 1, 1, 16, 16, 1, 80, ids_of({20, 60}), {}, 0, 300, false, 10},
      {"negative scale", kFloat16, 1, 1, 16, 16, 1, 80, ids_of({20, 60}), {}, -0.5},
      {"float32 results", kBFloat16, 1, 1, 64, 48, 1, 80, ids_of({20, 60}), {}, 0, 1, false, 1, kFloat32},
      {"three heads",
       kFloat16,
       3,
       1,
       32,
       32,
       2,
       130,
       joined({scattered, ids_of({9, 30, 60, 51})}),
       {},
       0,
       1,
       true},
  };
  // k_blocks whose work is split, all of them and some.
  all.push_back({"splits", kBFloat16, 6, 1, 16, 16, 1, 260, ids_of({70, 100, 90})});
  if (!simt::checks_races()) {
    all.push_back({"splits of float", kFloat32, 12, 2, 16, 16, 2, 70, ids_of({40, 30, 60, 10})});
    all.push_back({"splits of packed sequences",
                   kFloat16,
                   5,
                   1,
                   16,
                   32,
                   1,
                   260,
                   joined({ids_of({0, 30}), ids_of({140, 90})}),
                   {0, 30, 260}});
    all.push_back({"bfloat16 128", kBFloat16, 2, 1, 128, 128, 1, 300, ids_of({100, 150, 50})});
    all.push_back({"float 128", kFloat32, 1, 1, 128, 80, 1, 140, ids_of({30, 110})});
    all.push_back({"float16 64", kFloat16, 4, 2, 64, 64, 2, 130, random_ids(260, 260, 1, 0, random)});
    all.push_back({"tiny steps", kBFloat16, 1, 1, 16, 16, 1, 200, random_ids(200, 3, 3, 0, random)});
    all.push_back({"causal", kBFloat16, 1, 1, 64, 64, 1, 400, ids_of({0, 400})});
    all.push_back({"a long prompt", kFloat16, 1, 1, 64, 64, 1, 400, ids_of({330, 70})});
    for (int64_t width = 16; width <= 128; width += 16) {
      all.push_back(
          {"key width " + std::to_string(width), kBFloat16, 1, 1, width, 32, 1, 70, ids_of({20, 50})});
      all.push_back(
          {"value width " + std::to_string(width), kFloat16, 1, 1, 32, width, 1, 70, ids_of({20, 50})});
    }
  }
  return all;
}

}  // namespace

// With an argument: only the cases whose name contains it, and how long each took.
int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  const auto run = [&](const std::string& name, const auto& test) {
    if (name.find(part) == std::string::npos) return;
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (argc > 1) std::printf("%-28s %.2f s\n", name.c_str(), seconds.count());
  };
  run("plans", test_plans);
  run("wrong contents", test_wrong_contents);
  for (const Case& c : cases())
    run(c.name, [&] {
      std::mt19937 random(4);
      Problem problem(c, random);
      problem.test_forward();
      problem.test_backward();
    });
  for (const Case& c : cases())
    if (c.dtype != DType::kFloat32)
      run(c.name + ", sm_90", [&] {
        std::mt19937 random(4);
        const simt::Device device{.arch = 90, .multiprocessors = 3};  // few: blocks have several work tiles
        Problem(c, random).test_forward(device);
      });
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
