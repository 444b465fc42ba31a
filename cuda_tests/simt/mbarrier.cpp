// Barriers in shared memory: phases that end when enough threads have arrived and all expected bytes have
// landed. Threads that wait are resumed by that event; nobody polls.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kWait[] = "mbarrier_wait";
constexpr uint64_t kMark = 0x7265697272616221;  // in the barrier's 8 bytes: whoever overwrites it is found

void end_phase_if_complete(MemoryBarrier& barrier, const Where& where) {
  if (barrier.missing_arrivals > 0 || barrier.missing_bytes > 0) return;
  if (barrier.missing_bytes < 0)
    fail(where, "mbarrier: more bytes have landed than were expected in the phase");
  ++barrier.phase;
  ++running.progress;
  barrier.missing_arrivals = barrier.arrivals;
  if (barrier.ended.size() < barrier.arriving.size()) barrier.ended.resize(barrier.arriving.size());
  for (size_t i = 0; i < barrier.arriving.size(); ++i)
    barrier.ended[i] = std::max(barrier.ended[i], barrier.arriving[i]);
  make_ready(barrier.waiting);
  barrier.waiting.clear();
}

}  // namespace

MemoryBarrier& memory_barrier(uint32_t address, const Where& where) {
  const unsigned char* bytes = at_address(address, 8, 8, where);
  const auto found = running_block()->memory_barriers.find(address);
  if (found == running_block()->memory_barriers.end()) fail(where, "mbarrier: never initialised");
  if (std::memcmp(bytes, &kMark, 8) != 0) fail(where, "mbarrier: overwritten since its initialisation");
  check_read(*running_thread(), address, 8, where);  // its initialisation must be visible to the thread
  return found->second;
}

void mbarrier_init(uint32_t address, unsigned arrivals, const Where& where) {
  unsigned char* bytes = at_address(address, 8, 8, where);
  check_write(*running_thread(), address, 8, where);
  if (arrivals == 0 || arrivals >= 1 << 20) fail(where, "mbarrier: 1 to 2^20 - 1 threads arrive in a phase");
  std::memcpy(bytes, &kMark, 8);
  MemoryBarrier& barrier = running_block()->memory_barriers[address];
  if (!barrier.waiting.empty()) fail(where, "mbarrier: initialised again while threads wait");
  const Agent copies = barrier.copies;
  barrier = {};
  barrier.arrivals = barrier.missing_arrivals = arrivals;
  barrier.initialised_by = running_thread();
  barrier.copies = copies;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : running_block()->memory_barriers)
    if (barrier.initialised_by == running_thread()) barrier.fenced = true;
}

void mbarrier_arrive(uint32_t address, const Where& where) {
  MemoryBarrier& barrier = memory_barrier(address, where);
  if (barrier.missing_arrivals == 0)
    fail(where, "mbarrier: more than " + std::to_string(barrier.arrivals) + " arrivals in one phase");
  publish(*running_thread(), barrier.arriving);
  --barrier.missing_arrivals;
  end_phase_if_complete(barrier, where);
}

void mbarrier_expect_tx(uint32_t address, unsigned bytes, const Where& where) {
  MemoryBarrier& barrier = memory_barrier(address, where);
  if (barrier.missing_arrivals == 0)
    fail(where, "mbarrier: bytes are expected after the last arrival of the phase");
  barrier.missing_bytes += bytes;
  if (barrier.missing_bytes >= 1 << 20) fail(where, "mbarrier: a phase counts fewer than 2^20 bytes");
}

void land(MemoryBarrier& barrier, uint32_t bytes, const Where& where) {
  barrier.missing_bytes -= bytes;
  learn(barrier.arriving, barrier.copies, barrier.copies.time);
  end_phase_if_complete(barrier, where);
}

void mbarrier_wait(uint32_t address, unsigned parity, const Where& where) {
  MemoryBarrier& barrier = memory_barrier(address, where);
  ThreadState& self = *running_thread();
  if (barrier.phase % 2 == (parity & 1)) {
    const uint64_t phase = barrier.phase;
    barrier.waiting.push_back(&self);
    self.waits_for = &barrier;
    wait_here(kWait, where);
    self.waits_for = nullptr;
    // A GPU's thread may look only now, and would find the parity it waited with.
    if (barrier.phase != phase + 1)
      fail(where, "mbarrier: another phase has ended before a thread that waited for the last one went on");
  }
  observe(self, barrier.ended);
}

std::string missing_text(const MemoryBarrier& barrier) {
  return "phase " + std::to_string(barrier.phase) + " lacks " + std::to_string(barrier.missing_arrivals) +
         " arrivals and " + std::to_string(barrier.missing_bytes) + " bytes";
}

}  // namespace simt
