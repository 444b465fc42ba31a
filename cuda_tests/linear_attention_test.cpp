// The CUDA kernels of linear attention on the emulator against the CPU backend in float64, with the same
// parameter structs, forward and backward. Built twice: with the plain emulator for all cases, and with the
// one that checks every access for the small ones.

#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/tile_kernels.h"
#include "simt/simt.h"

using namespace statecore;

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (!right && ++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// SMs: whole sequences fill the small GPU; to fill the large one they have to be split.
constexpr int kSmallGpu = 1, kLargeGpu = 132;

struct Case {
  const char* name;
  DType dtype;
  int64_t batch, tokens, query_heads, key_heads, value_heads, key_width, value_width;
  double decay = 0;                 // mean of -log_decay; 0: no log_decay
  std::vector<int32_t> lengths{};   // of packed sequences
  std::vector<int32_t> step_ids{};  // [tokens], the same in every row; empty: no steps
  bool initial = true, gate = false;
  double magnitude = 1;  // of k and v
  double scale = 0.3;
};

// A tensor in the emulator's global memory, and the same elements in float64.
struct Values {
  Values(const char* name, DType dtype, int64_t count, const std::function<double()>& value)
      : dtype(dtype), memory(simt::alloc_global(std::max<int64_t>(count, 1) * element_bytes(dtype), name)) {
    std::vector<float> x(padded(int(count)));
    for (int64_t i = 0; i < count; ++i) x[i] = float(value());
    if (count > 0) tile_kernels<float>().store(dtype, memory, 0, 1, int(count), x.data(), 0);
    exact = read();
    exact.resize(count);
    if (count > 0) {
      tile_kernels<float>().load(dtype, memory, 0, 1, int(count), x.data(), 0);
      exact.assign(x.begin(), x.begin() + count);
    }
  }
  // A result, not initialised.
  Values(const char* name, DType dtype, int64_t count)
      : dtype(dtype),
        memory(simt::alloc_global(std::max<int64_t>(count, 1) * element_bytes(dtype), name)),
        exact(count) {}
  Values(const Values&) = delete;
  ~Values() { simt::free_global(memory); }

  std::vector<double> read() const {
    std::vector<float> x(padded(int(exact.size())));
    if (!exact.empty()) tile_kernels<float>().load(dtype, memory, 0, 1, int(exact.size()), x.data(), 0);
    return {x.begin(), x.begin() + exact.size()};
  }
  int64_t bytes() const { return int64_t(exact.size()) * element_bytes(dtype); }
  std::string bits() const { return {static_cast<const char*>(memory), size_t(bytes())}; }

  DType dtype;
  void* memory;
  std::vector<double> exact;  // what the CPU backend reads and writes
};

// One call and its gradients: on the CPU backend when constructed, on the emulator by run().
class Call {
 public:
  explicit Call(const Case& c)
      : c_(c),
        rows_(c.batch * c.tokens),
        out_heads_(std::max(c.query_heads, c.value_heads)),
        sequences_(c.lengths.empty() ? c.batch : int64_t(c.lengths.size())),
        kinds_(c.step_ids.empty() ? 1 : 3),
        offsets_(1, 0) {
    for (int32_t length : c.lengths) offsets_.push_back(offsets_.back() + length);
    for (int64_t b = 0; b < c.batch; ++b) ids_.insert(ids_.end(), c.step_ids.begin(), c.step_ids.end());
    const auto normal = [&](double size) { return [this, size] { return size * normal_(random_); }; };
    const int64_t states = kinds_ * sequences_ * c.value_heads * c.key_width * c.value_width;
    // Poison padding and a gap after each token with NaN; kernels must not read them.
    const auto add_tokens = [&](const char* name, int64_t width, int64_t gap, double size) {
      add(name, c.dtype, rows_ * (width + gap), [&, i = int64_t(0)]() mutable {
        const int64_t token = i / (width + gap), column = i++ % (width + gap);
        const bool valid = column < width && (ids_.empty() || ids_[token] >= 0);
        return valid ? size * normal_(random_) : std::numeric_limits<double>::quiet_NaN();
      });
    };
    add_tokens("q", c.query_heads * c.key_width, 16, 1);
    add_tokens("k", c.key_heads * c.key_width, 16, c.magnitude);
    add_tokens("v", c.value_heads * c.value_width, 16, c.magnitude);
    add("log_decay", DType::kFloat32, rows_ * c.value_heads, [this] { return decay(); });
    add("initial", DType::kFloat32, states, normal(c.magnitude * c.magnitude));
    add("gate", c.dtype, rows_ * out_heads_ * c.value_width, normal(1));
    add("segment_out", c.dtype, rows_ * out_heads_ * c.value_width, normal(1));
    add_tokens("grad_out", out_heads_ * c.value_width, 0, 1);
    add("grad_final", DType::kFloat32, states, normal(1));
    result("out", c.dtype, rows_ * out_heads_ * c.value_width);
    result("final", DType::kFloat32, states);
    result("gated", c.dtype, rows_ * out_heads_ * c.value_width);
    result("grad_q", c.dtype, rows_ * c.query_heads * c.key_width);
    result("grad_k", c.dtype, rows_ * c.key_heads * c.key_width);
    result("grad_v", c.dtype, rows_ * c.value_heads * c.value_width);
    result("grad_log_decay", DType::kFloat32, rows_ * c.value_heads);
    result("grad_initial", DType::kFloat32, states);
    set_params(DType::kFloat64, [](Values& x) { return static_cast<void*>(x.exact.data()); });
    linear_attention_cpu(forward_);
    linear_attention_backward_cpu(backward_);
  }

  std::vector<std::string> run() {
    for (Values* x : results_) std::memset(x->memory, 0xff, x->bytes());
    set_params(c_.dtype, [](Values& x) { return x.memory; });
    try {
      simt::forget_blocks();
      for (Values* x : results_)
        if (x->bytes() > 0) simt::watch_blocks(x->memory, x->bytes(), "a result");
      Values scratch("scratch", DType::kFloat32, linear_attention_cuda_scratch(forward_) / 4);
      linear_attention_cuda(forward_, scratch.memory, nullptr);
      Values more("scratch", DType::kFloat32, linear_attention_backward_cuda_scratch(backward_) / 4);
      simt::forget_blocks();
      linear_attention_backward_cuda(backward_, more.memory, nullptr);
    } catch (const simt::Error& error) {
      expect(false, std::string(c_.name) + ": " + error.what());
    }
    std::vector<std::string> bits;
    for (Values* x : results_) bits.push_back(x->bits());
    return bits;
  }

  // The errors of the last run().
  void check(const std::string& how) {
    for (size_t i = 0; i < results_.size(); ++i) {
      const std::string& name = result_names_[i];
      if (name == "gated" && !c_.gate) continue;
      if (name == "grad_log_decay" && c_.decay == 0) continue;
      if (name == "grad_initial" && !c_.initial) continue;
      const std::vector<double> got = results_[i]->read(), &wanted = results_[i]->exact;
      double difference = 0, rounding = 0, size = 0;
      for (size_t j = 0; j < got.size(); ++j) {
        difference += (got[j] - wanted[j]) * (got[j] - wanted[j]);
        size += wanted[j] * wanted[j];
        const double rounded = round_to(results_[i]->dtype, wanted[j]) - wanted[j];
        rounding += rounded * rounded;
      }
      const double error = std::sqrt(difference), norm = std::sqrt(size);
      const bool gradient = name.rfind("grad", 0) == 0;
      // 16-bit results are as accurate as rounded exact ones. States are computed in float32 or better.
      double allowed = (c_.dtype == DType::kFloat32 ? (gradient ? 1e-4 : 1e-5) : 1e-4) * norm;
      if (name == "grad_log_decay" && c_.dtype != DType::kFloat32) allowed = 1e-3 * norm;
      if (results_[i]->dtype != DType::kFloat32)
        allowed = (name == "gated" ? 1.5 : 1.1) * std::sqrt(rounding) + 1e-5 * norm;
      expect(error <= allowed, std::string(c_.name) + ", " + how + ": " + name + " is off by " +
                                   std::to_string(error / norm * 1e6) + "e-6 of " +
                                   std::to_string(allowed / norm * 1e6) + "e-6");
    }
  }

 private:
  double decay() {
    const double x = -c_.decay * 2 * uniform_(random_);
    return uniform_(random_) < 0.02 ? -std::numeric_limits<double>::infinity() : x;
  }
  void add(const char* name, DType dtype, int64_t count, const std::function<double()>& value) {
    values_.push_back(std::make_unique<Values>(name, dtype, count, value));
    names_.push_back(name);
  }
  void result(const char* name, DType dtype, int64_t count) {
    values_.push_back(std::make_unique<Values>(name, dtype, count));
    names_.push_back(name);
    results_.push_back(values_.back().get());
    result_names_.push_back(name);
  }
  static double round_to(DType dtype, double x) {
    float padded_x[64] = {float(x)};
    uint64_t bits[64] = {};
    tile_kernels<float>().store(dtype, bits, 0, 1, 1, padded_x, 0);
    tile_kernels<float>().load(dtype, bits, 0, 1, 1, padded_x, 0);
    return double(padded_x[0]);
  }

  template <class Pointer>
  void set_params(DType dtype, const Pointer& pointer) {
    const auto data = [&](const char* name) {
      return pointer(*values_[std::find(names_.begin(), names_.end(), name) - names_.begin()]);
    };
    const auto view = [&](const char* name, int64_t heads, int64_t width, int64_t gap) {
      const int64_t time = heads * width + gap;
      return HeadsView{data(name), c_.tokens * time, time, width};
    };
    LinearAttentionInputs p{};
    p.dtype = dtype;
    p.batch = c_.batch, p.tokens = c_.tokens, p.sequences = sequences_;
    p.query_heads = c_.query_heads, p.key_heads = c_.key_heads, p.value_heads = c_.value_heads;
    p.key_width = c_.key_width, p.value_width = c_.value_width;
    p.scale = c_.scale;
    p.q = view("q", c_.query_heads, c_.key_width, 16);
    p.k = view("k", c_.key_heads, c_.key_width, 16);
    p.v = view("v", c_.value_heads, c_.value_width, 16);
    if (c_.decay > 0) p.log_decay = view("log_decay", c_.value_heads, 1, 0);
    if (!c_.lengths.empty()) p.cu_seqlens = offsets_.data();
    p.states = kinds_;
    if (c_.initial) p.initial_states = data("initial");
    if (kinds_ == 3) {
      p.step_ids = ids_.data(), p.ids_batch = c_.tokens;
      for (size_t i = 0; i < alpha_.size(); ++i) alpha32_[i] = float(alpha_[i]);
      p.alpha = dtype == DType::kFloat64 ? static_cast<const void*>(alpha_.data()) : alpha32_.data();
      p.alphas = int64_t(alpha_.size());
    }
    static_cast<LinearAttentionInputs&>(forward_) = p;
    static_cast<LinearAttentionInputs&>(backward_) = p;
    forward_.out = data("out"), forward_.final_states = data("final");
    if (c_.gate) {
      forward_.gate = view("gate", out_heads_, c_.value_width, 0);
      forward_.segment_out = data("segment_out"), forward_.gated_out = data("gated");
    }
    backward_.grad_out = view("grad_out", out_heads_, c_.value_width, 0);
    backward_.grad_final_states = data("grad_final");
    backward_.grad_q = data("grad_q"), backward_.grad_k = data("grad_k"), backward_.grad_v = data("grad_v");
    if (c_.decay > 0) backward_.grad_log_decay = data("grad_log_decay");
    if (c_.initial) backward_.grad_initial_states = data("grad_initial");
  }

  const Case& c_;
  int64_t rows_, out_heads_, sequences_, kinds_;
  std::mt19937 random_{3};
  std::normal_distribution<double> normal_;
  std::uniform_real_distribution<double> uniform_;
  std::vector<int32_t> offsets_, ids_;
  std::vector<double> alpha_ = {7, 7, 0.125, 0.5, 0, 0.75};  // entries 0 and 1 are not used
  std::vector<float> alpha32_ = std::vector<float>(6);
  std::vector<std::unique_ptr<Values>> values_;
  std::vector<std::string> names_, result_names_;
  std::vector<Values*> results_;
  LinearAttentionParams forward_{};
  LinearAttentionBackwardParams backward_{};
};

// sm_90 has its own sweep for 16-bit elements.
void test_equals_cpu(const Case& c, int arch) {
  Call call(c);
  for (int sms : {kSmallGpu, kLargeGpu}) {
    simt::device() = {arch, sms};
    const std::string name = std::string(c.name) + " on sm_" + std::to_string(arch);
    std::vector<std::string> first;
    const int schedules = simt::checks_races() || c.tokens > 100 ? 1 : 3;
    for (int i = 0; i < schedules; ++i) {
      using simt::Async, simt::Order;
      simt::schedule() = i == 0   ? simt::Schedule{Order::kRandom, 5, Async::kRandom}
                         : i == 1 ? simt::Schedule{Order::kForward, 1, Async::kEarly}
                                  : simt::Schedule{Order::kReverse, 1, Async::kLate};
      simt::take_counters();
      const std::vector<std::string> bits = call.run();
      const std::vector<std::string> launches = simt::take_counters().launches;
      const bool right =
          std::count(launches.begin(), launches.end(), "linear_sweep_sm90") ==
          (arch == 90 ? std::count_if(launches.begin(), launches.end(),
                                      [](const auto& x) { return x.rfind("linear_sweep", 0) == 0; })
                      : 0);
      expect(right || c.tokens == 0, name + ": ran the sweep of another architecture");
      if (i == 0) call.check(name + " with " + std::to_string(sms) + " SMs"), first = bits;
      expect(bits == first, name + ": results depend on the order of threads");
    }
  }
}

// A prompt and steps of different lengths, with padding in between; ids skip values.
std::vector<int32_t> ids_of(int64_t tokens) {
  std::vector<int32_t> ids(tokens, -1);
  const int lengths[] = {70, 3, 40, 1, 90, 64, 17};
  int32_t id = 0;
  for (int64_t t = 5, i = 0; t + 4 < tokens; ++i, id += i % 3 ? 1 : 2)
    for (int n = 0; n < lengths[i % 7] && t + 4 < tokens; ++n, ++t) ids[t] = t % 31 == 0 ? -1 : id;
  return ids;
}

std::vector<Case> cases() {
  using enum DType;
  std::vector<Case> all;
  for (DType dtype : {kBFloat16, kFloat16, kFloat32}) {
    all.push_back({"gqa", dtype, 1, 70, 4, 2, 2, 64, 48});
    all.push_back({"gva and decay", dtype, 1, 70, 1, 1, 2, 16, 64, 0.2});
    all.push_back({"steps, wide keys", dtype, 1, 90, 2, 1, 1, 80, 32, 0, {}, ids_of(90), true, true});
    all.push_back({"packed", dtype, 1, 100, 1, 1, 1, 32, 16, 0.05, {1, 0, 65, 34}});
  }
  if (simt::checks_races()) {
    all.push_back({"splits", kBFloat16, 1, 280, 1, 1, 1, 64, 16, 0, {}, ids_of(280)});
    return all;
  }
  for (DType dtype : {kBFloat16, kFloat16, kFloat32}) {
    all.push_back({"wide", dtype, 2, 65, 1, 1, 1, 128, 128, 0.1});
    all.push_back({"splits of steps", dtype, 1, 700, 2, 1, 1, 64, 64, 0, {}, ids_of(700), true, true});
    all.push_back({"splits, packed", dtype, 1, 600, 2, 2, 2, 64, 32, 0.01, {257, 3, 340}});
    all.push_back({"strong decay", dtype, 1, 130, 2, 1, 1, 32, 32, 8.0, {}, {}, false});
    all.push_back({"no scale", dtype, 1, 70, 1, 1, 1, 16, 16, 0, {}, {}, true, false, 1, 0});
    all.push_back({"no tokens", dtype, 1, 0, 1, 1, 1, 16, 16});
  }
  // States beyond 65504, the largest float16, and so small that float16 has few bits for them.
  all.push_back({"large numbers", kFloat16, 1, 130, 2, 1, 1, 64, 32, 0.02, {}, {}, true, false, 60, 1e-3});
  all.push_back({"small numbers", kFloat16, 1, 130, 2, 1, 1, 64, 32, 0.02, {}, {}, true, false, 2e-3, 1e3});
  return all;
}

}  // namespace

int main() {
  for (const Case& c : cases())
    for (int arch : {80, 90})
      if (arch == 80 || c.dtype != DType::kFloat32) test_equals_cpu(c, arch);
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
