// The instructions of sm_80 and later that feed and run the tensor cores. Compiled for bf16, or for fp16 with -DFP16.
#pragma once
#include "device.h"

#ifdef FP16
#define ELEMENT "f16"
constexpr float kGain = 16384.0f;  // gradients are at most 1: lift the many small ones over fp16's subnormal range
#else
#define ELEMENT "bf16"
constexpr float kGain = 1.0f;
#endif

#ifdef __CUDACC__

DEVICE u32 shared_address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

// Start copying one chunk (8 elements from `from[offset]`) to `to[i]`, or zeros where not `valid`.
DEVICE void copy_async(Shared<Chunk> to, int i, In<u16> from, i64 offset, bool valid) {
  const u16* source = valid ? from.at + offset : from.at;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.at + i)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Close this thread's current group of copies. An empty group is complete at once.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `kPending` of this thread's newest groups are still on their way.
template <int kPending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices. Lane l names row l % 8 of matrix l / 8 by its chunk, and receives elements (l / 4, 2 (l % 4)) and
// its right neighbour of each.
DEVICE void load_matrices(u32 (&fragment)[4], Shared<Chunk> from, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(from.at + i))
               : "memory");
}

// sum += A B for a 16x16 A and a 16x8 B, fp32 accumulation. Lane l holds rows l / 4 and l / 4 + 8, columns
// 2 (l % 4) and + 1 of the sum.
DEVICE void multiply_add(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest even, `low` at the lower address.
DEVICE u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

#endif
