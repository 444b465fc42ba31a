// TMA and bulk copies. Loads complete on an mbarrier; stores are waited for by the thread that issued them.

#include <cstring>
#include <stdexcept>
#include <utility>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {
namespace {

constexpr uint32_t kVectorBytes = 16;  // the unit that swizzling permutes

uint32_t swizzled(uint32_t address, uint32_t span) {
  return span ? address ^ (address >> 7 & 7) * kVectorBytes : address;
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
  shared_pointer(shared, box_bytes(map), map.swizzle ? 8 * map.swizzle : 128, where);
}

// Calls f(offset of the row in the box, first byte of the row that is inside the tensor, number of such
// bytes, their address in the tensor) for each row of the box.
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

// Issues a load; copy() performs it.
void load(uint32_t to, uint32_t bytes, uint32_t barrier_address, const Where& where,
          std::function<void()> copy) {
  Mbarrier& barrier = find_mbarrier(barrier_address, where);
  if (!barrier.init_fenced)
    fail(where, "mbarrier: initialised without a fence, so the async proxy may not see it");
  check_proxy_fence(running_thread()->clock, to, bytes, where);
  begin_async_write(to, bytes, where);
  std::memset(arena() + to, 0xff, bytes);
  auto complete = [=, &barrier, copy = std::move(copy)] {
    copy();
    end_async_write(barrier.copies, to, bytes);
    complete_tx(barrier, bytes, where);
  };
  if (completes_immediately())
    complete();
  else
    running_block()->pending_bulk_loads.push_back(std::move(complete));
}

void read_source(BulkStore& store) {
  if (store.data.empty()) store.data.assign(arena() + store.from, arena() + store.from + store.bytes);
}

void write_destination(BulkStore& store) {
  read_source(store);
  if (store.write) std::exchange(store.write, {})(store.data);
}

void issue(BulkStore store, const Where& where) {
  ThreadState& self = *running_thread();
  begin_async_read(self.stores, self.store_groups_committed + 1, self.clock, store.from, store.bytes, where);
  check_proxy_fence(self.clock, store.from, store.bytes, where);
  if (completes_immediately()) read_source(store);
  if (!store.data.empty() && completes_immediately()) write_destination(store);
  self.uncommitted_stores.push_back(std::move(store));
}

}  // namespace

// Enforces the rules of cuTensorMapEncodeTiled and, if swizzled, that the inner box is as wide as the
// swizzle: the only width for which tiles are dense.
TensorMap make_tensor_map(const void* data, size_t element_bytes, int rank, const int64_t* sizes,
                          const int64_t* strides, const int* box, uint32_t swizzle) {
  const auto require = [](bool condition, const char* what) {
    if (!condition) throw std::runtime_error(std::string("no tensor map: ") + what);
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
    require(sizes[i] > 0 && sizes[i] <= int64_t(1) << 32, "a size is not in [1, 2^32]");
    require(i == 0 || (map.stride_bytes[i] % 16 == 0 && map.stride_bytes[i] >= 0 &&
                       map.stride_bytes[i] < int64_t(1) << 40),
            "a stride is not a multiple of 16 bytes below 2^40");
    require(box[i] > 0 && box[i] <= 256, "a dimension of the box is not in [1, 256]");
  }
  require(row_bytes(map) % 16 == 0, "the inner dimension of the box is not a multiple of 16 bytes");
  require(swizzle == 0 || row_bytes(map) == swizzle,
          "the inner dimension of the box is not as wide as the swizzle");
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
        check_global_access(from, size_t(bytes), false, where);
        std::memcpy(row.data() + first, from, size_t(bytes));
      }
      for (uint32_t i = 0; i < row.size(); i += kVectorBytes)
        std::memcpy(arena() + swizzled(to + offset + i, map.swizzle), row.data() + i, kVectorBytes);
    });
  });
}

