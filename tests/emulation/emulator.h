// Stands in for the GPU half of kernels/cuda/device.h and tensor_core.h: the same names, run by a host compiler, and
// every access checked. A kernel is called once per thread, each thread a fiber; see block.h for how they interleave.
#pragma once
#include <cmath>
#include <cstddef>
#include <limits>

#define DEVICE inline
#define UNROLL
#define KERNEL(threads, blocks_per_sm) void

namespace emulator {

// global.cpp: an access at `at` must stay inside the buffer that `base` points into
void check_read(const void* base, const void* at, std::size_t bytes, std::size_t alignment);
void check_write(const void* base, const void* at, std::size_t bytes, std::size_t alignment);

// shared.cpp: the block's shared memory, poisoned at its start
void* shared_at(int byte_offset);
void shared_read(const void* at, std::size_t bytes, std::size_t alignment);
void shared_write(const void* at, std::size_t bytes, std::size_t alignment);
void copy_to_shared(void* to, const void* from);  // null: zeros
void commit();
void wait(int pending);

}  // namespace emulator

int thread();
int block_x();
int block_y();
void barrier();
float shuffle_xor(float value, int lanes);

inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

template <class T>
struct In {
  const T* at;
  T operator[](i64 i) const {
    emulator::check_read(at, at + i, sizeof(T), alignof(T));
    return at[i];
  }
  bool given() const { return at != nullptr; }
};

template <class T>
struct Out {
  T* at;
  T operator[](i64 i) const {
    emulator::check_write(at, at + i, sizeof(T), alignof(T));  // one owner: reading back needs the same right
    return at[i];
  }
  bool given() const { return at != nullptr; }
  void put(i64 i, T value) const {
    emulator::check_write(at, at + i, sizeof(T), alignof(T));
    at[i] = value;
  }
};

template <class T>
struct Shared {
  T* at;
  T operator[](int i) const {
    emulator::shared_read(at + i, sizeof(T), alignof(T));
    return at[i];
  }
  void put(int i, T value) const {
    emulator::shared_write(at + i, sizeof(T), alignof(T));
    at[i] = value;
  }
};

template <class T>
Shared<T> shared_memory(int byte_offset) {
  return {static_cast<T*>(emulator::shared_at(byte_offset))};
}

// tensor_core.h
inline void copy_async(Shared<Chunk> to, int i, In<u16> from, i64 offset, bool valid) {
  if (valid) emulator::check_read(from.at, from.at + offset, sizeof(Chunk), sizeof(Chunk));
  emulator::copy_to_shared(to.at + i, valid ? from.at + offset : nullptr);
}
inline void commit_copies() { emulator::commit(); }
template <int kPending>
void wait_copies() {
  emulator::wait(kPending);
}
void load_matrices(u32 (&fragment)[4], Shared<Chunk> from, int i);
void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1);
u32 pack(float low, float high);
