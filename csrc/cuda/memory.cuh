// Shared memory and copies into it.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace medmoco {

using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Half value) { return __half2float(value); }

// Rounds to nearest even.
template <typename Scalar>
__device__ __forceinline__ Scalar from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return __float2half_rn(value);
}

// Rounds both to nearest even: `low` in the lower 16 bits.
template <typename Scalar>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The block's dynamic shared memory, as many bytes as the launch asked for, aligned to 16.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char medmoco_shared_memory[];
  return medmoco_shared_memory;
}

template <typename T>
__device__ __forceinline__ T shared_load(const T* address) {
  return *address;
}

template <typename T>
__device__ __forceinline__ void shared_store(T* address, T value) {
  *address = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32 bits. Lanes 8 i .. 8 i + 7 point at the
// rows of matrix i, 16 aligned bytes each; of each matrix a lane receives the 4 bytes at row
// lane / 4, bytes 4 (lane % 4) on.
__device__ __forceinline__ void ldmatrix(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// The same, each matrix of 16-bit elements transposed.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// Starts a copy of kBytes (8 or 16, both sides aligned to it) that bypasses registers. Where not
// `valid`, zeros are written and the source, which must be a valid address all the same, is not
// read. The copy has arrived for this thread after cp_async_wait, for the block after a barrier
// that follows.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg leaves out the first-level cache: each block reads once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  }
}

// Makes a group of the copies that this thread has started since the last call.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most the kPending latest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace medmoco
