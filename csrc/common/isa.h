// Instruction sets. Every *_cpu.cpp is compiled once for each, in the namespace of that name; select_isa picks at run time.
#pragma once
namespace stretto {

enum class Isa { scalar, avx2, avx512 };  // avx2: with FMA, F16C, BMI2; avx512: F, BW, VL, DQ, VNNI

Isa active_isa();  // the best this machine has, or what STRETTO_ISA asks for (an ISA the machine lacks is refused at load)
bool isa_available(Isa isa);
void set_isa(Isa isa);  // tests only: kernels of all sets run in one process
const char* isa_name(Isa isa);

template <class Fn> Fn select_isa(Fn scalar, Fn avx2, Fn avx512) {
  const Isa isa = active_isa();
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : scalar;
}

// In OP.h: declares stretto::OP_cpu(const Params&), which forwards to the version for this machine.
// In OP_cpu.cpp: define `void OP(const Params&)` inside `namespace stretto::STRETTO_ISA`.
#define STRETTO_CPU_KERNEL(op, Params)                                                       \
  namespace scalar { void op(const Params& p); }                                             \
  namespace avx2 { void op(const Params& p); }                                               \
  namespace avx512 { void op(const Params& p); }                                             \
  inline void op##_cpu(const Params& p) { select_isa(scalar::op, avx2::op, avx512::op)(p); }

}  // namespace stretto
