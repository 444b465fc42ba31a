// The plain build: kernels run as they are, and accesses are not looked at. Faster, with longer schedules.

#include "simt/block.h"

namespace simt {

void start_checks() {}
void publish(ThreadState&, Clock&) {}
void observe(ThreadState&, const Clock&) {}
void check_read(const ThreadState&, uint32_t, uint32_t, const Where&) {}
void check_write(const ThreadState&, uint32_t, uint32_t, const Where&) {}
void start_writing(uint32_t, uint32_t, const Where&) {}
void finish_writing(uint32_t, uint32_t) {}
void finish_writing(Agent&, uint32_t, uint32_t) {}
void start_reading(Agent&, uint32_t, const Clock&, uint32_t, uint32_t, const Where&) {}
void learn(Clock&, const Agent&, uint32_t) {}
void check_fenced(const Clock&, uint32_t, uint32_t, const Where&) {}
void fence_stores(ThreadState&) {}
void check_global(const void*, size_t, bool, const Where&) {}
void watch_blocks(const void*, size_t, const char*) {}
void forget_blocks() {}
bool checks_races() { return false; }

}  // namespace simt
