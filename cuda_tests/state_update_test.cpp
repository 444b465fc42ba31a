// The CUDA kernel of state_update on the emulator against the CPU backend, with the same parameter structs.
// Built twice: with the plain emulator (all cases) and with race detection (small cases).

#include "state_update/state_update.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
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

struct Case {
  const char* name;
  int64_t batch, query_heads, key_heads, value_heads, key_width, value_width;
  DType dtype = DType::kFloat32;
  int64_t state_kinds = 3;
  bool decay = false;
  std::vector<int32_t> ends_step{}, slots{};  // empty: not given
  int64_t pool = 0;                           // 0: as large as the batch

  int64_t slot_count() const { return pool ? pool : batch; }
  int64_t state_elements() const {
    return state_kinds * slot_count() * value_heads * key_width * value_width;
  }
  int64_t out_elements() const { return batch * std::max(query_heads, value_heads) * value_width; }
  // Strides of q, k and v have gaps, so that a kernel that takes them for dense fails.
  int64_t q_stride() const { return query_heads * key_width + 3; }
  int64_t k_stride() const { return key_heads * (key_width + 1); }
  int64_t v_stride() const { return value_heads * (value_width + 1); }
};

// A buffer in the emulator's global memory.
class Buffer {
 public:
  Buffer(const char* name, int64_t bytes) : data_(simt::alloc_global(bytes, name)), bytes_(bytes) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { simt::free_global(data_); }
  char* data() const { return static_cast<char*>(data_); }
  std::string copy() const { return {data(), size_t(bytes_)}; }
  void assign(const std::string& bytes) { std::copy(bytes.begin(), bytes.end(), data()); }

 private:
  void* data_;
  int64_t bytes_;
};

// The tensors of a case.
class Tensors {
 public:
  Tensors(const Case& c, std::mt19937& random)
      : q_("q", c.batch * c.q_stride() * element_bytes(c.dtype)),
        k_("k", c.batch * c.k_stride() * element_bytes(c.dtype)),
        v_("v", c.batch * c.v_stride() * element_bytes(c.dtype)),
        decay_("log_decay", c.batch * c.value_heads * 4),
        ends_("ends_step", c.batch * 4),
        slots_("slots", c.batch * 4),
        alpha_("alpha", sizeof kAlpha),
        states_("states", c.state_elements() * 4),
        out_("out", c.out_elements() * element_bytes(c.dtype)) {
    fill(q_, c.dtype, c.batch * c.q_stride(), random);
    fill(k_, c.dtype, c.batch * c.k_stride(), random);
    fill(v_, c.dtype, c.batch * c.v_stride(), random);
    fill(states_, DType::kFloat32, c.state_elements(), random);
    std::uniform_real_distribution<float> decays(-1, 0);
    for (int64_t i = 0; i < c.batch * c.value_heads; ++i)
      reinterpret_cast<float*>(decay_.data())[i] = decays(random);
    std::memcpy(alpha_.data(), kAlpha, sizeof kAlpha);
    std::copy(c.ends_step.begin(), c.ends_step.end(), reinterpret_cast<int32_t*>(ends_.data()));
    std::copy(c.slots.begin(), c.slots.end(), reinterpret_cast<int32_t*>(slots_.data()));
    before_ = states_.copy();
    set_params(c);
  }

  struct Result {
    std::string states, out;
    bool operator==(const Result&) const = default;
  };
  Result on_cpu() {
    states_.assign(before_);
    state_update_cpu(params);
    return {states_.copy(), out_.copy()};
  }
  Result on_emulator(const char* name) {
    states_.assign(before_);
    std::memset(out_.data(), 0xff, out_.copy().size());
    simt::forget_blocks();
    simt::watch_blocks(states_.data(), states_.copy().size(), "states");
    simt::watch_blocks(out_.data(), out_.copy().size(), "out");
    try {
      state_update_cuda(params, nullptr);
    } catch (const simt::Error& error) {
      expect(false, std::string(name) + ": " + error.what());
    }
    return {states_.copy(), out_.copy()};
  }

  StateUpdateParams params{};

 private:
  static constexpr float kAlpha[] = {7, 7, 0.1f, 0.5f, 0, 1};  // entries 0 and 1 are unused

  void set_params(const Case& c) {
    params.dtype = c.dtype;
    params.batch = c.batch, params.pool = c.slot_count();
    params.query_heads = c.query_heads, params.key_heads = c.key_heads, params.value_heads = c.value_heads;
    params.key_width = c.key_width, params.value_width = c.value_width;
    params.scale = 0.7;
    params.states = states_.data(), params.state_kinds = c.state_kinds;
    params.q = {q_.data(), c.q_stride(), 0, c.key_width};
    params.k = {k_.data(), c.k_stride(), 0, c.key_width + 1};
    params.v = {v_.data(), c.v_stride(), 0, c.value_width + 1};
    if (c.decay) params.log_decay = decay_.data();
    if (!c.ends_step.empty()) params.ends_step = reinterpret_cast<int32_t*>(ends_.data());
    params.alpha = alpha_.data(), params.alphas = std::size(kAlpha);
    if (!c.slots.empty()) params.slots = reinterpret_cast<int32_t*>(slots_.data());
    params.out = out_.data();
  }
  static void fill(Buffer& to, DType dtype, int64_t elements, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(elements);
    for (float& value : x) value = normal(random);
    tile_kernels<float>().store(dtype, to.data(), 0, 1, int(elements), x.data(), 0);
  }

  Buffer q_, k_, v_, decay_, ends_, slots_, alpha_, states_, out_;
  std::string before_;  // the bytes of states
};

std::vector<float> floats(DType dtype, const std::string& bytes) {
  const int64_t n = int64_t(bytes.size()) / element_bytes(dtype);
  std::vector<float> x(padded(int(n)));
  tile_kernels<float>().load(dtype, bytes.data(), 0, 1, int(n), x.data(), 0);
  x.resize(n);
  return x;
}

double relative_error(const std::vector<float>& got, const std::vector<float>& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = double(got[i]) - double(wanted[i]);
    difference += d * d, norm += double(wanted[i]) * double(wanted[i]);
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);  // propagates NaN
}

void test_equals_cpu(const Case& c) {
  std::mt19937 random(5);
  Tensors tensors(c, random);
  const auto wanted = tensors.on_cpu();
  Tensors::Result first;
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule() = {order, 11};
    const auto got = tensors.on_emulator(c.name);
    // float32 sums in another order differ, which rarely rounds a 16-bit result differently.
    const double states =
        relative_error(floats(DType::kFloat32, got.states), floats(DType::kFloat32, wanted.states));
    const double out = relative_error(floats(c.dtype, got.out), floats(c.dtype, wanted.out));
    expect(states < 1e-6, std::string(c.name) + ": states differ by " + std::to_string(states));
    expect(out < (c.dtype == DType::kFloat32 ? 1e-6 : 3e-4),
           std::string(c.name) + ": out differs by " + std::to_string(out));
    if (order == simt::Order::kForward) first = got;
    expect(got == first, std::string(c.name) + ": different bits in another order of threads");
  }
}

