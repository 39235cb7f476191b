#include "common/step.h"

#include <chrono>

namespace stretto {

static thread_local Step* recording_step = nullptr;
Step* Step::recording() { return recording_step; }
void Step::set_recording(Step* s) { recording_step = s; }

void Step::run(int threads) const {
  with_team(
      threads,
      [](void* self) {
        for (const Call& c : static_cast<const Step*>(self)->calls_) c.invoke(c.kernel, c.params.data());
      },
      const_cast<Step*>(this));
}

std::vector<std::pair<std::string, double>> Step::run_timed(int threads) const {
  struct Context {
    const Step* step;
    std::vector<std::pair<std::string, double>> times;
  } context{this, {}};
  context.times.reserve(calls_.size());
  with_team(
      threads,
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        for (const Call& call : c.step->calls_) {
          const auto start = std::chrono::steady_clock::now();
          call.invoke(call.kernel, call.params.data());
          c.times.emplace_back(call.name, std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
        }
      },
      &context);
  return std::move(context.times);
}

}  // namespace stretto
