#include "fiber.h"

namespace emulator {

#if EMULATOR_SWITCH

// The System V calling convention keeps these six registers and the stack pointer; all else belongs to the caller.
extern "C" void emulator_switch(void** save_stack_pointer, void* next_stack_pointer);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void Fiber::prepare(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);  // a function starts 8 bytes off a multiple of 16
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& next) { emulator_switch(&stack_pointer_, next.stack_pointer_); }

#else

void Fiber::prepare(char* stack, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& next) { swapcontext(&context_, &next.context_); }

#endif

}  // namespace emulator