// A row must have the same bits computed in a large batch, with wide tiles, and alone, with narrow ones.
void test_rows_do_not_depend_on_the_batch() {
  const Case batch{.name = "batch",
                   .batch = 33,
                   .query_heads = 8,
                   .key_heads = 4,
                   .value_heads = 4,
                   .key_width = 32,
                   .value_width = 64,
                   .decay = true};
  std::mt19937 random(6);
  Tensors tensors(batch, random);
  simt::schedule() = {};
  const auto together = tensors.on_emulator("a batch");
  const auto all = tensors.params;
  for (int64_t row : {0, 17, 32}) {
    tensors.params = all;
    tensors.params.batch = 1;
    for (HeadsView StateUpdateParams::* view :
         {&StateUpdateParams::q, &StateUpdateParams::k, &StateUpdateParams::v})
      (tensors.params.*view).data = static_cast<const float*>((all.*view).data) + row * (all.*view).batch;
    tensors.params.log_decay = static_cast<const float*>(all.log_decay) + row * all.value_heads;
    const int32_t slot = int32_t(row);
    tensors.params.slots = &slot;
    const auto alone = tensors.on_emulator("one row");
    const size_t out_bytes = all.query_heads * all.value_width * 4;
    const size_t state_bytes = all.value_heads * all.key_width * all.value_width * 4;
    expect(alone.out.substr(0, out_bytes) == together.out.substr(row * out_bytes, out_bytes) &&
               alone.states.substr(row * state_bytes, state_bytes) ==
                   together.states.substr(row * state_bytes, state_bytes),
           "row " + std::to_string(row) + ": different bits when computed alone");
  }
}

// Slots outside the pool cannot be refused without reading them on the host: they must be skipped.
void test_slots_outside_the_pool_are_skipped() {
  Case c{.name = "outside",
         .batch = 3,
         .query_heads = 2,
         .key_heads = 2,
         .value_heads = 2,
         .key_width = 16,
         .value_width = 16,
         .ends_step = {-5, 2147483647, 0},
         .slots = {1 << 30, 0, -7},
         .pool = 2};
  std::mt19937 random(7);
  Tensors tensors(c, random);
  const auto got = tensors.on_emulator(c.name);
  c.slots = {-1, 0, -1}, c.ends_step = {-1, 2147483647, -1};
  std::mt19937 again(7);
  Tensors skipped(c, again);
  expect(got == skipped.on_emulator(c.name), "slots outside the pool must be skipped like -1");
}

std::vector<Case> cases() {
  using enum DType;
  std::vector<Case> all{
      {"gqa", 3, 6, 2, 2, 64, 64},
      {"more queries than one pass", 2, 18, 2, 2, 16, 32},
      {"gva", 3, 2, 2, 6, 32, 16, kFloat32, 1, true},
      {"one head", 1, 1, 1, 1, 16, 16, kFloat32, 1},
      {"odd widths", 5, 3, 3, 3, 112, 48, kFloat32, 3, true, {-1, 0, 1, 2, 3}},
      {"slots and steps", 5, 4, 2, 2, 48, 80, kFloat32, 3, true, {2, -1, 5, 3, 9}, {6, -1, 0, 3, -1}, 7},
      {"steps without correction", 2, 2, 2, 2, 16, 16, kFloat32, 1, false, {0, 4}},
      {"bfloat16", 2, 6, 1, 1, 128, 64, kBFloat16, 3, true, {5, 2}},
      {"float16", 2, 2, 2, 4, 64, 128, kFloat16, 3, false, {3, 0}, {1, 0}, 3},
  };
  if (!simt::checks_races()) {
    all.push_back({"qwen", 2, 12, 2, 2, 128, 128, kBFloat16, 3, false, {-1, 2}});
    all.push_back({"wide tiles", 36, 4, 4, 4, 16, 64, kBFloat16, 3, true});
    all.push_back({"wide tiles, many queries", 67, 20, 2, 2, 32, 64, kFloat16, 1});
    for (int64_t width = 16; width <= 128; width += 16) {
      all.push_back({"every key width", 1, 2, 1, 1, width, 32, kFloat32, 3, true, {2}});
      all.push_back({"every value width", 1, 2, 1, 1, 32, width, kFloat32, 3, true, {3}});
    }
  } else {
    all.push_back({"wide tiles", 132, 1, 1, 1, 16, 64, kBFloat16, 3, true, std::vector<int32_t>(132, 2)});
  }
  return all;
}

}  // namespace

int main() {
  for (const Case& c : cases()) test_equals_cpu(c);
  test_rows_do_not_depend_on_the_batch();
  test_slots_outside_the_pool_are_skipped();
  std::printf("%s: %d failures\n", simt::checks_races() ? "checked" : "plain", failures);
  return failures != 0;
}
