#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace stretto {
namespace {

Isa best_isa() {
  if (isa_available(Isa::avx512)) return Isa::avx512;
  return isa_available(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

Isa initial_isa() {
  const char* wish = std::getenv("STRETTO_ISA");
  if (!wish || !*wish) return best_isa();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wish, isa_name(isa)) != 0) continue;
    if (isa_available(isa)) return isa;
    throw std::runtime_error(std::string("STRETTO_ISA: ") + wish + ", but this machine does not have it (best: " + isa_name(best_isa()) + ")");
  }
  throw std::runtime_error(std::string("STRETTO_ISA: ") + wish + ", expected scalar, avx2 or avx512");
}

std::atomic<Isa>& isa_slot() {
  static std::atomic<Isa> slot{initial_isa()};
  return slot;
}

}  // namespace

bool isa_available(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
}

Isa active_isa() { return isa_slot().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (!isa_available(isa)) throw std::invalid_argument(std::string("set_isa: isa: ") + isa_name(isa) + ", not on this machine");
  isa_slot().store(isa, std::memory_order_relaxed);
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar"; }

}  // namespace stretto
