#include "shim.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

#include "context.h"

namespace stretto_shim {

uint3 thread_index, block_index;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 128 << 10, kMaxShared = 227 << 10;  // shared memory: what a block of compute capability 9.0 may have
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float, -1 in every integer

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Memory that ends where access ends: one byte behind it faults.
struct Fenced {
  char* base;
  size_t bytes;  // without the fence
  explicit Fenced(size_t n) : bytes((n + page_size() - 1) / page_size() * page_size()) {
    void* p = mmap(nullptr, bytes + 2 * page_size(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("shim: no memory");
    base = static_cast<char*>(p) + page_size();
    mprotect(base, bytes, PROT_READ | PROT_WRITE);
  }
  char* end() const { return base + bytes; }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
  int group;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  unsigned id = 0;
  uint3 index{};
  bool done = false, waiting = false;
  const char* waits_in = nullptr;
  int waits_line = 0;
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Meeting {  // lanes of one warp on their way to a collective
  const char* what = nullptr;
  unsigned mask = 0, arrived = 0;
  void* slots[32] = {};
};

struct Warp {
  unsigned lanes = 0, done = 0;
  std::vector<Meeting> meetings;
};

struct Barrier {
  const char* what = nullptr;
  int line = 0, sum = 0, result = 0;
  unsigned arrived = 0;
};

struct Run {
  const char* kernel;
  void (*body)(const void*);
  const void* context;
  unsigned threads, done;
  char* shared;
  size_t shared_bytes;
  bool eager_copies;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::string error;
};

std::mutex lock;
int order = 0;  // of threads and blocks: 0 forward, 1 backward, else the seed of a shuffle
Run run;
Fiber* current = nullptr;
Context scheduler;

std::string name_of(uint3 i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; }
std::string place(const Fiber& f) { return std::string(f.waits_in) + " in line " + std::to_string(f.waits_line); }

void yield() { switch_context(current->context, scheduler); }

void wait_in(const char* what, int line) {
  current->waits_in = what;
  current->waits_line = line;
  current->waiting = true;
  yield();
}

// Threads that wait for one that has returned wait for ever; on a GPU they may, or may not.
void leave() {
  Fiber& f = *current;
  if (run.barrier.arrived)
    for (unsigned i = 0; i < run.threads; ++i)
      if (const Fiber& other = run.fibers[i]; other.waiting && other.waits_in == run.barrier.what)
        fail("returns while thread " + name_of(other.index) + " waits at " + place(other));
  Warp& warp = run.warps[f.id / 32];
  for (const Meeting& m : warp.meetings)
    if (m.mask >> f.id % 32 & 1) fail("returns while lanes of its warp wait for it in " + std::string(m.what));
  if (!f.copies.empty()) fail("returns before its cp.async copies were waited for");
  warp.done |= 1u << f.id % 32;
  f.done = true;
  ++run.done;
  yield();
}

void enter() {
  run.body(run.context);
  leave();
}

// A bad access inside a kernel becomes an error of the launch; any other goes where it went before.
struct sigaction outer_segv, outer_bus;
void on_fault(int signal, siginfo_t* info, void*) {
  if (!current) {
    sigaction(signal, signal == SIGSEGV ? &outer_segv : &outer_bus, nullptr);
    return;  // the access is made again, and handled there
  }
  const char* at = static_cast<const char*>(info->si_addr);
  const long past = at - run.shared;
  char text[160];
  if (at >= run.shared - static_cast<long>(page_size()) && at < run.shared + run.shared_bytes + page_size())
    snprintf(text, sizeof text, "accesses shared memory at byte %ld of %zu", past, run.shared_bytes);
  else snprintf(text, sizeof text, "accesses address %p, which is not its to use", static_cast<const void*>(at));
  fail(text);
}

class FaultHandler {
 public:
  FaultHandler() {
    static std::vector<char> memory(64 << 10);
    stack_t stack{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &before_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return: it switches to the scheduler
    sigaction(SIGSEGV, &action, &outer_segv);
    sigaction(SIGBUS, &action, &outer_bus);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &outer_segv, nullptr);
    sigaction(SIGBUS, &outer_bus, nullptr);
    sigaltstack(&before_, nullptr);
  }

 private:
  stack_t before_{};
};

void prepare_block(size_t smem_bytes) {
  static Fenced memory(kMaxShared);
  run.shared_bytes = (smem_bytes + 15) / 16 * 16;
  run.shared = memory.end() - run.shared_bytes;
  std::memset(memory.base, kPoison, memory.bytes);
  run.done = 0;
  run.barrier = {};
  run.warps.assign((run.threads + 31) / 32, {});
  if (run.fibers.size() < run.threads) run.fibers.resize(run.threads);
  for (unsigned i = 0; i < run.threads; ++i) {
    Fiber& f = run.fibers[i];
    if (!f.stack) f.stack = Fenced(kStack).base;
    f.id = i;
    f.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    f.done = f.waiting = false;
    f.copies.clear();
    f.copy_group = 0;
    make_context(f.context, f.stack, kStack, enter);
    run.warps[i / 32].lanes |= 1u << i % 32;
  }
}

void run_block(std::mt19937& random) {
  std::vector<unsigned> turns(run.threads);
  for (unsigned i = 0; i < run.threads; ++i) turns[i] = order == 1 ? run.threads - 1 - i : i;
  while (run.done < run.threads) {
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false;
    for (unsigned i : turns) {
      Fiber& f = run.fibers[i];
      if (f.done || f.waiting) continue;
      progress = true;
      current = &f;
      thread_index = f.index;
      switch_context(scheduler, f.context);
      current = nullptr;
      if (!run.error.empty()) return;
    }
    if (progress) continue;
    run.error = "all threads wait";
    const Fiber* first = nullptr;
    for (unsigned i = 0; i < run.threads; ++i) {
      const Fiber& f = run.fibers[i];
      if (f.done || (first && f.waits_line == first->waits_line && f.waits_in == first->waits_in)) continue;
      run.error += std::string(first ? ", thread " : ": thread ") + name_of(f.index) + " at " + place(f);
      if (first) return;
      first = &f;
    }
    return;
  }
}

}  // namespace

void fail(const std::string& problem) {
  run.error = "thread " + name_of(current->index) + " " + problem;
  current->done = true;
  yield();
  std::abort();  // not reached: a failed launch never resumes
}

void launch_threads(const char* kernel, dim3 grid, dim3 block, size_t smem_bytes, void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> guard(lock);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::string name = kernel;  // "... launch_kernel(...) [with auto kKernel = NAME<...>; Args = ...]"
  if (const size_t at = name.find("kKernel = "); at != std::string::npos) name = name.substr(at + 10, name.find("; Args", at) - at - 10);
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(name + ": grid or block out of range");
  if (smem_bytes > kMaxShared)
    throw std::runtime_error(name + ": " + std::to_string(smem_bytes) + " bytes of shared memory, at most " + std::to_string(kMaxShared));
  const FaultHandler handler;
  run.kernel = kernel;
  run.body = body;
  run.context = context;
  run.threads = static_cast<unsigned>(threads);
  run.eager_copies = order % 2 == 1;
  run.error.clear();
  grid_dim = grid;
  block_dim = block;
  std::mt19937 random(static_cast<unsigned>(order));
  std::vector<uint64_t> turns(blocks);
  for (uint64_t i = 0; i < blocks; ++i) turns[i] = order == 1 ? blocks - 1 - i : i;
  if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
  for (uint64_t i : turns) {
    block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    prepare_block(smem_bytes);
    run_block(random);
    if (!run.error.empty()) throw std::runtime_error(name + ": block " + name_of(block_index) + ": " + run.error);
  }
}

void* shared_memory() { return run.shared; }

bool in_shared_memory(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  return at >= run.shared && at + bytes <= run.shared + run.shared_bytes;
}

int barrier(const char* what, int value, int line) {
  Barrier& b = run.barrier;
  if (run.done) fail(std::string("waits at ") + what + " in line " + std::to_string(line) + ", where a thread of the block has returned");
  if (b.arrived && (b.what != what || b.line != line))
    fail(std::string("meets ") + what + " in line " + std::to_string(line) + ", others " + b.what + " in line " + std::to_string(b.line));
  if (!b.arrived) b.what = what, b.line = line, b.sum = 0;
  b.sum += value;
  if (++b.arrived < run.threads) {
    wait_in(what, line);
    return run.barrier.result;  // the next barrier ends only when this thread has come to it
  }
  b.arrived = 0;
  b.result = b.sum;
  for (unsigned i = 0; i < run.threads; ++i) run.fibers[i].waiting = false;
  return b.result;
}

void warp_meet(const char* what, unsigned mask, void* slot, void (*finish)(unsigned, void* const*), int line) {
  Fiber& f = *current;
  Warp& warp = run.warps[f.id / 32];
  const unsigned bit = 1u << f.id % 32;
  const std::string here = std::string(what) + " in line " + std::to_string(line);
  if (!(mask & bit)) fail("calls " + here + " with a mask without its own lane");
  mask &= warp.lanes;  // a block's last warp may be short: the hardware takes absent lanes as absent
  if (mask & warp.done) fail("calls " + here + " with a mask that names a lane which has returned");
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.mask == mask && std::strcmp(m.what, what) == 0) meeting = &m;
    else if (m.mask & mask) fail("calls " + here + ", other lanes of its mask wait in " + m.what);
  }
  if (!meeting) meeting = &warp.meetings.emplace_back(Meeting{what, mask, 0, {}});
  meeting->arrived |= bit;
  meeting->slots[f.id % 32] = slot;
  if (meeting->arrived != mask) return wait_in(what, line);
  const Meeting full = *meeting;
  warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
  finish(mask, full.slots);
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) run.fibers[f.id / 32 * 32 + lane].waiting = false;
}

