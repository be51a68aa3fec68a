#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>

namespace emulator {

Schedule schedule;
Block block;
int current;

namespace {

Fiber scheduler;
char message[512];
void** arguments;
std::mt19937 generator;

void thread_main() {
  enter(arguments);
  give_way(State::done);
}

void report(const char* format, va_list values) {
  const int used = std::snprintf(message, sizeof message, "block (%d, %d): ", block.x, block.y);
  std::vsnprintf(message + used, sizeof message - used, format, values);
}

void stop(const char* format, ...) {  // as fail, but outside the threads
  va_list values;
  va_start(values, format);
  report(format, values);
  va_end(values);
}

void resume(int t) {
  current = t;
  scheduler.switch_to(block.threads[t].fiber);
}

// Threads in the order they get their turns; a group runs until none of it can go on.
std::vector<std::vector<int>> turns() {
  const int threads = static_cast<int>(block.threads.size());
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (!schedule.greedy) {
    std::shuffle(order.begin(), order.end(), generator);
    return {order};
  }
  std::vector<std::vector<int>> warps;
  for (int first = 0; first < threads; first += kLanes)
    warps.emplace_back(order.begin() + first, order.begin() + first + kLanes);
  std::shuffle(warps.begin(), warps.end(), generator);
  return warps;
}

bool run_until_barrier() {
  for (const auto& group : turns())
    for (bool ran = true; ran;) {
      ran = false;
      for (int t : group)
        if (block.threads[t].state == State::ready) {
          resume(t);
          if (message[0]) return false;
          ran = true;
        }
    }
  return true;
}

int count(State state) {
  return static_cast<int>(std::count_if(block.threads.begin(), block.threads.end(),
                                        [&](const Thread& thread) { return thread.state == state; }));
}

void run_block(char* stacks, int shared_bytes) {
  reset_shared(shared_bytes);
  block.epoch = 1;
  for (Warp& warp : block.warps) warp.arrived = 0;
  for (Thread& thread : block.threads) {
    thread.state = State::ready;
    thread.open.clear();
    thread.groups.clear();
    thread.fiber.prepare(stacks, thread_main);
    stacks += kStackBytes;
  }
  const int threads = static_cast<int>(block.threads.size());
  while (run_until_barrier()) {
    if (count(State::done) == threads) return;
    if (count(State::at_barrier) != threads)
      return stop("deadlock: of %d threads %d wait at the barrier, %d in a warp collective that others do not reach, "
                  "%d have returned", threads, count(State::at_barrier), count(State::in_warp), count(State::done));
    ++block.epoch;
    for (Thread& thread : block.threads) thread.state = State::ready;
  }
}

}  // namespace

void fail(const char* format, ...) {
  char located[256];
  std::snprintf(located, sizeof located, "thread %d %s", current, format);
  va_list values;
  va_start(values, format);
  report(located, values);
  va_end(values);
  give_way(State::done);
  __builtin_unreachable();
}

void give_way(State state) {
  Thread& thread = block.threads[current];
  thread.state = state;
  do thread.fiber.switch_to(scheduler);
  while (thread.state != State::ready);
}

}  // namespace emulator

int thread() { return emulator::current; }
int block_x() { return emulator::block.x; }
int block_y() { return emulator::block.y; }
void barrier() { emulator::give_way(emulator::State::at_barrier); }

// Run a grid, or its last block only. Returns null, or what went wrong first.
EXPORT const char* emulator_launch(int across, int down, int threads, int shared_bytes, int last_only,
                                   emulator::Schedule schedule, void** arguments) {
  using namespace emulator;
  emulator::schedule = schedule;
  emulator::arguments = arguments;
  generator.seed(schedule.seed);
  message[0] = 0;
  block.threads.resize(threads);
  block.warps.resize(threads / kLanes);
  reset_global();
  const std::unique_ptr<char[]> stacks(new char[threads * kStackBytes]);

  std::vector<int> order(last_only ? 1 : across * down);
  std::iota(order.begin(), order.end(), last_only ? across * down - 1 : 0);
  std::shuffle(order.begin(), order.end(), generator);
  for (int index : order) {
    block.index = index;
    block.x = index % across;
    block.y = index / across;
    run_block(stacks.get(), shared_bytes);
    if (message[0]) return message;
  }
  return nullptr;
}
