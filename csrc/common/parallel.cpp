#include "common/parallel.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace stretto {
namespace {

// One piece of work that a team shares. Each thread first takes the tasks of its own share, one after the other, so that what it
// reads is one stream that the hardware prefetches; a thread that is through helps the others with theirs.
struct Job {
  static constexpr int kShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int shares = 1;
  Share share[kShares];
  std::exception_ptr error;
  std::mutex error_mutex;

  Job(void (*f)(void*, int64_t), void* c, int64_t count, int threads) : task(f), context(c), shares(threads < kShares ? threads : kShares) {
    for (int i = 0; i < shares; ++i) {
      share[i].next.store(count * i / shares, std::memory_order_relaxed);
      share[i].end = count * (i + 1) / shares;
    }
  }

  void work(int thread) {
    for (int i = 0; i < shares; ++i) {
      Share& s = share[(thread + i) % shares];
      while (s.next.load(std::memory_order_relaxed) < s.end) {
        const int64_t t = s.next.fetch_add(1, std::memory_order_relaxed);
        if (t >= s.end) break;
        try {
          task(context, t);
        } catch (...) {
          std::lock_guard lock(error_mutex);
          if (!error) error = std::current_exception();
        }
      }
    }
  }
};

// Helpers of with_team. `epoch` announces a job; every helper answers each epoch once through `arrived`, so that the job's memory
// may go out of scope when all have. Aligned apart: the two counters are written by different sides.
struct Team {
  int helpers;
  alignas(64) std::atomic<uint64_t> epoch{0};
  Job* job = nullptr;
  bool stop = false;
  alignas(64) std::atomic<int64_t> arrived{0};

  static void relax(int& spins) {
    // About 20 us of spinning before yielding: longer than any gap between two ops of a step, short enough not to hurt when the
    // machine is shared (a spinning thread would hold the core for a whole scheduler quantum).
    if (++spins < 2000) __builtin_ia32_pause();
    else sched_yield();
  }
  void help(int thread) {
    for (uint64_t seen = 0;;) {
      int spins = 0;
      while (epoch.load(std::memory_order_acquire) == seen) relax(spins);
      ++seen;
      if (stop) return;
      job->work(thread);
      arrived.fetch_add(1, std::memory_order_release);
    }
  }
  void run(Job& j) {
    job = &j;
    arrived.store(0, std::memory_order_relaxed);
    epoch.fetch_add(1, std::memory_order_release);
    j.work(0);
    int spins = 0;
    while (arrived.load(std::memory_order_acquire) != helpers) relax(spins);
  }
  void dismiss() {
    stop = true;
    epoch.fetch_add(1, std::memory_order_release);
  }
};

std::atomic<int> default_threads{0};
thread_local Team* current_team = nullptr;
thread_local bool inside_task = false;

// CPUs that a quota grants, rounded up; `huge` where there is none. "max" instead of a number fails to parse: no limit.
constexpr int huge = 1 << 20;
int quota_cpus(const std::string& quota_file, const std::string& period_file) {
  long long quota = 0, period = 0;
  if (FILE* f = std::fopen(quota_file.c_str(), "r")) {
    const int read = std::fscanf(f, "%lld %lld", &quota, &period);  // version 2 has both numbers in one file
    std::fclose(f);
    if (read == 1 && !period_file.empty()) {
      if (FILE* g = std::fopen(period_file.c_str(), "r")) {
        if (std::fscanf(g, "%lld", &period) != 1) period = 0;
        std::fclose(g);
      }
    }
  }
  return quota > 0 && period > 0 ? static_cast<int>(std::max<long long>(1, (quota + period - 1) / period)) : huge;
}

// The tightest quota on the way from the process's control group to the root, for both versions of the interface.
int cgroup_cpus() {
  int cpus =
      std::min(quota_cpus("/sys/fs/cgroup/cpu.max", ""), quota_cpus("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.rfind("0::/", 0) != 0) continue;
    for (std::string path = line.substr(3); path.size() > 1; path.resize(path.rfind('/')))
      cpus = std::min(cpus, quota_cpus("/sys/fs/cgroup" + path + "/cpu.max", ""));
  }
  return cpus;
}

// The threads of an OpenMP pool do not exist in a forked child, and a region there would wait for them for ever.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

struct InsideTask {  // nested parallel_for runs serially
  bool before = inside_task;
  InsideTask() { inside_task = true; }
  ~InsideTask() { inside_task = before; }
};

struct Scratch {
  void* ptr = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(ptr); }
};

}  // namespace

int available_cpus() {
  static const int cpus = [] {  // asked for at every parallel_for; files are read once
    cpu_set_t set;
    const int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return std::max(1, std::min(n, cgroup_cpus()));
  }();
  return cpus;
}

int num_threads() {
  if (current_team) return current_team->helpers + 1;
  if (forked.load(std::memory_order_relaxed)) return 1;
  if (const int n = default_threads.load(std::memory_order_relaxed)) return n;
  return std::max(1, std::min(available_cpus(), omp_get_max_threads()));
}

void set_num_threads(int n) {
  if (n < 1) throw std::invalid_argument("set_num_threads: n: " + std::to_string(n) + ", expected at least 1");
  default_threads.store(n, std::memory_order_relaxed);
}

void run_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
  if (count <= 0) return;
  if (count == 1 || inside_task || (!current_team && num_threads() == 1)) {
    InsideTask guard;
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  if (current_team) {
    InsideTask guard;
    Job job(task, context, count, current_team->helpers + 1);
    current_team->run(job);
    if (job.error) std::rethrow_exception(job.error);
  } else {
    // All threads, however few the tasks: libgomp ends the threads that a smaller region leaves over and starts them anew
    // for the next larger one, which costs far more than waking one that finds nothing to do.
    const int threads = num_threads();
    Job job(task, context, count, threads);
#pragma omp parallel num_threads(threads)
    {
      InsideTask guard;
      job.work(omp_get_thread_num());
    }
    if (job.error) std::rethrow_exception(job.error);
  }
}

void with_team(int n, void (*body)(void*), void* context) {
  if (n <= 1 || current_team || inside_task || forked.load(std::memory_order_relaxed)) {
    // One thread: parallel_for must not open a region of its own. A team of no helpers does just that.
    if (current_team || inside_task) return body(context);
    Team alone{0};
    current_team = &alone;
    struct Reset {
      ~Reset() { current_team = nullptr; }
    } reset;
    return body(context);
  }
  std::exception_ptr error;
  Team team{0};
#pragma omp parallel num_threads(n) shared(team, error)
  {
    // The runtime may give fewer threads than asked; the team is as large as the region really is.
#pragma omp single
    team.helpers = omp_get_num_threads() - 1;
    if (omp_get_thread_num() == 0) {  // the calling thread
      current_team = &team;
      try {
        body(context);
      } catch (...) { error = std::current_exception(); }
      current_team = nullptr;
      team.dismiss();
    } else {
      InsideTask guard;
      team.help(omp_get_thread_num());
    }
  }
  if (error) std::rethrow_exception(error);
}

void* thread_scratch(int slot, int64_t bytes) {
  static thread_local Scratch scratch[4];
  Scratch& s = scratch[slot];
  if (s.bytes < bytes) {
    std::free(s.ptr);
    s.bytes = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    s.ptr = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (!s.ptr) throw std::bad_alloc();
    s.bytes = rounded;
  }
  return s.ptr;
}

}  // namespace stretto
