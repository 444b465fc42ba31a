// The state of the running block, shared by the source files of the emulator.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/instructions.h"
#include "simt/simt.h"

namespace simt {

// Vector clock: for each thread of the block, and then for each asynchronous agent, how much of its past
// happens before now. Missing entries are 0.
using Clock = std::vector<uint32_t>;

// Accesses shared memory independently of threads: the loads that complete on one mbarrier, the bulk stores
// of one thread, or the wgmmas of one warpgroup. A thread that waits for it acquires its time.
struct AsyncAgent {
  uint32_t index = 0;  // in clocks; 0: not assigned yet
  uint32_t time = 0;
};

// A cp.async of 16 bytes: from_bytes from `from`, then zeros.
struct AsyncCopy {
  uint32_t to;  // offset in the arena
  const void* from;
  uint32_t from_bytes;
  bool done;
};

// A TMA or bulk store: shared memory is read into `data`, which is written to global memory later.
struct BulkStore {
  uint32_t from, bytes;
  std::vector<unsigned char> data;                               // empty until read
  std::function<void(const std::vector<unsigned char>&)> write;  // empty once written
};

struct Mbarrier;

struct ThreadState : Fiber {
  Thread id{};
  bool exited = false;
  const char* waiting_in = nullptr;  // a barrier or collective
  Where where{};
  const Mbarrier* waiting_for = nullptr;  // if it waits for an mbarrier
  Clock clock;
  std::vector<uint32_t> proxy_fences;  // by its own clock
  std::vector<AsyncCopy> uncommitted_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;  // oldest first
  std::vector<BulkStore> uncommitted_stores;
  std::deque<std::vector<BulkStore>> store_groups;  // oldest first
  unsigned store_groups_committed = 0, store_groups_read = 0;
  AsyncAgent stores;
  unsigned wgmmas_issued = 0, wgmma_groups_committed = 0;
  bool wgmma_fenced = false;  // since registers were last accessible
};

struct Mbarrier {
  unsigned expected_arrivals = 0;  // per phase
  unsigned pending_arrivals = 0;   // in the current phase
  int64_t tx_count = 0;            // bytes; negative: completed before they were expected
  uint64_t phase = 0;              // the current one
  bool init_fenced = false;        // its initialisation is visible to the async proxy
  ThreadState* initialised_by = nullptr;
  std::vector<ThreadState*> waiting;  // for the current phase
  AsyncAgent copies;
  Clock arrived, completed;  // of the arrivals in the current phase, in all earlier phases
};

// A warp-level collective for which lanes are waiting.
struct Collective {
  uint32_t mask = 0, arrived;  // mask 0: unused
  const char* name;
  Where where;
  void* argument[32];
  ThreadState* thread[32];  // null if the lane is not in the mask or has not arrived
};

struct Warp {
  uint32_t lanes = 0, exited = 0;                        // bit masks
  std::vector<std::unique_ptr<Collective>> collectives;  // kept for reuse
};

// Accumulators of a warpgroup while wgmmas in flight own them.
struct WgmmaAccumulators {
  int n;
  unsigned pending_wgmmas;
  float* registers[128] = {};  // of each thread
  std::vector<float> values;   // [64, n]
};

// A wgmma, which each of the 128 threads issues individually.
struct Wgmma {
  WgmmaOperands operands;
  bool accumulate;
  Where where;
  bool immediate;  // takes effect when the last thread has issued it
  unsigned issued = 0;
  uint32_t a_registers[128][4];
  std::shared_ptr<WgmmaAccumulators> accumulators;
};

struct Warpgroup {
  std::deque<Wgmma> pending;         // not executed yet
  unsigned first_pending = 0;        // its number, counting from the start of the block
  std::vector<unsigned> group_ends;  // the number after the last wgmma of each wgmma-group
  std::vector<std::shared_ptr<WgmmaAccumulators>> in_flight;
  int allowed_pending = 0;            // by the wgmma_wait in which threads are waiting
  std::vector<ThreadState*> waiting;  // in wgmma_wait
  AsyncAgent agent;
};

struct SharedArray {
  const void* key;
  uint32_t begin, end;  // offsets in the arena
};

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;  // threads
  Clock clock;                         // of those that have arrived
  std::vector<ThreadState*> waiting;
};

