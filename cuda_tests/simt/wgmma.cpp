// wgmma. The threads of a warpgroup issue a wgmma individually; it is executed when all 128 have issued it,
// at the latest when they wait for it, and reads its operands from shared memory at that time. Until the
// wait, the accumulators are kept here and the threads' registers are poisoned with NaN.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kWait[] = "wgmma_wait";
constexpr unsigned kThreads = 128;
constexpr int kM = 64, kK = 16;

unsigned index_in_warpgroup() { return running_thread()->id.index % kThreads; }

Warpgroup& own_warpgroup(const Where& where) {
  Block& block = *running_block();
  block.warpgroups.resize(block.threads.size() / kThreads);
  const unsigned group = running_thread()->id.index / kThreads;
  if (group >= block.warpgroups.size()) fail(where, "wgmma: the thread is not part of a whole warpgroup");
  return block.warpgroups[group];
}

// f(register, the accumulator that it holds) for a thread of the warpgroup.
template <class F>
void for_each_register(WgmmaAccumulators& accumulators, unsigned thread, const F& f) {
  const unsigned lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  for (int i = 0; i < accumulators.n / 2; ++i) {
    const unsigned column = unsigned(i) / 4 * 8 + lane % 4 * 2 + i % 2;
    f(accumulators.registers[thread][i],
      accumulators.values[(row + i / 2 % 2 * 8) * unsigned(accumulators.n) + column]);
  }
}

// ---- operands in shared memory

// A matrix descriptor. Offsets are in bytes.
struct Descriptor {
  uint32_t start, leading_offset, stride_offset;
  uint32_t swizzle;  // width of the swizzle in bytes; 16: none
  bool mn_major;

  Descriptor(uint64_t bits, bool mn_major) : mn_major(mn_major) {
    constexpr uint32_t kSwizzles[] = {16, 128, 64, 32};
    start = uint32_t(bits & 0x3fff) << 4;
    leading_offset = uint32_t(bits >> 16 & 0x3fff) << 4;
    stride_offset = uint32_t(bits >> 32 & 0x3fff) << 4;
    swizzle = kSwizzles[bits >> 62];
  }

  // The address of the 16-byte vector that starts at element (mn, k), where mn is a row of a or a column of
  // b. It holds eight elements along k (K-major) or along mn (MN-major).
  uint32_t address(uint32_t mn, uint32_t k) const {
    uint32_t at = start;
    if (!mn_major)
      at += mn % 8 * swizzle + mn / 8 * stride_offset + k / 8 * (swizzle > 16 ? 16 : leading_offset);
    else if (swizzle > 16)
      at += k % 8 * swizzle + k / 8 * stride_offset + mn / 8 % (swizzle / 16) * 16 +
            mn / 8 / (swizzle / 16) * leading_offset;
    else
      at += k % 8 * swizzle + k / 8 * leading_offset + mn / 8 * stride_offset;
    return at ^ (at >> 7 & (swizzle / 16 - 1)) << 4;
  }
};

// f(address of a 16-byte vector, mn and k of its first element) for an operand of `size` rows or columns.
template <class F>
void for_each_vector(const Descriptor& descriptor, int size, const F& f) {
  const int mn_increment = descriptor.mn_major ? 8 : 1, k_increment = descriptor.mn_major ? 1 : 8;
  for (int mn = 0; mn < size; mn += mn_increment)
    for (int k = 0; k < kK; k += k_increment) f(descriptor.address(uint32_t(mn), uint32_t(k)), mn, k);
}

// to[mn * mn_stride + k * k_stride]
void load_operand(HalfType type, const Descriptor& descriptor, int size, const Where& where, float* to,
                  int mn_stride, int k_stride) {
  for_each_vector(descriptor, size, [&](uint32_t address, int mn, int k) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(shared_pointer(address, 16, 16, where));
    const int distance = descriptor.mn_major ? mn_stride : k_stride;
    float* first = to + mn * mn_stride + k * k_stride;
    for (int i = 0; i < 4; ++i) unpack_pair(type, pairs[i], first + 2 * i * distance, distance);
  });
}

