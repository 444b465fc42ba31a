// Copies of whole tiles and of runs of bytes, which read and write shared memory on their own: loads land at
// an mbarrier, stores are waited for by the thread that issued them.

#include <cstring>
#include <stdexcept>
#include <utility>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr uint32_t kPiece = 16;  // bytes that swizzling keeps together

uint32_t swizzled(uint32_t address, uint32_t span) {
  return span ? address ^ (address >> 7 & 7) * kPiece : address;
}

uint32_t row_bytes(const TensorMap& map) { return map.box[0] * map.element_bytes; }

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

void check_copy(const TensorMap& map, int rank, uint32_t shared, const Where& where) {
  if (map.rank != rank)
    fail(where, "TMA: " + std::to_string(rank) + " coordinates for a tensor of " + std::to_string(map.rank) +
                    " dimensions");
  at_address(shared, box_bytes(map), map.swizzle ? 8 * map.swizzle : 128, where);
}

// f(offset in the box, bytes of it that are inside of the tensor: from, how many, and where they are there)
template <class F>
void for_each_row(const TensorMap& map, const int* at, const F& f) {
  const int64_t first = std::max<int64_t>(0, -int64_t(at[0]));
  const int64_t last = std::min<int64_t>(map.box[0], map.size[0] - at[0]);
  uint32_t index[5] = {};
  for (uint32_t offset = 0; offset < box_bytes(map); offset += row_bytes(map)) {
    bool inside = first < last;
    int64_t row = 0;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t coordinate = int64_t(at[i]) + index[i];
      inside &= coordinate >= 0 && coordinate < map.size[i];
      row += coordinate * map.stride_bytes[i];
    }
    const int64_t bytes = map.element_bytes;
    f(offset, first * bytes, inside ? (last - first) * bytes : 0, map.data + row + (at[0] + first) * bytes);
    for (int i = 1; i < map.rank && ++index[i] == map.box[i]; ++i) index[i] = 0;
  }
}

// Issues a load: `copy` fills the bytes.
void load(uint32_t to, uint32_t bytes, uint32_t barrier_address, const Where& where,
          std::function<void()> copy) {
  MemoryBarrier& barrier = memory_barrier(barrier_address, where);
  if (!barrier.fenced) fail(where, "mbarrier: initialised without a fence, and copies may not see it");
  check_fenced(running_thread()->clock, to, bytes, where);
  start_writing(to, bytes, where);
  std::memset(arena() + to, 0xff, bytes);
  auto arrive = [=, &barrier, copy = std::move(copy)] {
    copy();
    finish_writing(barrier.copies, to, bytes);
    land(barrier, bytes, where);
  };
  if (takes_effect_at_once())
    arrive();
  else
    running_block()->bulk_loads.push_back(std::move(arrive));
}

void read_source(BulkStore& store) {
  if (store.read.empty()) store.read.assign(arena() + store.from, arena() + store.from + store.bytes);
}

void write_result(BulkStore& store) {
  read_source(store);
  if (store.write) std::exchange(store.write, {})(store.read);
}

void issue(BulkStore store, const Where& where) {
  ThreadState& self = *running_thread();
  start_reading(self.stores, self.stores_committed + 1, self.clock, store.from, store.bytes, where);
  check_fenced(self.clock, store.from, store.bytes, where);
  if (takes_effect_at_once()) read_source(store);
  if (!store.read.empty() && takes_effect_at_once()) write_result(store);
  self.open_stores.push_back(std::move(store));
}

}  // namespace

// The rules of cuTensorMapEncodeTiled; and of the inner box the one width for which a swizzled tile is dense.
TensorMap make_tensor_map(const void* data, size_t element_bytes, int rank, const int64_t* sizes,
                          const int64_t* strides, const int* box, uint32_t swizzle) {
  const auto require = [](bool right, const char* what) {
    if (!right) throw std::runtime_error(std::string("no tensor map: ") + what);
  };
  TensorMap map{};
  map.data = static_cast<const unsigned char*>(data);
  map.rank = rank;
  map.element_bytes = uint32_t(element_bytes);
  map.swizzle = swizzle;
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "data is not aligned to 16 bytes");
  for (int i = 0; i < rank; ++i) {
    map.size[i] = sizes[i];
    map.stride_bytes[i] = (i > 0 ? strides[i - 1] : 1) * int64_t(element_bytes);
    map.box[i] = uint32_t(box[i]);
    require(sizes[i] > 0 && sizes[i] <= int64_t(1) << 32, "a size is not in 1 ... 2^32");
    require(i == 0 || (map.stride_bytes[i] % 16 == 0 && map.stride_bytes[i] >= 0 &&
                       map.stride_bytes[i] < int64_t(1) << 40),
            "a stride is no multiple of 16 bytes below 2^40");
    require(box[i] > 0 && box[i] <= 256, "a box is not 1 ... 256 elements wide");
  }
  require(row_bytes(map) % 16 == 0, "the inner box is no multiple of 16 bytes");
  require(swizzle == 0 || row_bytes(map) == swizzle, "the inner box is not as wide as the swizzle");
  return map;
}

