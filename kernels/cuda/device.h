// The machine's operations that kernels use, by name. One source, two machines: a GPU (compiled by NVRTC) and the
// emulator of tests/emulation, whose header replaces everything below and checks every access. Kernels therefore touch memory
// only through In, Out and Shared, and other threads only through barrier, shuffle_xor and tensor_core.h.
#pragma once

using i64 = long long;
using u16 = unsigned short;  // a bf16 or fp16 number, by its bits: NVRTC has no standard headers
using u32 = unsigned int;

struct alignas(16) Chunk {  // 8 elements: the unit of asynchronous copies, matrix loads and wide stores
  u32 words[4];
};

struct alignas(16) FourFloats {
  float value[4];
};

constexpr int kWarp = 32, kChunk = 8;  // threads in a warp, elements in a Chunk
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kLargest = 3.40282347e38f;

#ifndef __CUDACC__
#include "emulator.h"
#else

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")  // before every loop that indexes registers: a loop left standing puts them in memory
#define KERNEL(threads, blocks_per_sm) extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)

DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }

DEVICE void barrier() { __syncthreads(); }
DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Global memory that the kernel only reads, and that is not written while it runs.
template <class T>
struct In {
  const T* at;
  DEVICE T operator[](i64 i) const { return at[i]; }
  DEVICE bool given() const { return at != nullptr; }
};

// Global memory that the kernel writes. No two threads may touch the same element.
template <class T>
struct Out {
  T* at;
  DEVICE T operator[](i64 i) const { return at[i]; }
  DEVICE bool given() const { return at != nullptr; }
  DEVICE void put(i64 i, T value) const { at[i] = value; }
};

// A view of the block's dynamic shared memory, from a byte offset on.
template <class T>
struct Shared {
  T* at;
  DEVICE T operator[](int i) const { return at[i]; }
  DEVICE void put(int i, T value) const { at[i] = value; }
};

template <class T>
DEVICE Shared<T> shared_memory(int byte_offset) {
  extern __shared__ __align__(128) unsigned char arena[];
  return {reinterpret_cast<T*>(arena + byte_offset)};
}

#endif

DEVICE int lane() { return thread() % kWarp; }
DEVICE int warp() { return thread() / kWarp; }

// Maximum and sum over the lanes that differ in the bits first, 2 first, ... below `end`; all of them get it.
DEVICE float max_of_lanes(float own, int first, int end) {
  UNROLL for (int bit = first; bit < end; bit *= 2) own = fmaxf(own, shuffle_xor(own, bit));
  return own;
}

DEVICE float sum_of_lanes(float own, int first, int end) {
  UNROLL for (int bit = first; bit < end; bit *= 2) own += shuffle_xor(own, bit);
  return own;
}
