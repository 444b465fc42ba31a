// The running block, as the files of the emulator share it.
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

// Vector clock: how much of each thread's past is ordered before now. One entry a thread, then one for each
// agent. A missing entry is 0.
using Clock = std::vector<uint32_t>;

// What reads or writes shared memory on its own: copies that land at one mbarrier, stores of one thread,
// products of one warpgroup. Its time is what threads learn when they have waited for it.
struct Agent {
  uint32_t index = 0;  // in clocks; 0: none yet
  uint32_t time = 0;
};

// 16 bytes on their way to shared memory: those of `from`, then zeros.
struct AsyncCopy {
  uint32_t to;  // in the arena
  const void* from;
  uint32_t from_bytes;
  bool done;
};

// A copy from shared memory: what it reads is kept until it is written.
struct BulkStore {
  uint32_t from, bytes;
  std::vector<unsigned char> read;                               // empty: not yet
  std::function<void(const std::vector<unsigned char>&)> write;  // empty: done
};

struct MemoryBarrier;

struct ThreadState : Fiber {
  Thread id{};
  bool done = false;
  const char* waits_in = nullptr;  // a barrier or collective
  Where where{};
  const MemoryBarrier* waits_for = nullptr;  // if it waits for one of these
  Clock clock;
  std::vector<uint32_t> proxy_fences;                   // own times
  std::vector<AsyncCopy> open_copies;                   // of no group yet
  std::deque<std::vector<AsyncCopy>> committed_copies;  // oldest group first
  std::vector<BulkStore> open_stores;                   // the same for copies from shared memory
  std::deque<std::vector<BulkStore>> committed_stores;
  unsigned stores_committed = 0, stores_read = 0;  // groups; read: and waited for
  Agent stores;
  unsigned products = 0, product_groups = 0;  // wgmma issued, committed
  bool products_fenced = false;               // no register has been touched since
};

struct MemoryBarrier {
  unsigned arrivals = 0;          // of a phase
  unsigned missing_arrivals = 0;  // of the current phase
  int64_t missing_bytes = 0;      // negative: landed before they were expected
  uint64_t phase = 0;             // the current one
  bool fenced = false;            // its initialisation, for copies
  ThreadState* initialised_by = nullptr;
  std::vector<ThreadState*> waiting;  // for the end of the current phase
  Agent copies;
  Clock arriving, ended;  // of those who have arrived in this phase, in all phases before
};

// Lanes of a warp on their way into one collective.
struct Meeting {
  uint32_t mask = 0, arrived;  // mask 0: nobody is on the way
  const char* what;
  Where where;
  void* argument[32];
  ThreadState* thread[32];  // null: not in the mask, or not yet there
};

struct Warp {
  uint32_t lanes = 0, returned = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;  // kept for reuse
};

// Accumulators of a warpgroup that are out of reach of its threads, row by row.
struct Accumulators {
  int n;
  unsigned open_products;
  float* registers[128] = {};
  std::vector<float> sums;
};

// A wgmma: of 128 threads, each of which issues it by itself.
struct Product {
  Half half;
  bool a_mn_major, b_mn_major, a_in_registers, accumulate;
  uint64_t a, b;
  Where where;
  bool at_once;
  unsigned issued = 0;
  uint32_t a_registers[128][4];
  std::shared_ptr<Accumulators> sums;
};

struct Warpgroup {
  std::deque<Product> products;      // not yet computed
  unsigned first = 0;                // the number of the first of them
  std::vector<unsigned> group_ends;  // numbers of products
  std::vector<std::shared_ptr<Accumulators>> in_flight;
  int pending = 0;  // what all wait for
  std::vector<ThreadState*> waiting;
  Agent agent;
};

struct SharedArray {
  const void* key;
  uint32_t begin, end;  // in the arena
};

// Threads at one of the block's numbered barriers.
struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  Clock clock;  // of those who have come
  std::vector<ThreadState*> waiting;
};

struct Block {
  const char* kernel;
  uint32_t index;  // in the grid
  std::vector<ThreadState> threads;
  std::vector<Warp> warps;
  size_t alive;
  std::vector<ThreadState*> at_barrier;
  std::vector<SharedArray> shared;
  size_t last_used = 0;  // of them, by an instruction
  uint32_t dynamic_begin = 0;
  std::map<unsigned, NamedBarrier> named_barriers;
  std::map<uint32_t, MemoryBarrier> memory_barriers;  // by address
  std::vector<std::function<void()>> bulk_loads;      // on their way
  std::vector<Warpgroup> warpgroups;
  uint32_t agents = 0;
};

