// mbarriers. A phase completes when its pending arrivals and its tx-count are both zero, which makes the
// threads that wait for it runnable; there is no polling.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr char kWait[] = "mbarrier_wait";
constexpr uint64_t kMagic = 0x7265697272616221;  // stored in the barrier's 8 bytes to detect overwriting

void complete_phase_if_done(Mbarrier& barrier, const Where& where) {
  if (barrier.pending_arrivals > 0 || barrier.tx_count > 0) return;
  if (barrier.tx_count < 0) fail(where, "mbarrier: more bytes were copied than the phase expected");
  ++barrier.phase;
  ++running.progress;
  barrier.pending_arrivals = barrier.expected_arrivals;
  if (barrier.completed.size() < barrier.arrived.size()) barrier.completed.resize(barrier.arrived.size());
  for (size_t i = 0; i < barrier.arrived.size(); ++i)
    barrier.completed[i] = std::max(barrier.completed[i], barrier.arrived[i]);
  make_runnable(barrier.waiting);
  barrier.waiting.clear();
}

}  // namespace

Mbarrier& find_mbarrier(uint32_t address, const Where& where) {
  const unsigned char* bytes = shared_pointer(address, 8, 8, where);
  const auto found = running_block()->mbarriers.find(address);
  if (found == running_block()->mbarriers.end()) fail(where, "mbarrier: never initialised");
  if (std::memcmp(bytes, &kMagic, 8) != 0) fail(where, "mbarrier: overwritten since its initialisation");
  check_read(*running_thread(), address, 8, where);  // its initialisation must be visible to the thread
  return found->second;
}

void mbarrier_init(uint32_t address, unsigned arrivals, const Where& where) {
  unsigned char* bytes = shared_pointer(address, 8, 8, where);
  check_write(*running_thread(), address, 8, where);
  if (arrivals == 0 || arrivals >= 1 << 20)
    fail(where, "mbarrier: the arrival count must be in [1, 2^20 - 1]");
  std::memcpy(bytes, &kMagic, 8);
  Mbarrier& barrier = running_block()->mbarriers[address];
  if (!barrier.waiting.empty()) fail(where, "mbarrier: initialised again while threads wait for it");
  const AsyncAgent copies = barrier.copies;
  barrier = {};
  barrier.expected_arrivals = barrier.pending_arrivals = arrivals;
  barrier.initialised_by = running_thread();
  barrier.copies = copies;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : running_block()->mbarriers)
    if (barrier.initialised_by == running_thread()) barrier.init_fenced = true;
}

void mbarrier_arrive(uint32_t address, const Where& where) {
  Mbarrier& barrier = find_mbarrier(address, where);
  if (barrier.pending_arrivals == 0)
    fail(where,
         "mbarrier: more than " + std::to_string(barrier.expected_arrivals) + " arrivals in one phase");
  release(*running_thread(), barrier.arrived);
  --barrier.pending_arrivals;
  complete_phase_if_done(barrier, where);
}

void mbarrier_expect_tx(uint32_t address, unsigned bytes, const Where& where) {
  Mbarrier& barrier = find_mbarrier(address, where);
  if (barrier.pending_arrivals == 0) fail(where, "mbarrier: expect_tx after the last arrival of the phase");
  barrier.tx_count += bytes;
  if (barrier.tx_count >= 1 << 20) fail(where, "mbarrier: the tx-count must stay below 2^20 bytes");
}

void complete_tx(Mbarrier& barrier, uint32_t bytes, const Where& where) {
  barrier.tx_count -= bytes;
  acquire(barrier.arrived, barrier.copies, barrier.copies.time);
  complete_phase_if_done(barrier, where);
}

void mbarrier_wait(uint32_t address, unsigned parity, const Where& where) {
  Mbarrier& barrier = find_mbarrier(address, where);
  ThreadState& self = *running_thread();
  if (barrier.phase % 2 == (parity & 1)) {
    const uint64_t phase = barrier.phase;
    barrier.waiting.push_back(&self);
    self.waiting_for = &barrier;
    suspend(kWait, where);
    self.waiting_for = nullptr;
    // On a GPU a thread may test the barrier only now, and would see the same parity again.
    if (barrier.phase != phase + 1)
      fail(where, "mbarrier: the next phase completed before a thread had left the wait for this one");
  }
  acquire(self, barrier.completed);
}

std::string pending_text(const Mbarrier& barrier) {
  return "phase " + std::to_string(barrier.phase) + " still expects " +
         std::to_string(barrier.pending_arrivals) + " arrivals and " + std::to_string(barrier.tx_count) +
         " bytes";
}

}  // namespace simt