void execute(const Wgmma& wgmma) {
  ++counters().wgmma;
  const WgmmaOperands& operands = wgmma.operands;
  const int n = wgmma.accumulators->n;
  float a[kM][kK], b[kK][256];
  load_operand(operands.type, {operands.b, operands.b_mn_major}, n, wgmma.where, b[0], 1, 256);
  if (!operands.a_registers)
    load_operand(operands.type, {operands.a, operands.a_mn_major}, kM, wgmma.where, a[0], kK, 1);
  else
    for (unsigned thread = 0; thread < kThreads; ++thread)
      for (unsigned i = 0; i < 4; ++i)
        unpack_pair(operands.type, wgmma.a_registers[thread][i],
                    &a[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8][thread % 4 * 2 + i / 2 * 8], 1);
  for (int row = 0; row < kM; ++row) {
    float sum[256] = {};
    for (int k = 0; k < kK; ++k)
      for (int column = 0; column < n; ++column) sum[column] += a[row][k] * b[k][column];
    float* d = wgmma.accumulators->values.data() + row * n;
    for (int column = 0; column < n; ++column) d[column] = (wgmma.accumulate ? d[column] : 0) + sum[column];
  }
  --wgmma.accumulators->pending_wgmmas;
}

// Executes all wgmmas before number `end`.
void execute_until(Warpgroup& group, unsigned end) {
  for (; group.first_pending < end; ++group.first_pending) {
    execute(group.pending.front());
    group.pending.pop_front();
  }
}

// Race detection for the operands in shared memory. Lane 0 stands for each warp, and a wgmma happens after
// what all four warps have acquired.
void check_operands(Warpgroup& group, const Wgmma& wgmma) {
  if (!checks_races()) return;
  const Block& block = *running_block();
  const unsigned first = running_thread()->id.index / kThreads * kThreads;
  Clock clock = block.threads[first].clock;
  for (unsigned warp = 1; warp < 4; ++warp) {
    const Clock& other = block.threads[first + 32 * warp].clock;
    clock.resize(std::min(clock.size(), other.size()));
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::min(clock[i], other[i]);
  }
  const uint32_t time = running_thread()->wgmma_groups_committed + 1;
  const auto check = [&](uint32_t address, int, int) {
    shared_pointer(address, 16, 16, wgmma.where);
    begin_async_read(group.agent, time, clock, address, 16, wgmma.where);
    check_proxy_fence(clock, address, 16, wgmma.where);
  };
  const WgmmaOperands& operands = wgmma.operands;
  for_each_vector({operands.b, operands.b_mn_major}, wgmma.accumulators->n, check);
  if (!operands.a_registers) for_each_vector({operands.a, operands.a_mn_major}, kM, check);
}

// ---- accumulators in flight

// Those that the registers [d, d + count) of the running thread belong to, or null.
std::shared_ptr<WgmmaAccumulators> find_accumulators(const Warpgroup& group, const float* d, int count,
                                                     const Where& where) {
  for (const auto& accumulators : group.in_flight) {
    const float* begin = accumulators->registers[index_in_warpgroup()];
    if (!begin || d >= begin + accumulators->n / 2 || d + count <= begin) continue;
    if (d != begin || count != accumulators->n / 2)
      fail(where, "wgmma: accumulators overlap others in flight");
    return accumulators;
  }
  return nullptr;
}

void take_registers(WgmmaAccumulators& accumulators, float* d) {
  const unsigned thread = index_in_warpgroup();
  accumulators.registers[thread] = d;
  for_each_register(accumulators, thread, [](float& own, float& value) { value = own; });
  std::memset(d, 0xff, size_t(accumulators.n) / 2 * sizeof(float));
}

// Writes the accumulators back that no pending wgmma uses.
void return_registers(Warpgroup& group) {
  std::erase_if(group.in_flight, [](const std::shared_ptr<WgmmaAccumulators>& accumulators) {
    if (accumulators->pending_wgmmas > 0) return false;
    for (unsigned thread = 0; thread < kThreads; ++thread)
      for_each_register(*accumulators, thread, [](float& own, float& value) { own = value; });
    return true;
  });
}

