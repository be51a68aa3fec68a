// The block's shared memory: bounds, alignment, and for every 4-byte word who touched it last, so that two accesses
// without a barrier between them are found whatever the schedule was. An asynchronous copy is a write that lasts from
// its issue to the wait of the thread that issued it.
#include <cstdint>
#include <cstring>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

constexpr int kNobody = -1, kMany = -2;

struct Word {
  unsigned written = 0, read = 0;  // epoch of the last access; 0: none
  int writer = kNobody, reader = kNobody;
  int copier = kNobody;  // whose copy is on its way
};

struct alignas(128) Line {
  char bytes[128];
};

std::vector<Line> arena;
std::size_t arena_bytes;
std::vector<Word> words;

char* base() { return reinterpret_cast<char*>(arena.data()); }

// The first word of an access, after the checks of the access as such.
Word* locate(const void* at, std::size_t bytes, std::size_t alignment) {
  const std::ptrdiff_t offset = static_cast<const char*>(at) - base();
  if (offset < 0 || offset + bytes > arena_bytes)
    fail("touches shared memory at byte %td, of %zu", offset, arena_bytes);
  if (reinterpret_cast<std::uintptr_t>(at) % alignment) fail("touches shared memory at byte %td, misaligned", offset);
  return &words[offset / 4];
}

void mark_written(Word& word) {
  if (word.copier != kNobody) fail("overwrites shared memory that a copy of thread %d is still filling", word.copier);
  if (word.written == block.epoch && word.writer != current)
    fail("overwrites what thread %d wrote to shared memory since the last barrier", word.writer);
  if (word.read == block.epoch && word.reader != current)
    fail("overwrites shared memory that others read since the last barrier");
  word.written = block.epoch;
  word.writer = current;
}

void mark_read(Word& word) {
  if (word.copier != kNobody) fail("reads shared memory that a copy of thread %d is still filling", word.copier);
  if (word.written == 0) fail("reads shared memory that nobody wrote");
  if (word.written == block.epoch && word.writer != current)
    fail("reads what thread %d wrote to shared memory since the last barrier", word.writer);
  word.reader = word.read == block.epoch && word.reader != current ? kMany : current;
  word.read = block.epoch;
}

void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, sizeof(Chunk));
  else
    std::memset(copy.to, 0, sizeof(Chunk));
}

}  // namespace

void reset_shared(int bytes) {
  arena_bytes = bytes;
  arena.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
  if (bytes) std::memset(base(), 0xff, bytes);  // NaN as fp32, bf16 and fp16
  words.assign(bytes / 4, Word());
}

void* shared_at(int byte_offset) { return base() + byte_offset; }

void shared_read(const void* at, std::size_t bytes, std::size_t alignment) {
  Word* word = locate(at, bytes, alignment);
  for (std::size_t i = 0; schedule.races && i < bytes / 4; ++i) mark_read(word[i]);
}

void shared_write(const void* at, std::size_t bytes, std::size_t alignment) {
  Word* word = locate(at, bytes, alignment);
  for (std::size_t i = 0; schedule.races && i < bytes / 4; ++i) mark_written(word[i]);
}

void copy_to_shared(void* to, const void* from) {
  shared_write(to, sizeof(Chunk), sizeof(Chunk));
  Word* word = locate(to, sizeof(Chunk), sizeof(Chunk));
  for (std::size_t i = 0; schedule.races && i < sizeof(Chunk) / 4; ++i) word[i].copier = current;
  const Copy copy = {static_cast<char*>(to), static_cast<const char*>(from)};
  if (schedule.early) land(copy);
  block.threads[current].open.push_back(copy);
}

void commit() {
  Thread& own = block.threads[current];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait(int pending) {
  auto& groups = block.threads[current].groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      if (!schedule.early) land(copy);
      Word* word = locate(copy.to, sizeof(Chunk), sizeof(Chunk));
      for (std::size_t i = 0; schedule.races && i < sizeof(Chunk) / 4; ++i) {
        word[i].copier = kNobody;
        mark_written(word[i]);
      }
    }
}

}  // namespace emulator
