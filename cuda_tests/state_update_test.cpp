// The CUDA kernel of state_update under the emulator against the CPU backend, on the same parameter structs.
// Built twice: with the plain emulator (all cases), and with the one that checks accesses (the small ones).

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
  int64_t rows, query_heads, key_heads, value_heads, key_width, value_width;
  DType dtype = DType::kFloat32;
  int64_t state_kinds = 3;
  bool decay = false;
  std::vector<int32_t> ends_step{}, row_slots{};  // empty: not given
  int64_t slots = 0;                              // 0: as many as rows
};

// Global memory of the emulator that lives as long as this.
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

// The tensors of a case. Strides of q, k and v have gaps, so that a kernel that takes them for dense is
// wrong.
class Tensors {
 public:
  Tensors(const Case& c, std::mt19937& random)
      : size_{c.state_kinds * slots(c) * c.value_heads * c.key_width * c.value_width},
        q_("q", c.rows * (c.query_heads * c.key_width + 3) * element_bytes(c.dtype)),
        k_("k", c.rows * c.key_heads * (c.key_width + 1) * element_bytes(c.dtype)),
        v_("v", c.rows * c.value_heads * (c.value_width + 1) * element_bytes(c.dtype)),
        decay_("log_decay", c.rows * c.value_heads * 4),
        ends_("ends_step", c.rows * 4),
        row_slots_("slots", c.rows * 4),
        alpha_("alpha", sizeof kAlpha),
        states_("states", size_ * 4),
        out_("out", out_elements(c) * element_bytes(c.dtype)) {
    fill(q_, c.dtype, c.rows * (c.query_heads * c.key_width + 3), random);
    fill(k_, c.dtype, c.rows * c.key_heads * (c.key_width + 1), random);
    fill(v_, c.dtype, c.rows * c.value_heads * (c.value_width + 1), random);
    fill(states_, DType::kFloat32, size_, random);
    std::uniform_real_distribution<float> decays(-1, 0);
    for (int64_t i = 0; i < c.rows * c.value_heads; ++i)
      reinterpret_cast<float*>(decay_.data())[i] = decays(random);
    std::memcpy(alpha_.data(), kAlpha, sizeof kAlpha);
    std::copy(c.ends_step.begin(), c.ends_step.end(), reinterpret_cast<int32_t*>(ends_.data()));
    std::copy(c.row_slots.begin(), c.row_slots.end(), reinterpret_cast<int32_t*>(row_slots_.data()));
    before_ = states_.copy();

    params.dtype = c.dtype;
    params.rows = c.rows, params.slots = slots(c);
    params.query_heads = c.query_heads, params.key_heads = c.key_heads, params.value_heads = c.value_heads;
    params.key_width = c.key_width, params.value_width = c.value_width;
    params.scale = 0.7;
    params.states = states_.data(), params.state_kinds = c.state_kinds;
    params.q = q_.data(), params.q_row = c.query_heads * c.key_width + 3, params.q_head = c.key_width;
    params.k = k_.data(), params.k_row = c.key_heads * (c.key_width + 1), params.k_head = c.key_width + 1;
    params.v = v_.data(), params.v_row = c.value_heads * (c.value_width + 1);
    params.v_head = c.value_width + 1;
    if (c.decay) params.log_decay = decay_.data();
    if (!c.ends_step.empty()) params.ends_step = reinterpret_cast<int32_t*>(ends_.data());
    params.alpha = alpha_.data(), params.alphas = std::size(kAlpha);
    if (!c.row_slots.empty()) params.row_slots = reinterpret_cast<int32_t*>(row_slots_.data());
    params.out = out_.data();
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
    simt::watch_blocks(states_.data(), size_ * 4, "states");
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
  static constexpr float kAlpha[] = {7, 7, 0.1f, 0.5f, 0, 1};  // entries 0 and 1 mean nothing

  static int64_t slots(const Case& c) { return c.slots ? c.slots : c.rows; }
  static int64_t out_elements(const Case& c) {
    return c.rows * std::max(c.query_heads, c.value_heads) * c.value_width;
  }
  static void fill(Buffer& to, DType dtype, int64_t elements, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(elements);
    for (float& value : x) value = normal(random);
    tile_kernels<float>().store(dtype, to.data(), 0, 1, int(elements), x.data(), 0);
  }

  int64_t size_;  // elements of states
  Buffer q_, k_, v_, decay_, ends_, row_slots_, alpha_, states_, out_;
  std::string before_;
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
  return difference == 0 ? 0 : std::sqrt(difference / norm);  // NaN stays NaN
}

void test_equals_cpu(const Case& c) {
  std::mt19937 random(5);
  Tensors tensors(c, random);
  const auto wanted = tensors.on_cpu();
  Tensors::Result first;
  for (auto order : {simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom}) {
    simt::schedule() = {order, 11};
    const auto got = tensors.on_emulator(c.name);
    // Sums in another order differ in float32; a 16-bit result is then, rarely, rounded the other way.
    const double states =
        relative_error(floats(DType::kFloat32, got.states), floats(DType::kFloat32, wanted.states));
    const double out = relative_error(floats(c.dtype, got.out), floats(c.dtype, wanted.out));
    expect(states < 1e-6, std::string(c.name) + ": states differ by " + std::to_string(states));
    expect(out < (c.dtype == DType::kFloat32 ? 1e-6 : 3e-4),
           std::string(c.name) + ": out differs by " + std::to_string(out));
    if (order == simt::Order::kForward) first = got;
    expect(got == first, std::string(c.name) + ": other bits in another order of threads");
  }
}

// A row computed in a large batch, in wide tiles, and alone, in narrow ones: the same bits.
void test_rows_do_not_depend_on_the_batch() {
  const Case all{.name = "batch",
                 .rows = 33,
                 .query_heads = 8,
                 .key_heads = 4,
                 .value_heads = 4,
                 .key_width = 32,
                 .value_width = 64,
                 .decay = true};
  std::mt19937 random(6);
  Tensors tensors(all, random);
  simt::schedule() = {};
  const auto together = tensors.on_emulator("a batch");
  const auto one = tensors.params;
  for (int64_t row : {0, 17, 32}) {
    tensors.params = one;
    tensors.params.rows = 1;
    tensors.params.q = static_cast<const char*>(one.q) + row * one.q_row * 4;
    tensors.params.k = static_cast<const char*>(one.k) + row * one.k_row * 4;
    tensors.params.v = static_cast<const char*>(one.v) + row * one.v_row * 4;
    tensors.params.log_decay = static_cast<const float*>(one.log_decay) + row * one.value_heads;
    const int32_t slot = int32_t(row);
    tensors.params.row_slots = &slot;
    const auto alone = tensors.on_emulator("one row");
    const size_t out_bytes = one.query_heads * one.value_width * 4;
    const size_t state_bytes = one.value_heads * one.key_width * one.value_width * 4;
    expect(alone.out.substr(0, out_bytes) == together.out.substr(row * out_bytes, out_bytes) &&
               alone.states.substr(row * state_bytes, state_bytes) ==
                   together.states.substr(row * state_bytes, state_bytes),
           "row " + std::to_string(row) + " has other bits alone");
  }
}

// What cannot be refused without reading it on the host: nothing outside the pool is touched.
void test_slots_outside_the_pool_are_skipped() {
  Case c{.name = "outside",
         .rows = 3,
         .query_heads = 2,
         .key_heads = 2,
         .value_heads = 2,
         .key_width = 16,
         .value_width = 16,
         .ends_step = {-5, 2147483647, 0},
         .row_slots = {1 << 30, 0, -7},
         .slots = 2};
  std::mt19937 random(7);
  Tensors tensors(c, random);
  const auto got = tensors.on_emulator(c.name);
  c.row_slots = {-1, 0, -1}, c.ends_step = {-1, 2147483647, -1};
  std::mt19937 again(7);
  Tensors skipped(c, again);
  expect(got == skipped.on_emulator(c.name), "slots outside the pool are skipped like -1");
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