constexpr uint32_t kArenaBytes = 256 * 1024;  // the shared memory of a block, with gaps between arrays

struct Running {
  Block* block;         // null outside of launch()
  ThreadState* thread;  // null in the scheduler
  uint64_t progress;    // barriers passed and threads done
};
extern Running running;
inline Block* running_block() { return running.block; }
inline ThreadState* running_thread() { return running.thread; }
alignas(1024) extern unsigned char arena_bytes[kArenaBytes];
inline unsigned char* arena() { return arena_bytes; }

[[noreturn]] void fail(const std::string& message);  // ends the launch, from a thread
[[noreturn]] void fail(const Where& where, const std::string& message);
std::string line_text(const Where& where);

// Lanes of `mask` meet; the last to come calls work(meeting) for all. `what` is compared by its address.
void meet(const char* what, uint32_t mask, void* argument, const Where& where, void (*work)(const Meeting&));

uint64_t toss();              // a random number of the schedule
bool takes_effect_at_once();  // the next asynchronous operation, by the schedule
Counters& counters();

// While one of these lives, the running thread fails when `progress` has stood still for so long.
class Watchdog {
 public:
  explicit Watchdog(double seconds);
  ~Watchdog();
};

void wait_here(const char* what, const Where& where);    // until make_ready()
void make_ready(std::span<ThreadState* const> threads);  // null: nobody
void leave_block(ThreadState& thread);  // it has returned: what waited for it alone goes on, or is wrong

// ---- copies of whole tiles, and products of warpgroups
bool land_bulk_load();  // one of those on their way; false: there is none
void land(MemoryBarrier& barrier, uint32_t bytes, const Where& where);
MemoryBarrier& memory_barrier(uint32_t address, const Where& where);
std::string missing_text(const MemoryBarrier& barrier);
void finish_stores(ThreadState& thread);    // of a thread that returns
void finish_products(ThreadState& thread);  // ... likewise: there should be none

// The two elements of a register, to[0] and to[distance].
inline void widen(Half half, uint32_t pair, float* to, int distance) {
  if (half == Half::kBFloat16) {
    to[0] = std::bit_cast<float>(pair << 16);
    to[distance] = std::bit_cast<float>(pair & 0xffff0000u);
  } else {
    to[0] = __half2float({uint16_t(pair)});
    to[distance] = __half2float({uint16_t(pair >> 16)});
  }
}

// ---- shared memory by address: an offset in the arena
void make_dynamic_shared(Block& block, size_t bytes);
uint32_t address_of(const void* shared, const Where& where);
unsigned char* at_address(uint32_t address, size_t bytes, size_t alignment, const Where& where);

// ---- checks of shared memory (race_check.cpp; nothing in the plain build)
void start_checks();  // of a block
// What `thread` has done is before whatever observes the clock later.
void publish(ThreadState& thread, Clock& clock);
void observe(ThreadState& thread, const Clock& clock);
// Accesses by instructions, in the name of a thread.
void check_read(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);
void check_write(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where);
// Nobody may touch these bytes until the asynchronous copy that writes them has been waited for.
void start_writing(uint32_t address, uint32_t bytes, const Where& where);
void finish_writing(uint32_t address, uint32_t bytes);  // a write of the running thread from now on
void finish_writing(Agent& agent, uint32_t address, uint32_t bytes);  // one of an agent, at its next time
// A read that begins now, in the name of threads that know `clock`, and ends when somebody learns of `time`.
void start_reading(Agent& agent, uint32_t time, const Clock& clock, uint32_t address, uint32_t bytes,
                   const Where& where);
void learn(Clock& clock, const Agent& agent, uint32_t time);
// Before a copy or product, which look past what ordinary stores leave: have they been fenced?
void check_fenced(const Clock& clock, uint32_t address, uint32_t bytes, const Where& where);
void fence_stores(ThreadState& thread);
// Accesses by instructions to global memory.
void check_global(const void* begin, size_t bytes, bool write, const Where& where);

}  // namespace simt
