// Matrix products of a warpgroup. Its threads issue them one by one, each for itself; a product is computed
// when all 128 have issued it, or as late as when they wait for it, and reads its operands in shared memory
// then. Until the wait the accumulators are kept here, and the threads' registers are NaN.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kWait[] = "wgmma_wait";
constexpr unsigned kThreads = 128;
constexpr int kRows = 64, kDepth = 16;

Warpgroup& own_warpgroup(const Where& where) {
  Block& block = *running_block();
  block.warpgroups.resize(block.threads.size() / kThreads);
  const unsigned group = running_thread()->id.index / kThreads;
  if (group >= block.warpgroups.size()) fail(where, "wgmma: the thread is in no whole warpgroup");
  return block.warpgroups[group];
}

// f(register, its accumulator), for a thread of the group.
template <class F>
void for_each_register(Accumulators& sums, unsigned thread, const F& f) {
  const unsigned lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  for (int i = 0; i < sums.n / 2; ++i) {
    const unsigned column = unsigned(i) / 4 * 8 + lane % 4 * 2 + i % 2;
    f(sums.registers[thread][i], sums.sums[(row + i / 2 % 2 * 8) * unsigned(sums.n) + column]);
  }
}

// ---- operands in shared memory
struct Descriptor {
  uint32_t begin, leading, stride, span;  // span: of the swizzle, in bytes
  bool mn_major;

  Descriptor(uint64_t bits, bool mn_major) : mn_major(mn_major) {
    constexpr uint32_t kSpans[] = {16, 128, 64, 32};
    begin = uint32_t(bits & 0x3fff) << 4;
    leading = uint32_t(bits >> 16 & 0x3fff) << 4;
    stride = uint32_t(bits >> 32 & 0x3fff) << 4;
    span = kSpans[bits >> 62];
  }

  // Eight elements lie together: depths of one row of a, or rows of a at one depth. (b: columns for rows.)
  uint32_t address(uint32_t mn, uint32_t k) const {
    uint32_t at = begin;
    if (!mn_major)
      at += mn % 8 * span + mn / 8 * stride + k / 8 * (span > 16 ? 16 : leading);
    else if (span > 16)
      at += k % 8 * span + k / 8 * stride + mn / 8 % (span / 16) * 16 + mn / 8 / (span / 16) * leading;
    else
      at += k % 8 * span + k / 8 * leading + mn / 8 * stride;
    return at ^ (at >> 7 & (span / 16 - 1)) << 4;
  }
};

// f(address of eight elements, the first of them: row of a or column of b, depth)
template <class F>
void for_each_piece(const Descriptor& descriptor, int rows, const F& f) {
  const int row_step = descriptor.mn_major ? 8 : 1, depth_step = descriptor.mn_major ? 1 : 8;
  for (int row = 0; row < rows; row += row_step)
    for (int k = 0; k < kDepth; k += depth_step) f(descriptor.address(uint32_t(row), uint32_t(k)), row, k);
}

// to[row * row_stride + k * depth_stride]
void load_operand(const Product& product, const Descriptor& descriptor, int rows, float* to, int row_stride,
                  int depth_stride) {
  for_each_piece(descriptor, rows, [&](uint32_t address, int row, int k) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(at_address(address, 16, 16, product.where));
    const int distance = descriptor.mn_major ? row_stride : depth_stride;
    float* first = to + row * row_stride + k * depth_stride;
    for (int i = 0; i < 4; ++i) widen(product.half, pairs[i], first + 2 * i * distance, distance);
  });
}

void compute(const Product& product) {
  ++counters().wgmma;
  const int n = product.sums->n;
  float a[kRows][kDepth], b[kDepth][256];
  load_operand(product, {product.b, product.b_mn_major}, n, b[0], 1, 256);
  if (!product.a_in_registers)
    load_operand(product, {product.a, product.a_mn_major}, kRows, a[0], kDepth, 1);
  else
    for (unsigned thread = 0; thread < kThreads; ++thread)
      for (unsigned i = 0; i < 4; ++i)
        widen(product.half, product.a_registers[thread][i],
              &a[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8][thread % 4 * 2 + i / 2 * 8], 1);
  for (int row = 0; row < kRows; ++row) {
    float sum[256] = {};
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < n; ++column) sum[column] += a[row][k] * b[k][column];
    float* d = product.sums->sums.data() + row * n;
    for (int column = 0; column < n; ++column) d[column] = (product.accumulate ? d[column] : 0) + sum[column];
  }
  --product.sums->open_products;
}

// Products before number `end`.
void compute_until(Warpgroup& group, unsigned end) {
  for (; group.first < end; ++group.first) {
    compute(group.products.front());
    group.products.pop_front();
  }
}

// One lane speaks for each warp: what is ordered before a product is what all four have seen.
void check_operands(Warpgroup& group, const Product& product) {
  if (!checks_races()) return;
  const Block& block = *running_block();
  const unsigned first = running_thread()->id.index / kThreads * kThreads;
  Clock clock = block.threads[first].clock;
  for (unsigned warp = 1; warp < 4; ++warp) {
    const Clock& other = block.threads[first + 32 * warp].clock;
    clock.resize(std::min(clock.size(), other.size()));
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::min(clock[i], other[i]);
  }
  const uint32_t time = running_thread()->product_groups + 1;
  const auto check = [&](uint32_t address, int, int) {
    at_address(address, 16, 16, product.where);
    start_reading(group.agent, time, clock, address, 16, product.where);
    check_fenced(clock, address, 16, product.where);
  };
  for_each_piece({product.b, product.b_mn_major}, product.sums->n, check);
  if (!product.a_in_registers) for_each_piece({product.a, product.a_mn_major}, kRows, check);
}

