// Switching between the stacks of fibers. On x86-64 six registers are saved by hand: swapcontext makes a system call
// to save the signal mask, which a barrier of 256 threads would pay 512 times.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace lgk::simt {

#if defined(__x86_64__)

using Context = void*;  // the stack pointer, under which the registers lie

__attribute__((naked, noinline)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

// The first switch to `context` calls `enter`, which never returns, on the given stack.
inline void make_context(Context* context, char* stack, size_t bytes, void (*enter)()) {
  uintptr_t* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = 0;  // where enter's return address would lie
  *--top = reinterpret_cast<uintptr_t>(enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  *context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, char* stack, size_t bytes, void (*enter)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, enter, 0);
}

#endif

}  // namespace lgk::simt