struct Block {
  const char* kernel;
  uint32_t index;  // in the grid
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
  size_t live_threads;
  std::vector<ThreadState*> at_syncthreads;
  std::vector<SharedArray> shared;
  size_t last_accessed = 0;  // index in `shared`
  uint32_t dynamic_begin = 0;
  std::map<unsigned, NamedBarrier> named_barriers;
  std::map<uint32_t, Mbarrier> mbarriers;                 // by address
  std::vector<std::function<void()>> pending_bulk_loads;  // calling one completes it
  std::vector<Warpgroup> warpgroups;
  uint32_t async_agents = 0;
};

constexpr uint32_t kArenaBytes = 256 * 1024;  // the shared memory of a block, with gaps between arrays

struct Running {
  Block* block;         // null outside of launch()
  ThreadState* thread;  // null in the scheduler
  uint64_t progress;    // number of completed barriers and exited threads
};
extern Running running;
inline Block* running_block() { return running.block; }
inline ThreadState* running_thread() { return running.thread; }
alignas(1024) extern unsigned char arena_bytes[kArenaBytes];
inline unsigned char* arena() { return arena_bytes; }

[[noreturn]] void fail(const std::string& message);  // ends the launch; called by a thread
[[noreturn]] void fail(const Where& where, const std::string& message);
std::string line_text(const Where& where);

// Waits until all lanes of `mask` have called it; the last one calls complete(collective) for all. `name` is
// compared by address.
void run_collective(const char* name, uint32_t mask, void* argument, const Where& where,
                    void (*complete)(const Collective&));

uint64_t random_bits();        // of the schedule's generator
bool completes_immediately();  // whether the next asynchronous operation does, by the schedule
Counters& counters();

// During its lifetime the running thread fails if `progress` does not change for `timeout` seconds.
class Watchdog {
 public:
  explicit Watchdog(double timeout);
  ~Watchdog();
};

void suspend(const char* name, const Where& where);         // the running thread, until make_runnable()
void make_runnable(std::span<ThreadState* const> threads);  // ignores null

// Completes __syncthreads if it waited only for this thread; fails if a warp-level collective needs it.
void thread_exited(ThreadState& thread);

// ---- asynchronous copies and wgmma
bool complete_bulk_load();  // one of the pending ones; false if there are none
void complete_tx(Mbarrier& barrier, uint32_t bytes, const Where& where);
Mbarrier& find_mbarrier(uint32_t address, const Where& where);
std::string pending_text(const Mbarrier& barrier);
void finish_stores(ThreadState& thread);             // of an exiting thread
void check_no_wgmma_in_flight(ThreadState& thread);  // likewise

// Unpacks the two elements of a register to to[0] and to[distance].
inline void unpack_pair(HalfType type, uint32_t pair, float* to, int distance) {
  if (type == HalfType::kBFloat16) {
    to[0] = std::bit_cast<float>(pair << 16);
    to[distance] = std::bit_cast<float>(pair & 0xffff0000u);
  } else {
    to[0] = __half2float({uint16_t(pair)});
    to[distance] = __half2float({uint16_t(pair >> 16)});
  }
}

// ---- shared memory; an address is an offset in the arena
void make_dynamic_shared(Block& block, size_t bytes);
unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const Where& where);

// ---- race detection (race_check.cpp; no-ops in the plain build)
void begin_block_checks();

// What `thread` has done so far happens before whatever acquires `clock` later.
void release(ThreadState& thread, Clock& clock);
void acquire(ThreadState& thread, const Clock& clock);
void acquire(Clock& clock, const AsyncAgent& agent, uint32_t time);

// Accesses by instructions on behalf of a thread.
void check_read(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);
void check_write(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);

// An asynchronous write. No thread may access the bytes until it has ended, either as a write of the running
// thread or, at the agent's next time, of an agent.
void begin_async_write(uint32_t address, uint32_t bytes, const Where& where);
void end_async_write(uint32_t address, uint32_t bytes);
void end_async_write(AsyncAgent& agent, uint32_t address, uint32_t bytes);

// An asynchronous read, ordered after `clock`. It ends for threads that acquire `time` of the agent.
void begin_async_read(AsyncAgent& agent, uint32_t time, const Clock& clock, uint32_t address, uint32_t bytes,
                      const Where& where);

// Ordinary stores must be followed by a proxy fence before the async proxy may access the bytes.
void check_proxy_fence(const Clock& clock, uint32_t address, uint32_t bytes, const Where& where);
void record_proxy_fence(ThreadState& thread);

// Accesses by instructions to global memory.
void check_global_access(const void* begin, size_t bytes, bool write, const Where& where);

}  // namespace simt