std::shared_ptr<Accumulators> find_sums(const Warpgroup& group, const float* d, int count,
                                        const Where& where) {
  const unsigned self = running_thread()->id.index % kThreads;
  for (const auto& sums : group.in_flight) {
    const float* begin = sums->registers[self];
    if (!begin || d >= begin + sums->n / 2 || d + count <= begin) continue;
    if (d != begin || count != sums->n / 2) fail(where, "wgmma: accumulators overlap others in flight");
    return sums;
  }
  return nullptr;
}

}  // namespace

void wgmma(Half half, int n, float* d, const uint32_t* a_registers, uint64_t a, bool a_mn_major, uint64_t b,
           bool b_mn_major, bool accumulate, const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  const unsigned thread = self.id.index % kThreads, number = self.products++;
  std::shared_ptr<Accumulators> sums = find_sums(group, d, n / 2, where);
  if (!self.products_fenced && (a_registers || !sums))
    fail(where, "wgmma: no wgmma_fence since the threads could touch its registers");

  if (number == group.first + group.products.size()) {  // the first thread to come
    group.products.push_back({.half = half,
                              .a_mn_major = a_mn_major,
                              .b_mn_major = b_mn_major,
                              .a_in_registers = a_registers != nullptr,
                              .accumulate = accumulate,
                              .a = a,
                              .b = b,
                              .where = where,
                              .at_once = takes_effect_at_once(),
                              .a_registers = {},
                              .sums = sums});
    if (!sums) {
      group.products.back().sums = std::make_shared<Accumulators>(Accumulators{n, 0, {}, {}});
      group.products.back().sums->sums.resize(size_t(kRows * n));
      group.in_flight.push_back(group.products.back().sums);
    }
    ++group.products.back().sums->open_products;
  }
  Product& product = group.products[number - group.first];
  if (product.where.line() != where.line() || product.a != a || product.b != b ||
      product.accumulate != accumulate || (sums && sums != product.sums))
    fail(where, "wgmma: threads of a warpgroup issue different products, others that of " +
                    line_text(product.where));
  if (a_registers) std::copy(a_registers, a_registers + 4, product.a_registers[thread]);
  if (!sums) {
    product.sums->registers[thread] = d;
    for_each_register(*product.sums, thread, [](float& own, float& sum) { sum = own; });
    std::memset(d, 0xff, size_t(n) / 2 * sizeof(float));
  }
  if (++product.issued < kThreads) return;
  check_operands(group, product);
  if (product.at_once) compute_until(group, number + 1);
}

void wgmma_fence() { running_thread()->products_fenced = true; }

void wgmma_commit(const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  if (self.product_groups == group.group_ends.size()) group.group_ends.push_back(self.products);
  if (group.group_ends[self.product_groups++] != self.products)
    fail(where, "wgmma_commit: threads of a warpgroup have issued different numbers of products");
}

// The group's threads wait for each other here: a product needs them all.
void wgmma_wait(int pending, const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  if (!group.waiting.empty() && (group.waiting[0]->where.line() != where.line() || group.pending != pending))
    fail(where, "divergent warpgroup: others wait at " + line_text(group.waiting[0]->where));
  group.pending = pending;
  group.waiting.push_back(&self);
  self.products_fenced = false;
  if (group.waiting.size() == kThreads) {
    const size_t complete = group.group_ends.size() - std::min(group.group_ends.size(), size_t(pending));
    if (complete > 0) compute_until(group, group.group_ends[complete - 1]);
    std::erase_if(group.in_flight, [](const std::shared_ptr<Accumulators>& sums) {
      if (sums->open_products > 0) return false;
      for (unsigned thread = 0; thread < kThreads; ++thread)
        for_each_register(*sums, thread, [](float& own, float& sum) { own = sum; });
      return true;
    });
    for (ThreadState* thread : group.waiting) {
      if (thread->product_groups != group.group_ends.size() || thread->products != self.products)
        fail(where, "wgmma_wait: threads of a warpgroup have issued different numbers of products");
      learn(thread->clock, group.agent, uint32_t(complete));
    }
    make_ready(group.waiting);
    ++running.progress;
    group.waiting.clear();
  }
  wait_here(kWait, where);
}

void wgmma_fence_operand(const float* d, int count, const Where& where) {
  const unsigned self = running_thread()->id.index % kThreads;
  for (const auto& sums : own_warpgroup(where).in_flight)
    if (const float* begin = sums->registers[self]; begin && d < begin + sums->n / 2 && d + count > begin)
      fail(where, "wgmma_fence_operand: a wgmma that has not been waited for writes these registers");
}

void finish_products(ThreadState& thread) {
  const auto& groups = running_block()->warpgroups;
  const size_t group = thread.id.index / kThreads;
  if (group >= groups.size()) return;
  for (const auto& sums : groups[group].in_flight)
    if (sums->registers[thread.id.index % kThreads])
      fail("a thread returned before its wgmma had been waited for");
}

}  // namespace simt
