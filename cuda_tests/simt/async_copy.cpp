// cp.async. Every thread issues copies, commits them as groups and waits for its own groups.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {

namespace {

constexpr uint32_t kBytes = 16;

void complete(AsyncCopy& copy) {
  if (copy.done) return;
  if (copy.from_bytes > 0) std::memcpy(arena() + copy.to, copy.from, copy.from_bytes);
  std::memset(arena() + copy.to + copy.from_bytes, 0, kBytes - copy.from_bytes);
  copy.done = true;
}

}  // namespace

void cp_async(uint32_t to, const void* from, int from_bytes, const Where& where) {
  if (from_bytes < 0 || from_bytes > int(kBytes)) fail(where, "cp.async copies up to 16 bytes");
  if (from_bytes > 0) check_aligned(from, kBytes, where);
  unsigned char* destination = shared_pointer(to, kBytes, kBytes, where);
  begin_async_write(to, kBytes, where);
  std::memset(destination, 0xff, kBytes);
  AsyncCopy copy{to, from, uint32_t(from_bytes), false};
  if (completes_immediately()) complete(copy);
  running_thread()->uncommitted_copies.push_back(copy);
}

void cp_async_commit() {
  ThreadState& self = *running_thread();
  self.copy_groups.push_back(std::move(self.uncommitted_copies));
  self.uncommitted_copies.clear();
}

void cp_async_wait(int pending, const Where&) {
  auto& groups = running_thread()->copy_groups;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (AsyncCopy& copy : groups.front()) {
      complete(copy);
      end_async_write(copy.to, kBytes);
    }
}

}  // namespace simt
