// One thread block in flight. Blocks run one after another, in random order; the threads of a block are fibers that
// give way at barriers and warp collectives only, in the order that the schedule picks.
#pragma once
#include <deque>
#include <vector>

#include "fiber.h"

#define EXPORT extern "C" __attribute__((visibility("default")))  // for ctypes

namespace emulator {

constexpr int kLanes = 32;

struct Schedule {
  bool greedy;  // a random warp runs as far as it can before the next one starts; else all threads take turns
  bool early;   // asynchronous copies land when they are issued; else as late as the waits allow
  bool races;   // judge shared memory by happens-before; else let the values show
  unsigned seed;
};

struct Copy {
  char* to;
  const char* from;  // null: zeros
};

enum class State { ready, at_barrier, in_warp, done };

struct Thread {
  Fiber fiber;
  State state;
  std::vector<Copy> open;                // copies issued since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  const char* operation;
  int argument;
  int arrived;
  void* operands[kLanes];
};

struct Block {
  int x, y, index;
  unsigned epoch;  // counts barriers, from 1
  std::vector<Thread> threads;
  std::vector<Warp> warps;
};

extern Schedule schedule;
extern Block block;
extern int current;  // the running thread

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void give_way(State state);  // until somebody makes this thread ready again

void reset_shared(int bytes);  // shared.cpp: at the start of every block
void reset_global();           // global.cpp: at the start of every launch

void enter(void** arguments);  // kernel_entry.cpp: call the kernel
extern const bool fp16;        // what the kernel's 16-bit elements are; else bf16

}  // namespace emulator
