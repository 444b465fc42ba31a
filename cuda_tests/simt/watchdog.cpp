// Livelock detection. A thread that spins on memory never lets the thread it waits for run, because fibers
// switch only in the emulator's own waits. A timer ends such a launch and names the thread.

#include "simt/block.h"

#if defined(__x86_64__)
#include <pthread.h>
#include <sys/time.h>
#include <ucontext.h>

#include <csignal>
#endif

namespace simt {

#if defined(__x86_64__)
namespace {

constexpr int kTicks = 4;  // per timeout

pthread_t launching;
uint64_t last_progress;
int ticks;
struct sigaction previous;

[[noreturn]] void report() {
  fail("livelock: the thread or its warp spins on something that no other thread can do in the meantime");
}

// Makes the running thread continue in report().
void on_tick(int signal, siginfo_t*, void* context) {
  if (!pthread_equal(pthread_self(), launching)) {  // delivered to another thread of the process
    pthread_kill(launching, signal);
    return;
  }
  if (running.progress != last_progress || !running.thread) ticks = 0;
  last_progress = running.progress;
  if (++ticks <= kTicks) return;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15LL) - 8;  // below the red zone, as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
}

void set_timer(double seconds) {
  const auto microseconds = int64_t(seconds * 1e6);
  const timeval interval{microseconds / 1000000, microseconds % 1000000};
  const itimerval timer{interval, interval};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

}  // namespace

Watchdog::Watchdog(double timeout) {
  launching = pthread_self();
  ticks = 0;
  struct sigaction action{};
  action.sa_sigaction = on_tick;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(SIGVTALRM, &action, &previous);
  set_timer(timeout / kTicks);
}

Watchdog::~Watchdog() {
  set_timer(0);
  sigaction(SIGVTALRM, &previous, nullptr);
}

#else

Watchdog::Watchdog(double) {}
Watchdog::~Watchdog() {}

#endif

}  // namespace simt
