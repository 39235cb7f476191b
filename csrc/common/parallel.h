// parallel_for: independent tasks over a range. Which thread runs a task never changes what the task computes: the split into
// tasks depends on the range and the grain alone, and tasks share no sums.
//
// Threads come from torch's OpenMP runtime (one pool in the process). Inside with_team the helpers stay in one parallel region and
// wait for work by spinning briefly, which costs 0.2-0.4 us a parallel_for instead of 1-2 us for a region each.
#pragma once
#include <cstdint>

namespace stretto {

int num_threads();            // what the next parallel_for of this thread uses
void set_num_threads(int n);  // default of the process; n >= 1
int available_cpus();         // affinity mask and cgroup quota, at least 1

// Runs task(context, i) for i in [0, count). The first exception of a task is rethrown on the caller.
void run_tasks(int64_t count, void (*task)(void* context, int64_t i), void* context);

// Runs body(context) on this thread with n - 1 helpers waiting for its run_tasks calls.
void with_team(int n, void (*body)(void* context), void* context);

// f(i) for i in [begin, end), `grain` consecutive i to a task. A range of one task runs on the caller without any hand-over.
template <class F> void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct Context {
    int64_t begin, end, grain;
    const F* f;
  } context{begin, end, grain < 1 ? 1 : grain, &f};
  if (end <= begin) return;
  run_tasks((end - begin + context.grain - 1) / context.grain,
            [](void* c, int64_t i) {
              const Context& x = *static_cast<Context*>(c);
              const int64_t first = x.begin + i * x.grain, last = first + x.grain < x.end ? first + x.grain : x.end;
              for (int64_t j = first; j < last; ++j) (*x.f)(j);
            },
            &context);
}

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call with the same slot; grows and is reused.
// Slots 0 to 3, so that a caller's buffer and one of a function it calls do not collide.
void* thread_scratch(int slot, int64_t bytes);

}  // namespace stretto
