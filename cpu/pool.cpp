#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// MLX's own ops between two of ours take some tens of microseconds; waking a sleeper costs about as much
constexpr auto SPIN = std::chrono::microseconds(50);
constexpr int MAX_TASKS = 1 << 20;

// One word holds the job's number, its task count and the next task, so that a helper that read the
// details of a job can't claim a task of the one after it: the claim is a compare and exchange on all three.
constexpr uint64_t word(uint64_t job, uint64_t tasks, uint64_t next) { return job << 40 | tasks << 20 | next; }
constexpr int tasks_of(uint64_t w) { return w >> 20 & (MAX_TASKS - 1); }
constexpr int next_of(uint64_t w) { return w & (MAX_TASKS - 1); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex one_job;
  std::atomic<uint64_t> ticket{0};
  std::atomic<void (*)(void*, int)> fn{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int> done{0};
  std::atomic<uint32_t> jobs{0};  // what sleepers wait on
  std::atomic<int> limit{1};      // threads in use
  std::atomic<bool> forked{false};
  int started = 1;  // threads there are, the caller included
  uint32_t job = 0;

  // Claims tasks until none is left.
  void work() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (next_of(seen) < tasks_of(seen)) {
      auto call = fn.load(std::memory_order_acquire);
      void* with = context.load(std::memory_order_acquire);
      if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      call(with, next_of(seen));
      done.fetch_add(1, std::memory_order_release);
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  void help(int index) {
    while (true) {
      uint32_t before = jobs.load(std::memory_order_acquire);
      if (index < limit.load(std::memory_order_relaxed)) {
        work();
        const auto until = std::chrono::steady_clock::now() + SPIN;
        while (jobs.load(std::memory_order_acquire) == before && std::chrono::steady_clock::now() < until)
          for (int i = 0; i < 16; ++i) relax();
      }
      jobs.wait(before, std::memory_order_acquire);
    }
  }

  void run(int tasks, void (*call)(void*, int), void* with) {
    done.store(0, std::memory_order_relaxed);
    fn.store(call, std::memory_order_release);
    context.store(with, std::memory_order_release);
    ticket.store(word(++job & 0xffffff, tasks, 0), std::memory_order_release);
    jobs.fetch_add(1, std::memory_order_release);
    jobs.notify_all();
    work();
    for (int spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins < 4096)
        relax();
      else
        std::this_thread::yield();  // a helper lost its core in the middle of a task
    }
  }
};

// Never destroyed: helpers may still be waiting in it when the process exits.
Pool& pool() {
  static Pool* one = [] {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forked = true; });
    return made;
  }();
  return *one;
}

}  // namespace

void parallel(int tasks, void (*fn)(void*, int), void* context) {
  Pool& p = pool();
  bool alone = tasks < 2 || tasks >= MAX_TASKS || p.forked || p.limit.load(std::memory_order_relaxed) < 2;
  if (!alone && p.one_job.try_lock()) {
    p.run(tasks, fn, context);
    p.one_job.unlock();
    return;
  }
  for (int task = 0; task < tasks; ++task) fn(context, task);
}

void set_threads(int count) {
  Pool& p = pool();
  std::lock_guard lock(p.one_job);
  if (count < 1) count = 1;
  try {
    for (; p.started < count; ++p.started)
      std::thread([&p, index = p.started] { p.help(index); }).detach();
  } catch (const std::system_error&) {
    count = p.started;  // the system gives no more threads: work with those there are
  }
  p.limit = count;
}

int threads() { return pool().limit; }
