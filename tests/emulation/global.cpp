// Global memory: every access must be aligned, stay inside the buffer that its pointer came from, and respect who owns
// what. A word has one writer in a launch, and what is read as input is written by nobody: no order of blocks matters.
#include <sys/mman.h>

#include <cstdint>
#include <memory>

#include "block.h"
#include "device.h"

namespace emulator {
namespace {

struct Buffer {
  const char* begin;
  std::size_t bytes;
  bool writable;
  std::shared_ptr<i64[]> owners;  // of each 2-byte word: 1 + block and thread that wrote it; 0: nobody
};

std::vector<Buffer> buffers;

Buffer& find(const char* action, const void* base, const void* at, std::size_t bytes, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(at) % alignment) fail("%s global memory at a misaligned address", action);
  for (Buffer& buffer : buffers) {
    const std::ptrdiff_t start = static_cast<const char*>(base) - buffer.begin;
    const std::ptrdiff_t offset = static_cast<const char*>(at) - buffer.begin;
    const std::ptrdiff_t size = buffer.bytes;
    if (start < 0 || start >= size) continue;
    if (offset >= 0 && offset + static_cast<std::ptrdiff_t>(bytes) <= size) return buffer;
    fail("%s %zu bytes at byte %td of a buffer of %td", action, bytes, offset, size);
  }
  fail("%s through a pointer that the host did not pass", action);
}

// Zeros that take memory where they are written: buffers may be larger than this machine's memory.
std::shared_ptr<i64[]> sparse_zeros(std::size_t count) {
  const std::size_t bytes = count * sizeof(i64);
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  return {static_cast<i64*>(at), [bytes](i64* zeros) { munmap(zeros, bytes); }};
}

}  // namespace

void reset_global() {
  for (Buffer& buffer : buffers)
    if (buffer.writable) buffer.owners = sparse_zeros(buffer.bytes / 2 + 1);
}

void check_read(const void* base, const void* at, std::size_t bytes, std::size_t alignment) {
  if (find("reads", base, at, bytes, alignment).writable) fail("reads as input what the kernel may write");
}

void check_write(const void* base, const void* at, std::size_t bytes, std::size_t alignment) {
  Buffer& buffer = find("writes", base, at, bytes, alignment);
  if (!buffer.writable) fail("writes to an input");
  const i64 self = 1 + block.index * static_cast<i64>(block.threads.size()) + current;
  const std::size_t first = (static_cast<const char*>(at) - buffer.begin) / 2;
  for (std::size_t i = first; i < first + bytes / 2; ++i) {
    if (buffer.owners[i] != 0 && buffer.owners[i] != self) fail("writes global memory that another thread wrote too");
    buffer.owners[i] = self;
  }
}

}  // namespace emulator

EXPORT void emulator_buffer(const void* at, std::size_t bytes, int writable) {
  emulator::buffers.push_back({static_cast<const char*>(at), bytes, writable != 0, {}});
}

EXPORT void emulator_forget_buffers() { emulator::buffers.clear(); }
