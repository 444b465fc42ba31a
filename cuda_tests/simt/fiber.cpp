#include "simt/fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <new>
#endif

namespace simt {

#if defined(__x86_64__)

// Takes nanoseconds, whereas swapcontext() makes two system calls. Saves the callee-saved registers of the
// System V ABI, except the floating-point control words, which are the same in all fibers.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");

void start(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
  *--top = 0;  // aligns the stack as after a call
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the saved registers
  fiber.suspended = top;
}

void switch_fiber(Fiber& from, const Fiber& to) { simt_switch_stack(&from.suspended, to.suspended); }

#else

void start(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  auto* context = new (stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.suspended = context;
}

void switch_fiber(Fiber& from, const Fiber& to) {
  ucontext_t here;
  from.suspended = &here;
  swapcontext(&here, static_cast<const ucontext_t*>(to.suspended));
}

#endif

}  // namespace simt
