// Copies to shared memory in the background, which a thread issues, groups and waits for by itself.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {

namespace {

constexpr uint32_t kBytes = 16;

void finish(AsyncCopy& copy) {
  if (copy.done) return;
  if (copy.from_bytes > 0) std::memcpy(arena() + copy.to, copy.from, copy.from_bytes);
  std::memset(arena() + copy.to + copy.from_bytes, 0, kBytes - copy.from_bytes);
  copy.done = true;
}

}  // namespace

void cp_async(uint32_t to, const void* from, int from_bytes, const Where& where) {
  if (from_bytes < 0 || from_bytes > int(kBytes)) fail(where, "cp.async copies up to 16 bytes");
  if (from_bytes > 0) check_aligned(from, kBytes, where);
  unsigned char* bytes = at_address(to, kBytes, kBytes, where);
  start_writing(to, kBytes, where);
  std::memset(bytes, 0xff, kBytes);
  AsyncCopy copy{to, from, uint32_t(from_bytes), false};
  if (takes_effect_at_once()) finish(copy);
  running_thread()->open_copies.push_back(copy);
}

void cp_async_commit() {
  ThreadState& self = *running_thread();
  self.committed_copies.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void cp_async_wait(int pending, const Where&) {
  auto& groups = running_thread()->committed_copies;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (AsyncCopy& copy : groups.front()) {
      finish(copy);
      finish_writing(copy.to, kBytes);
    }
}

}  // namespace simt
