// A persistent team of workers: the caller is worker 0. Members spin briefly, then yield, then sleep.
#pragma once

class Team {
 public:
  using Job = void (*)(void* context, int worker);

  explicit Team(int workers);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int workers() const { return workers_; }

  // Run job(context, i) on every worker i; returns when all are done.
  void run(Job job, void* context);

 private:
  struct Members;
  const int workers_;
  Members* members_;
};

void yield_core();
double seconds_now();

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  yield_core();
#endif
}

constexpr int SPIN_POLLS = 600;  // about 20 us: longer than any join, shorter than a time slice
#ifndef OL_WAIT_SECONDS
#define OL_WAIT_SECONDS 60.0  // a join that takes this long is a fault, not a delay
#endif

// Calls done() until it is true or `give_up` is; false: gave up or the deadline passed.
template <class Done, class GiveUp>
bool poll(Done done, GiveUp give_up) {
  for (int i = 0; i < SPIN_POLLS; ++i) {
    if (done()) return true;
    cpu_relax();
  }
  const double deadline = seconds_now() + OL_WAIT_SECONDS;
  for (;;) {
    if (done()) return true;
    if (give_up() || seconds_now() > deadline) return false;
    yield_core();
  }
}
