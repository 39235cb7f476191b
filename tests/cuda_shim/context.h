// Switching between fibers: by hand on x86-64 (5 ns), elsewhere through ucontext.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace stretto_shim {

#if defined(__x86_64__)
struct Context { void* stack_pointer = nullptr; };

// Saves what a function must keep on the old stack, and takes it from the new one.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*rdi: old*/, void* /*rsi: new*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void switch_context(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }
inline void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes);
  *--top = 0;  // the entry function starts with the alignment that a call would have left, and never returns
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  c.stack_pointer = top;
}
#else
struct Context { ucontext_t context; };
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}
#endif

}  // namespace stretto_shim
