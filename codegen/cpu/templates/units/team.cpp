// How team.h does it.
#include "team.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

constexpr int YIELD_POLLS = 2000;  // a member gives the core away so often between polls, before it sleeps

void yield_core() { std::this_thread::yield(); }

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Keep each member on a core of its own where the system allows it; the caller's thread is left alone.
static void pin(int worker) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed)) return;
  int left = worker % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && left-- == 0) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
#else
  (void)worker;
#endif
}

struct Team::Members {
  std::vector<std::thread> threads;
  Job job = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<uint32_t> go{0};
  alignas(64) std::atomic<int> done{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;

  explicit Members(int workers) {
    for (int i = 1; i < workers; ++i) threads.emplace_back([this, i] { work(i); });
  }

  void start() {
    {
      std::lock_guard<std::mutex> hold(mutex);  // a member checks the counter under it before it sleeps
      go.fetch_add(1, std::memory_order_release);
    }
    if (sleeping.load() > 0) wake.notify_all();
  }

  void work(int worker) {
    pin(worker);
    for (uint32_t seen = 0;; ++seen) {
      await(seen);
      if (stop.load()) return;
      job(context, worker);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  void await(uint32_t seen) {
    for (int i = 0; i < SPIN_POLLS; ++i) {
      if (go.load(std::memory_order_acquire) != seen) return;
      cpu_relax();
    }
    for (int i = 0; i < YIELD_POLLS; ++i) {
      if (go.load(std::memory_order_acquire) != seen) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> hold(mutex);
    sleeping.fetch_add(1);
    wake.wait(hold, [&] { return go.load(std::memory_order_acquire) != seen; });
    sleeping.fetch_sub(1);
  }
};

Team::Team(int workers) : workers_(workers), members_(new Members(workers)) {}

Team::~Team() {
  members_->stop.store(true);
  members_->start();
  for (auto& thread : members_->threads) thread.join();
  delete members_;
}

void Team::run(Job job, void* context) {
  Members& m = *members_;
  m.job = job;
  m.context = context;
  m.done.store(0, std::memory_order_relaxed);
  m.start();
  job(context, 0);
  while (m.done.load(std::memory_order_acquire) != workers_ - 1) {
    for (int i = 0; i < SPIN_POLLS && m.done.load(std::memory_order_acquire) != workers_ - 1; ++i) cpu_relax();
    if (m.done.load(std::memory_order_acquire) != workers_ - 1) std::this_thread::yield();
  }
}
