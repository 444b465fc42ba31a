// A thread that spins until another one has done something never lets it run: only waits of the emulator
// change threads. A timer ends such a launch, naming the thread.

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

constexpr int kTicks = 4;  // in the time of patience

pthread_t launching;
uint64_t last_progress;
int ticks;
struct sigaction previous;

[[noreturn]] void report() {
  fail("livelock: it runs, or its warp does, for ever, waiting for what no other thread can do meanwhile");
}

// Makes the thread go on in report().
void on_tick(int signal, siginfo_t*, void* context) {
  if (!pthread_equal(pthread_self(), launching)) {  // whichever thread of the process the system has chosen
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

Watchdog::Watchdog(double seconds) {
  launching = pthread_self();
  ticks = 0;
  struct sigaction action{};
  action.sa_sigaction = on_tick;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigaction(SIGVTALRM, &action, &previous);
  set_timer(seconds / kTicks);
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