void tma_store(const TensorMap& tensor, int rank, const int* at, uint32_t from, const Where& where) {
  check_copy(tensor, rank, from, where);
  int corner[5] = {};
  std::copy(at, at + rank, corner);
  const auto write = [=, map = tensor](const std::vector<unsigned char>& data) {
    std::vector<unsigned char> row(row_bytes(map));
    for_each_row(map, corner, [&](uint32_t offset, int64_t first, int64_t bytes, const unsigned char* to) {
      for (uint32_t i = 0; i < row.size(); i += kVectorBytes)
        std::memcpy(row.data() + i, data.data() + swizzled(from + offset + i, map.swizzle) - from,
                    kVectorBytes);
      if (bytes <= 0) return;
      check_global_access(to, size_t(bytes), true, where);
      std::memcpy(const_cast<unsigned char*>(to), row.data() + first, size_t(bytes));
    });
  };
  issue({.from = from, .bytes = box_bytes(tensor), .data = {}, .write = write}, where);
}

namespace {

void check_bulk_copy(const void* global, uint32_t shared, uint32_t bytes, const Where& where) {
  if (bytes == 0 || bytes % 16) fail(where, "a bulk copy moves a multiple of 16 bytes");
  check_aligned(global, 16, where);
  shared_pointer(shared, bytes, 16, where);
}

}  // namespace

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, const Where& where) {
  check_bulk_copy(from, to, bytes, where);
  load(to, bytes, barrier, where, [=] {
    check_global_access(from, bytes, false, where);
    std::memcpy(arena() + to, from, bytes);
  });
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, const Where& where) {
  check_bulk_copy(to, from, bytes, where);
  const auto write = [=](const std::vector<unsigned char>& data) {
    check_global_access(to, bytes, true, where);
    std::memcpy(to, data.data(), bytes);
  };
  issue({.from = from, .bytes = bytes, .data = {}, .write = write}, where);
}

bool complete_bulk_load() {
  auto& loads = running_block()->pending_bulk_loads;
  if (loads.empty()) return false;
  const Order order = schedule().order;
  const size_t which = order == Order::kForward   ? 0
                       : order == Order::kReverse ? loads.size() - 1
                                                  : random_bits() % loads.size();
  const std::function<void()> complete = std::move(loads[which]);
  loads.erase(loads.begin() + ptrdiff_t(which));
  complete();
  return true;
}

// ---- bulk async-groups of stores
void bulk_commit() {
  ThreadState& self = *running_thread();
  self.store_groups.push_back(std::exchange(self.uncommitted_stores, {}));
  ++self.store_groups_committed;
}

void bulk_wait_read(int pending, const Where&) {
  ThreadState& self = *running_thread();
  const int complete = int(self.store_groups.size()) - pending;
  for (int i = 0; i < complete; ++i)
    for (BulkStore& store : self.store_groups[size_t(i)]) read_source(store);
  const unsigned committed = self.store_groups_committed;
  self.store_groups_read =
      std::max(self.store_groups_read, committed - std::min(committed, unsigned(pending)));
  acquire(self.clock, self.stores, self.store_groups_read);
}

void bulk_wait(int pending, const Where& where) {
  bulk_wait_read(pending, where);
  auto& groups = running_thread()->store_groups;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (BulkStore& store : groups.front()) write_destination(store);
}

// Shared memory is reused when the block ends, so nothing may still be reading or writing it.
void finish_stores(ThreadState& thread) {
  if (thread.store_groups_read < thread.store_groups_committed || !thread.uncommitted_stores.empty())
    fail("a thread returned before its stores from shared memory had been read: bulk_wait_read");
  for (auto& group : thread.store_groups)
    for (BulkStore& store : group) write_destination(store);
  if (running_block()->live_threads == 1 && !running_block()->pending_bulk_loads.empty())
    fail("the block ends while copies to its shared memory are on their way");
}

void fence_proxy_async() {
  record_proxy_fence(*running_thread());
  fence_mbarrier_init();
}

}  // namespace simt
