// Shared memory of the running block, and global memory that ends where it ends.

#include <sys/mman.h>

#include <csignal>
#include <cstring>
#include <map>

#if defined(__x86_64__)
#include <ucontext.h>
#endif

#include "simt/block.h"

namespace simt {

// ---- shared: one arena, in which the arrays of a block lie apart from each other
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
                " bytes of shared memory are too many");
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

uint32_t address_of(const void* shared, const Where& where) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - arena();
  if (offset < 0 || offset > ptrdiff_t(kArenaBytes)) fail(where, "this is no address of shared memory");
  return uint32_t(offset);
}

unsigned char* at_address(uint32_t address, size_t bytes, size_t alignment, const Where& where) {
  if (address % alignment)
    fail(where, "shared address " + std::to_string(address) + " is not aligned to " +
                    std::to_string(alignment) + " bytes");
  Block& block = *running_block();
  const auto inside = [&](const SharedArray& array) {
    return address >= array.begin && address + bytes <= array.end;
  };
  if (block.last_used < block.shared.size() && inside(block.shared[block.last_used]))
    return arena() + address;
  for (block.last_used = 0; block.last_used < block.shared.size(); ++block.last_used)
    if (inside(block.shared[block.last_used])) return arena() + address;
  fail(where, "shared access out of bounds");
}

void check_aligned(const void* address, size_t bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail(where, "an access of " + std::to_string(bytes) + " bytes is not aligned to them");
}

// ---- global: guard pages on both sides
namespace {

constexpr size_t kPage = 4096, kGuard = 16 * kPage;

struct Buffer {
  char *mapping, *data;
  size_t mapped;
  std::string name;
};
std::map<void*, Buffer> buffers;

#if defined(__x86_64__)
const char* touched;

void report_touched() {
  for (const auto& [data, buffer] : buffers)
    if (touched >= buffer.mapping && touched < buffer.mapping + buffer.mapped)
      fail("access outside global buffer " + buffer.name + ", at byte " +
           std::to_string(touched - buffer.data));
  fail("access to memory of no buffer");
}

// Makes the thread that faulted go on in report_touched(): an error of that thread, not of the process.
void on_fault(int signal, siginfo_t* info, void* context) {
  if (!running_thread()) {
    std::signal(signal, SIG_DFL);
    return;
  }
  touched = static_cast<char*>(info->si_addr);
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15LL) - 8;  // below the red zone, as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report_touched);
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
void catch_faults() {}  // the process ends with the fault
#endif

}  // namespace

void* alloc_global(size_t bytes, const char* name) {
  if (buffers.empty()) catch_faults();
  const size_t size = (bytes + 15) / 16 * 16, body = (size + kPage - 1) / kPage * kPage;
  void* memory =
      mmap(nullptr, body + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("no memory for a global buffer");
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
