// Race detection for the checked build, which instruments every memory access of a kernel.
//
// Kernels are compiled with -fsanitize=thread but linked without its runtime: the callbacks that the compiler
// inserts before each access are defined at the end of this file. An access to shared memory must lie within
// an array, must not read uninitialised bytes, and must happen after all conflicting accesses by virtue of
// barriers and waits, whatever order the threads ran in. Between blocks nothing is ordered.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "simt/block.h"

namespace simt {
namespace {

// The origin of an access: a return address for ordinary accesses, a source line for instructions.
struct Site {
  const void* code = nullptr;
  const Where* where = nullptr;
};
struct Access {
  uint32_t thread = 0, time = 0;  // or an agent; time 0: no access
  const void* code = nullptr;     // null for instructions
  Where where{};
};
struct Shadow {  // of two bytes
  Access write{};
  std::vector<Access> reads;         // since the write, none of them ordered before another
  bool async_write_pending = false;  // issued by `write`
  bool generic_write = false;        // by a thread: invisible to the async proxy without a proxy fence
};
std::vector<Shadow> shadow;

// file:line of the instruction before `code`, innermost inlined function first.
std::string code_text(const void* code) {
  Dl_info module{};
  if (!dladdr(code, &module)) return "an unknown line";
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname,
                size_t(static_cast<const char*>(code) - static_cast<char*>(module.dli_fbase)) - 1);
  std::string text;
  if (FILE* lines = popen(command, "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, lines)) {
      std::string name(line);
      name = name.substr(name.rfind('/') + 1);
      text += (text.empty() ? "" : " < ") + name.substr(0, name.find_first_of(" \n"));
    }
    pclose(lines);
  }
  return text;
}

std::string site_text(const Site& site) { return site.where ? line_text(*site.where) : code_text(site.code); }

[[noreturn]] void report(const std::string& what, const Site& site) { fail(what + " at " + site_text(site)); }

[[noreturn]] void report_race(const char* what, const Site& site, const Access& other) {
  const std::string line = other.code ? code_text(other.code) : line_text(other.where);
  const bool is_thread = other.thread < running_block()->threads.size();
  report(std::string("race: ") + what + " by " +
             (is_thread ? "thread " + std::to_string(other.thread) : "an asynchronous instruction issued") +
             " at " + line + ",",
         site);
}

uint32_t index_of(AsyncAgent& agent) {
  if (agent.index == 0)
    agent.index = uint32_t(running_block()->threads.size()) + running_block()->async_agents++;
  return agent.index;
}

bool happens_before(const Access& access, const Clock& clock) {
  return access.time == 0 || (access.thread < clock.size() && access.time <= clock[access.thread]);
}

// Checks and records access `now`, which happens after everything in `clock`.
void check_shared(const Access& now, const Clock& clock, uint32_t begin, uint32_t end, bool write,
                  const Site& site) {
  bool inside = false;
  for (const SharedArray& array : running_block()->shared) inside |= begin >= array.begin && end <= array.end;
  if (!inside) report(write ? "shared write out of bounds" : "shared read out of bounds", site);
  if (shadow.size() <= (end - 1) / 2) shadow.resize((end - 1) / 2 + 1);
  for (uint32_t i = begin / 2; i <= (end - 1) / 2; ++i) {
    auto& [last_write, reads, async_write_pending, generic_write] = shadow[i];
    if (async_write_pending)
      report_race("an asynchronous copy is still writing this, issued", site, last_write);
    if (!write && last_write.time == 0) report("read of uninitialised shared memory", site);
    if (!happens_before(last_write, clock))
      report_race(write ? "write not ordered after a write" : "read not ordered after a write", site,
                  last_write);
    if (write) {
      for (const Access& read : reads)
        if (!happens_before(read, clock)) report_race("write not ordered after a read", site, read);
      last_write = now;
      generic_write = true;
      reads.clear();
    } else {
      // Earlier reads that happen before this one need not be kept: whatever is ordered after this read is
      // ordered after them too.
      std::erase_if(reads, [&](const Access& read) {
        return read.thread == now.thread || happens_before(read, clock);
      });
      reads.push_back(now);
    }
  }
}

void check_shared(const ThreadState& self, uint32_t begin, uint32_t end, bool write, const Site& site) {
  const Access now{self.id.index, self.clock[self.id.index], site.code, site.where ? *site.where : Where{}};
  check_shared(now, self.clock, begin, end, write, site);
}

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

struct WatchedBuffer {
  uintptr_t end;
  std::string name;
  std::vector<uint32_t> reader, writer;  // index of the block + 1 for each 16-bit element; 0: none
};
std::map<uintptr_t, WatchedBuffer> watched;
uintptr_t watched_begin = UINTPTR_MAX, watched_end = 0;  // a fast path: most accesses are to the stack

void check_blocks(uintptr_t begin, uintptr_t end, bool write, const Site& site) {
  if (begin < watched_begin || begin >= watched_end) return;
  auto found = watched.upper_bound(begin);
  if (found == watched.begin()) return;
  auto& [start, buffer] = *--found;
  if (begin >= buffer.end) return;
  const uint32_t self = running_block()->index + 1;
  for (size_t i = (begin - start) / 2; i <= (end - 1 - start) / 2 && i < buffer.writer.size(); ++i) {
    uint32_t &reader = buffer.reader[i], &writer = buffer.writer[i];
    if (writer && writer != self)
      report(write ? "two blocks write one element of " + buffer.name
                   : "a block reads what another block writes in " + buffer.name,
             site);
    if (write && reader && reader != self)
      report("a block writes what another block reads in " + buffer.name, site);
    (write ? writer : reader) = self;
  }
}

void check(const void* address, size_t bytes, bool write, const void* code) {
  if (!running_thread()) return;  // host code of the same file
  const auto begin = reinterpret_cast<uintptr_t>(address), base = reinterpret_cast<uintptr_t>(arena());
  if (begin - base < kArenaBytes)
    check_shared(*running_thread(), uint32_t(begin - base), uint32_t(begin - base + bytes), write, {code});
  else
    check_blocks(begin, begin + bytes, write, {code});
}

}  // namespace

