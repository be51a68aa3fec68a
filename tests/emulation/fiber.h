// A call stack of its own for each emulated thread, switched by hand: a few nanoseconds on x86-64, and the C library's
// slower contexts elsewhere.
#pragma once
#include <cstddef>

#if defined(__x86_64__) && !defined(PORTABLE)
#define EMULATOR_SWITCH 1
#endif
#if !EMULATOR_SWITCH
#include <ucontext.h>
#endif

namespace emulator {

constexpr std::size_t kStackBytes = 64 * 1024;

class Fiber {
 public:
  void prepare(char* stack, void (*entry)());  // entry never returns
  void switch_to(Fiber& next);

 private:
#if EMULATOR_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulator
