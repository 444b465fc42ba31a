// The shared memory of the running block, and global memory between guard pages.

#include <sys/mman.h>

#include <csignal>
#include <cstring>
#include <map>

#if defined(__x86_64__)
#include <ucontext.h>
#endif

#include "simt/block.h"

namespace simt {

// ---- shared memory: one arena, with gaps between the arrays of a block
unsigned char arena_bytes[kArenaBytes];

namespace {

uint32_t new_array(Block& block, const void* key, size_t bytes, uint32_t alignment) {
  constexpr uint32_t kGap = 64;
  const uint32_t last = block.shared.empty() ? 0 : block.shared.back().end;
  const uint32_t begin = (last + kGap + alignment - 1) / alignment * alignment;
  size_t total = bytes;
  for (const SharedArray& array : block.shared) total += array.end - array.begin;
  if (total > kSharedBytes || begin + bytes > kArenaBytes)
    throw Error(std::string(block.kernel) + ": " + std::to_string(total) +
                " bytes of shared memory exceed the limit");
  block.shared.push_back({key, begin, uint32_t(begin + bytes)});
  std::memset(arena() + begin, 0xff, bytes);
  return begin;
}

}  // namespace

void* shared_array(const void* key, size_t bytes) {
  Block& block = *running_block();
  for (const SharedArray& array : block.shared)
    if (array.key == key) return arena() + array.begin;
  return arena() + new_array(block, key, bytes, 16);
}

void* dynamic_shared() { return arena() + running_block()->dynamic_begin; }

void make_dynamic_shared(Block& block, size_t bytes) {
  if (bytes > 0) block.dynamic_begin = new_array(block, nullptr, bytes, 1024);
}

uint32_t shared_address(const void* pointer, const Where& where) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - arena();
  if (offset < 0 || offset > ptrdiff_t(kArenaBytes)) fail(where, "not a pointer to shared memory");
  return uint32_t(offset);
}

unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const Where& where) {
  if (address % alignment)
    fail(where, "shared address " + std::to_string(address) + " is not aligned to " +
                    std::to_string(alignment) + " bytes");
  Block& block = *running_block();
  const auto inside = [&](const SharedArray& array) {
    return address >= array.begin && address + bytes <= array.end;
  };
  if (block.last_accessed < block.shared.size() && inside(block.shared[block.last_accessed]))
    return arena() + address;
  for (block.last_accessed = 0; block.last_accessed < block.shared.size(); ++block.last_accessed)
    if (inside(block.shared[block.last_accessed])) return arena() + address;
  fail(where, "shared access out of bounds");
}

void check_aligned(const void* address, size_t bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail(where, "an access of " + std::to_string(bytes) + " bytes is not aligned to its size");
}

// ---- global memory, with guard pages on both sides
namespace {

constexpr size_t kPage = 4096, kGuard = 16 * kPage;

struct Buffer {
  char *mapping, *data;
  size_t mapped;
  std::string name;
};
std::map<void*, Buffer> buffers;

#if defined(__x86_64__)
const char* fault_address;

void report_fault() {
  for (const auto& [data, buffer] : buffers)
    if (fault_address >= buffer.mapping && fault_address < buffer.mapping + buffer.mapped)
      fail("access outside global buffer " + buffer.name + ", at byte " +
           std::to_string(fault_address - buffer.data));
  fail("access outside of all global buffers");
}

// Makes the faulting thread continue in report_fault(), so that the launch fails instead of the process.
void on_fault(int signal, siginfo_t* info, void* context) {
  if (!running_thread()) {
    std::signal(signal, SIG_DFL);
    return;
  }
  fault_address = static_cast<char*>(info->si_addr);
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15LL) - 8;  // below the red zone, as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report_fault);
}

void catch_faults() {
  static char alternate_stack[65536];
  const stack_t stack{.ss_sp = alternate_stack, .ss_flags = 0, .ss_size = sizeof alternate_stack};
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
}
#else
void catch_faults() {}  // a fault terminates the process
#endif

}  // namespace

void* alloc_global(size_t bytes, const char* name) {
  if (buffers.empty()) catch_faults();
  const size_t size = (bytes + 15) / 16 * 16, body = (size + kPage - 1) / kPage * kPage;
  void* memory =
      mmap(nullptr, body + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("out of memory for a global buffer");
  char* mapping = static_cast<char*>(memory);
  mprotect(mapping + kGuard, body, PROT_READ | PROT_WRITE);
  char* data = mapping + kGuard + body - size;
  std::memset(data, 0xff, size);
  buffers[data] = {mapping, data, body + 2 * kGuard, name};
  return data;
}

void free_global(void* data) {
  const auto found = buffers.find(data);
  if (found == buffers.end()) return;
  munmap(found->second.mapping, found->second.mapped);
  buffers.erase(found);
}

}  // namespace simt