void tma_load(uint32_t to, const TensorMap& tensor, int rank, const int* at, uint32_t barrier,
              const Where& where) {
  check_copy(tensor, rank, to, where);
  int corner[5] = {};
  std::copy(at, at + rank, corner);
  load(to, box_bytes(tensor), barrier, where, [=, map = tensor] {
    std::vector<unsigned char> row(row_bytes(map));
    for_each_row(map, corner, [&](uint32_t offset, int64_t first, int64_t bytes, const unsigned char* from) {
      std::fill(row.begin(), row.end(), 0);
      if (bytes > 0) {
        check_global(from, size_t(bytes), false, where);
        std::memcpy(row.data() + first, from, size_t(bytes));
      }
      for (uint32_t i = 0; i < row.size(); i += kPiece)
        std::memcpy(arena() + swizzled(to + offset + i, map.swizzle), row.data() + i, kPiece);
    });
  });
}

void tma_store(const TensorMap& tensor, int rank, const int* at, uint32_t from, const Where& where) {
  check_copy(tensor, rank, from, where);
  int corner[5] = {};
  std::copy(at, at + rank, corner);
  const auto write = [=, map = tensor](const std::vector<unsigned char>& read) {
    std::vector<unsigned char> row(row_bytes(map));
    for_each_row(map, corner, [&](uint32_t offset, int64_t first, int64_t bytes, const unsigned char* to) {
      for (uint32_t i = 0; i < row.size(); i += kPiece)
        std::memcpy(row.data() + i, read.data() + swizzled(from + offset + i, map.swizzle) - from, kPiece);
      if (bytes <= 0) return;
      check_global(to, size_t(bytes), true, where);
      std::memcpy(const_cast<unsigned char*>(to), row.data() + first, size_t(bytes));
    });
  };
  issue({.from = from, .bytes = box_bytes(tensor), .read = {}, .write = write}, where);
}

namespace {

void check_run(const void* global, uint32_t shared, uint32_t bytes, const Where& where) {
  if (bytes == 0 || bytes % 16) fail(where, "a bulk copy moves a multiple of 16 bytes");
  check_aligned(global, 16, where);
  at_address(shared, bytes, 16, where);
}

}  // namespace

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, const Where& where) {
  check_run(from, to, bytes, where);
  load(to, bytes, barrier, where, [=] {
    check_global(from, bytes, false, where);
    std::memcpy(arena() + to, from, bytes);
  });
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, const Where& where) {
  check_run(to, from, bytes, where);
  const auto write = [=](const std::vector<unsigned char>& read) {
    check_global(to, bytes, true, where);
    std::memcpy(to, read.data(), bytes);
  };
  issue({.from = from, .bytes = bytes, .read = {}, .write = write}, where);
}

bool land_bulk_load() {
  auto& loads = running_block()->bulk_loads;
  if (loads.empty()) return false;
  const Order order = schedule().order;
  const size_t which = order == Order::kForward   ? 0
                       : order == Order::kReverse ? loads.size() - 1
                                                  : toss() % loads.size();
  const std::function<void()> arrive = std::move(loads[which]);
  loads.erase(loads.begin() + ptrdiff_t(which));
  arrive();
  return true;
}

// ---- groups of stores
void bulk_commit() {
  ThreadState& self = *running_thread();
  self.committed_stores.push_back(std::exchange(self.open_stores, {}));
  ++self.stores_committed;
}

void bulk_wait_read(int pending, const Where&) {
  ThreadState& self = *running_thread();
  const int complete = int(self.committed_stores.size()) - pending;
  for (int i = 0; i < complete; ++i)
    for (BulkStore& store : self.committed_stores[size_t(i)]) read_source(store);
  self.stores_read =
      std::max(self.stores_read, self.stores_committed - std::min(self.stores_committed, unsigned(pending)));
  learn(self.clock, self.stores, self.stores_read);
}

void bulk_wait(int pending, const Where& where) {
  bulk_wait_read(pending, where);
  auto& groups = running_thread()->committed_stores;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (BulkStore& store : groups.front()) write_result(store);
}

// Shared memory ends with the block: what still reads or writes it meets another's.
void finish_stores(ThreadState& thread) {
  if (thread.stores_read < thread.stores_committed || !thread.open_stores.empty())
    fail("a thread returned before its stores from shared memory had been read: bulk_wait_read");
  for (auto& group : thread.committed_stores)
    for (BulkStore& store : group) write_result(store);
  if (running_block()->alive == 1 && !running_block()->bulk_loads.empty())
    fail("the block ends while copies to its shared memory are on their way");
}

void fence_proxy_async() {
  fence_stores(*running_thread());
  fence_mbarrier_init();
}

}  // namespace simt
