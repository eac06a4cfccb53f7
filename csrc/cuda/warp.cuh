// Threads of a warp and of a block, and the fast exponential.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace medmoco {

constexpr int kWarpLanes = 32;

// threadIdx.x and blockIdx.x, read anew at each call: what follows from them is then not kept in
// registers over a whole loop.
__device__ __forceinline__ int thread_id() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int block_id() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// The value of the lane whose number differs by the bits of `mask`; float and int.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether any lane says so.
__device__ __forceinline__ bool warp_any(bool condition) {
  return __any_sync(0xffffffffu, condition);
}

// Nobody goes on until all lanes of the warp have come; nor does the compiler move memory accesses
// across.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Nobody goes on until all threads of the block have come. What they wrote to shared memory before
// it, all may read after it.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

// count += !(a < b), so also where one of them is NaN.
__device__ __forceinline__ void count_unless_below(int& count, float a, float b) {
  asm("{ .reg .pred counts; setp.geu.f32 counts, %1, %2; @counts add.s32 %0, %0, 1; }"
      : "+r"(count)
      : "f"(a), "f"(b));
}

// 2^x to 2 units in the last place; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace medmoco
