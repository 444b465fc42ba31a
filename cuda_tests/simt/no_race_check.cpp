// The plain build, without race detection: faster, so tests run larger cases.

#include "simt/block.h"

namespace simt {

void begin_block_checks() {}
void release(ThreadState&, Clock&) {}
void acquire(ThreadState&, const Clock&) {}
void acquire(Clock&, const AsyncAgent&, uint32_t) {}
void check_read(const ThreadState&, uint32_t, uint32_t, const Where&) {}
void check_write(const ThreadState&, uint32_t, uint32_t, const Where&) {}
void begin_async_write(uint32_t, uint32_t, const Where&) {}
void end_async_write(uint32_t, uint32_t) {}
void end_async_write(AsyncAgent&, uint32_t, uint32_t) {}
void begin_async_read(AsyncAgent&, uint32_t, const Clock&, uint32_t, uint32_t, const Where&) {}
void check_proxy_fence(const Clock&, uint32_t, uint32_t, const Where&) {}
void record_proxy_fence(ThreadState&) {}
void check_global_access(const void*, size_t, bool, const Where&) {}
void watch_blocks(const void*, size_t, const char*) {}
void forget_blocks() {}
bool checks_races() { return false; }

}  // namespace simt
