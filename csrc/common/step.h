// The step recorder. A model step is Python that calls ops; while a Step is being recorded, each op's kernel call is also noted
// with its parameters, and replaying the Step makes the same calls without Python. What changes from step to step (row count,
// positions, page tables, masks) is read by the kernels from small integer tensors, so one recording serves every step.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace stretto {

class Step {
 public:
  template <class P> void add(const char* name, void (*kernel)(const P&), const P& params) {
    static_assert(std::is_trivially_copyable_v<P>, "parameters are plain data: pointers, sizes, strides");
    Call call{name, [](void (*k)(), const void* p) { reinterpret_cast<void (*)(const P&)>(k)(*static_cast<const P*>(p)); },
              reinterpret_cast<void (*)()>(kernel), std::vector<uint64_t>((sizeof(P) + 7) / 8)};
    std::memcpy(call.params.data(), &params, sizeof(P));
    calls_.push_back(std::move(call));
  }
  void run(int threads) const;                                               // all calls in order
  std::vector<std::pair<std::string, double>> run_timed(int threads) const;  // (op, microseconds) for each call
  size_t size() const { return calls_.size(); }

  static Step* recording();  // the Step this thread records into, or nullptr
  static void set_recording(Step* s);

 private:
  struct Call {
    const char* name;  // a literal
    void (*invoke)(void (*)(), const void*);
    void (*kernel)();
    std::vector<uint64_t> params;  // a copy of the kernel's parameter struct
  };
  std::vector<Call> calls_;
};

}  // namespace stretto