static void perform(const Copy& c) {
  std::memcpy(c.to, c.from, c.bytes);
  std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  if (!in_shared_memory(to, bytes + zeros)) fail("cp.async writes outside shared memory");
  if (reinterpret_cast<uintptr_t>(to) % (bytes + zeros) || (bytes && reinterpret_cast<uintptr_t>(from) % (bytes + zeros)))
    fail("cp.async of " + std::to_string(bytes + zeros) + " bytes, not aligned to that");
  const Copy copy{to, from, bytes, zeros, current->copy_group};
  if (run.eager_copies) perform(copy);
  current->copies.push_back(copy);
}

void copy_commit() { ++current->copy_group; }

void copy_wait(int groups_left) {
  std::vector<Copy>& copies = current->copies;
  const auto ready = [&](const Copy& c) { return c.group < current->copy_group - groups_left; };
  for (const Copy& c : copies)
    if (ready(c) && !run.eager_copies) perform(c);
  std::erase_if(copies, ready);
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + float(mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (a >= 65520.f) return sign | 0x7c00;
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | int(std::nearbyint(a * 0x1p24f)));
  int exponent;
  const float mantissa = std::frexp(a, &exponent);  // in [0.5, 1)
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + int(std::nearbyint(mantissa * 2048.f))));
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace stretto_shim

// Tests choose the order in which threads and blocks run, from the next launch on.
extern "C" __attribute__((visibility("default"))) void stretto_shim_set_order(int order) { stretto_shim::order = order; }
