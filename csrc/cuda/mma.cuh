// Matrix products of a warp on the tensor cores, sum += a b, accumulated in float32.
//
// With row = lane / 4 and pair = lane % 4, a lane holds of `sum` (16 x 8) the elements
// (row, 2 pair), (row, 2 pair + 1), (row + 8, 2 pair), (row + 8, 2 pair + 1). Of `a` and `b` it
// holds 32 bits each, 16-byte chunks of depth counted from 0: a (row, chunk 0), (row + 8, chunk 0),
// (row, chunk 1), (row + 8, chunk 1), and b (column lane / 4, chunk 0), (column lane / 4, chunk 1),
// in each chunk the bytes 4 pair on. That is what ldmatrix hands out.

#pragma once

#include "memory.cuh"

namespace medmoco {

// sum (16 x 8) += a (16 x 16) b (16 x 8), of 16-bit elements.
template <typename Scalar>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&sum)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum (16 x 8) += a (16 x 8) b (8 x 8), of float32 bits rounded by round_to_tf32.
__device__ __forceinline__ void mma_m16n8k8(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To 10 bits of mantissa, to nearest: ties to even from compute capability 9.0 on, where that is
// one instruction, away from zero before. Unrounded bits would be truncated, at ten times the
// error.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

}  // namespace medmoco