void begin_block_checks() {
  shadow.clear();
  for (ThreadState& thread : running_block()->threads) {
    thread.clock.assign(running_block()->threads.size(), 0);
    thread.clock[thread.id.index] = 1;
  }
}

void release(ThreadState& thread, Clock& clock) {
  join(clock, thread.clock);
  ++thread.clock[thread.id.index];
}

void acquire(ThreadState& thread, const Clock& clock) { join(thread.clock, clock); }

void acquire(Clock& clock, const AsyncAgent& agent, uint32_t time) {
  if (agent.index == 0) return;
  if (clock.size() <= agent.index) clock.resize(agent.index + 1);
  clock[agent.index] = std::max(clock[agent.index], time);
}

void check_read(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where) {
  check_shared(thread, address, address + bytes, false, {nullptr, &where});
}

void check_write(const ThreadState& thread, uint32_t address, uint32_t bytes, const Where& where) {
  check_shared(thread, address, address + bytes, true, {nullptr, &where});
}

void begin_async_write(uint32_t address, uint32_t bytes, const Where& where) {
  check_write(*running_thread(), address, bytes, where);
  for (uint32_t i = address / 2; i < (address + bytes) / 2; ++i) shadow[i].async_write_pending = true;
}

void end_async_write(uint32_t address, uint32_t bytes) {
  const ThreadState& self = *running_thread();
  for (uint32_t i = address / 2; i < (address + bytes) / 2; ++i) {
    shadow[i].async_write_pending = false;
    shadow[i].write.time = self.clock[self.id.index];
  }
}

void end_async_write(AsyncAgent& agent, uint32_t address, uint32_t bytes) {
  const uint32_t index = index_of(agent);
  ++agent.time;
  for (uint32_t i = address / 2; i < (address + bytes) / 2; ++i) {
    shadow[i].async_write_pending = shadow[i].generic_write = false;
    shadow[i].write.thread = index;
    shadow[i].write.time = agent.time;
  }
}

void begin_async_read(AsyncAgent& agent, uint32_t time, const Clock& clock, uint32_t address, uint32_t bytes,
                      const Where& where) {
  check_shared({index_of(agent), time, nullptr, where}, clock, address, address + bytes, false,
               {nullptr, &where});
}

void record_proxy_fence(ThreadState& thread) {
  thread.proxy_fences.push_back(thread.clock[thread.id.index]++);
}

void check_proxy_fence(const Clock& clock, uint32_t address, uint32_t bytes, const Where& where) {
  for (uint32_t i = address / 2; i < (address + bytes) / 2 && i < shadow.size(); ++i) {
    const Access& write = shadow[i].write;
    if (write.time == 0 || !shadow[i].generic_write) continue;
    const std::vector<uint32_t>& fences = running_block()->threads[write.thread].proxy_fences;
    const auto fence = std::lower_bound(fences.begin(), fences.end(), write.time);
    if (fence == fences.end() || !happens_before({write.thread, *fence}, clock))
      report_race("no fence_proxy_async between an asynchronous instruction and a store", {nullptr, &where},
                  write);
  }
}

void check_global_access(const void* begin, size_t bytes, bool write, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  check_blocks(address, address + bytes, write, {nullptr, &where});
}

void watch_blocks(const void* buffer, size_t bytes, const char* name) {
  const auto begin = reinterpret_cast<uintptr_t>(buffer);
  watched_begin = std::min(watched_begin, begin);
  watched_end = std::max(watched_end, begin + bytes);
  watched[begin] = {begin + bytes, name, std::vector<uint32_t>((bytes + 1) / 2),
                    std::vector<uint32_t>((bytes + 1) / 2)};
}

void forget_blocks() {
  watched.clear();
  watched_begin = UINTPTR_MAX, watched_end = 0;
}
bool checks_races() { return true; }

}  // namespace simt

// ---- the callbacks of -fsanitize=thread
#define SIMT_ACCESS(bytes)                                                                                   \
  extern "C" void __tsan_read##bytes(void* p) { simt::check(p, bytes, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_write##bytes(void* p) { simt::check(p, bytes, true, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                                    \
    simt::check(p, bytes, false, __builtin_return_address(0));                                               \
  }                                                                                                          \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                                   \
    simt::check(p, bytes, true, __builtin_return_address(0));                                                \
  }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  simt::check(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  simt::check(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