// The first thread to issue a wgmma creates it.
void add_pending(Warpgroup& group, int n, const WgmmaOperands& operands, bool accumulate,
                 std::shared_ptr<WgmmaAccumulators> accumulators, const Where& where) {
  if (!accumulators) {
    accumulators = std::make_shared<WgmmaAccumulators>(WgmmaAccumulators{n, 0, {}, {}});
    accumulators->values.resize(size_t(kM * n));
    group.in_flight.push_back(accumulators);
  }
  ++accumulators->pending_wgmmas;
  group.pending.push_back({.operands = operands,
                           .accumulate = accumulate,
                           .where = where,
                           .immediate = completes_immediately(),
                           .a_registers = {},
                           .accumulators = std::move(accumulators)});
}

}  // namespace

void wgmma(int n, float* d, const WgmmaOperands& operands, bool accumulate, const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  const unsigned number = self.wgmmas_issued++;
  const std::shared_ptr<WgmmaAccumulators> accumulators = find_accumulators(group, d, n / 2, where);
  if (!self.wgmma_fenced && (operands.a_registers || !accumulators))
    fail(where, "wgmma: no wgmma_fence since its registers were last accessible");

  if (number == group.first_pending + group.pending.size())
    add_pending(group, n, operands, accumulate, accumulators, where);
  Wgmma& wgmma = group.pending[number - group.first_pending];
  if (wgmma.where.line() != where.line() || wgmma.operands.a != operands.a ||
      wgmma.operands.b != operands.b || wgmma.accumulate != accumulate ||
      (accumulators && accumulators != wgmma.accumulators))
    fail(where,
         "wgmma: threads of a warpgroup issue different wgmmas, others that of " + line_text(wgmma.where));
  if (operands.a_registers)
    std::copy(operands.a_registers, operands.a_registers + 4, wgmma.a_registers[index_in_warpgroup()]);
  if (!accumulators) take_registers(*wgmma.accumulators, d);
  if (++wgmma.issued < kThreads) return;
  check_operands(group, wgmma);
  if (wgmma.immediate) execute_until(group, number + 1);
}

void wgmma_fence() { running_thread()->wgmma_fenced = true; }

void wgmma_commit(const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  if (self.wgmma_groups_committed == group.group_ends.size()) group.group_ends.push_back(self.wgmmas_issued);
  if (group.group_ends[self.wgmma_groups_committed++] != self.wgmmas_issued)
    fail(where, "wgmma_commit: threads of a warpgroup have issued different numbers of wgmmas");
}

// Unlike on a GPU, the threads of the warpgroup wait for each other: a wgmma can only be executed when all
// have issued it.
void wgmma_wait(int pending, const Where& where) {
  Warpgroup& group = own_warpgroup(where);
  ThreadState& self = *running_thread();
  if (!group.waiting.empty() &&
      (group.waiting[0]->where.line() != where.line() || group.allowed_pending != pending))
    fail(where, "divergent warpgroup: others wait at " + line_text(group.waiting[0]->where));
  group.allowed_pending = pending;
  group.waiting.push_back(&self);
  self.wgmma_fenced = false;
  if (group.waiting.size() == kThreads) {
    const size_t complete = group.group_ends.size() - std::min(group.group_ends.size(), size_t(pending));
    if (complete > 0) execute_until(group, group.group_ends[complete - 1]);
    return_registers(group);
    for (ThreadState* thread : group.waiting) {
      if (thread->wgmma_groups_committed != group.group_ends.size() ||
          thread->wgmmas_issued != self.wgmmas_issued)
        fail(where, "wgmma_wait: threads of a warpgroup have issued different numbers of wgmmas");
      acquire(thread->clock, group.agent, uint32_t(complete));
    }
    make_runnable(group.waiting);
    ++running.progress;
    group.waiting.clear();
  }
  suspend(kWait, where);
}

void wgmma_fence_operand(const float* d, int count, const Where& where) {
  for (const auto& accumulators : own_warpgroup(where).in_flight)
    if (const float* begin = accumulators->registers[index_in_warpgroup()];
        begin && d < begin + accumulators->n / 2 && d + count > begin)
      fail(where, "wgmma_fence_operand: a wgmma in flight owns these registers");
}

void check_no_wgmma_in_flight(ThreadState& thread) {
  const auto& groups = running_block()->warpgroups;
  const size_t group = thread.id.index / kThreads;
  if (group >= groups.size()) return;
  for (const auto& accumulators : groups[group].in_flight)
    if (accumulators->registers[thread.id.index % kThreads])
      fail("a thread returned before its wgmmas had been waited for");
}

}  // namespace simt
