// Copies to shared memory in the background, which a thread issues, groups and waits for by itself.

#include <cstring>

#include "simt/block.h"
#include "simt/instructions.h"

namespace simt {

void cp_async(uint32_t to, const void* from, int source_bytes, const Where& where) {
  constexpr uint32_t kBytes = 16;
  if (source_bytes < 0 || source_bytes > int(kBytes)) fail(where, "cp.async copies up to 16 bytes");
  if (source_bytes > 0) check_aligned(from, kBytes, where);
  unsigned char* data = at_address(to, kBytes, kBytes, where);
  start_writing(to, kBytes, where);
  std::memset(data, 0xff, kBytes);
  const auto copy = [=] {
    if (source_bytes > 0) std::memcpy(data, from, source_bytes);
    std::memset(data + source_bytes, 0, kBytes - source_bytes);
  };
  auto& open = running_thread()->open_copies;
  if (!takes_effect_at_once()) return open.push_back({to, kBytes, copy});
  copy();
  open.push_back({to, kBytes, {}});
}

void cp_async_commit() {
  ThreadState& self = *running_thread();
  self.committed_copies.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void cp_async_wait(int pending, const Where&) {
  auto& groups = running_thread()->committed_copies;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (const AsyncCopy& copy : groups.front()) {
      if (copy.finish) copy.finish();
      finish_writing(copy.begin, copy.bytes);
    }
}

}  // namespace simt
