// How the tensor cores multiply each kind of operand: 16-bit elements as they are, float32 rounded
// to TF32, or float32 in two TF32 parts, whose three products keep its accuracy (3xTF32).
//
// A step of a product takes 32 bytes of depth, so 16 elements of 16 bits or 8 of 32. In bytes the
// fragments of all kinds are alike: see mma.cuh.

#pragma once

#include "primitives.cuh"

namespace medmoco {

// Bits of a float and back, on both sides of the compiler.
__device__ __forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Left {  // 16 rows
  uint32_t bits[4];
};
struct Right {  // 8 columns
  uint32_t bits[2];
};

template <typename Scalar>
struct SixteenBit {
  using Element = Scalar;
  using A = Left;
  using B = Right;
  static constexpr bool kPrecise = false, kRounds = false;
  static constexpr int kStepDepth = 16;

  static __device__ __forceinline__ A left(const uint32_t (&raw)[4]) {
    return {{raw[0], raw[1], raw[2], raw[3]}};
  }
  static __device__ __forceinline__ B right(uint32_t raw0, uint32_t raw1) { return {{raw0, raw1}}; }
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const A& a, const B& b) {
    mma_m16n8k16<Scalar>(sum, a.bits, b.bits[0], b.bits[1]);
  }
  // Two results (16 x 8) of an earlier product, side by side, as the left operand of the next.
  static __device__ __forceinline__ A left_of_results(const float (*results)[4], int step) {
    const float (&near)[4] = results[2 * step], (&far)[4] = results[2 * step + 1];
    return {{pack<Scalar>(near[0], near[1]), pack<Scalar>(near[2], near[3]),
             pack<Scalar>(far[0], far[1]), pack<Scalar>(far[2], far[3])}};
  }
};

struct Tf32 {
  using Element = float;
  using A = Left;
  using B = Right;
  static constexpr bool kPrecise = false, kRounds = true;
  static constexpr int kStepDepth = 8;

  static __device__ __forceinline__ uint32_t rounded(uint32_t raw) {
    return round_to_tf32(float_of(raw));
  }
  static __device__ __forceinline__ A left(const uint32_t (&raw)[4]) {
    return {{rounded(raw[0]), rounded(raw[1]), rounded(raw[2]), rounded(raw[3])}};
  }
  static __device__ __forceinline__ B right(uint32_t raw0, uint32_t raw1) {
    return {{rounded(raw0), rounded(raw1)}};
  }
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const A& a, const B& b) {
    mma_m16n8k8(sum, a.bits, b.bits[0], b.bits[1]);
  }
  // Of a result a lane holds columns 2 pair and 2 pair + 1, of an operand the depths pair and
  // pair + 4. Any order of the depth serves, if the right operand has it too: see load_values.
  static __device__ __forceinline__ A left_of_results(const float (*results)[4], int step) {
    const float (&result)[4] = results[step];
    return left({bits_of(result[0]), bits_of(result[2]), bits_of(result[1]), bits_of(result[3])});
  }
};

struct Tf32x3 {
  using Element = float;
  struct A {
    Left high, low;
  };
  struct B {
    Right high, low;
  };
  // Tensor cores truncate their sums (Fasi et al., "Numerical behavior of NVIDIA tensor cores",
  // PeerJ CS 2021), so long ones drift. Short ones are therefore gathered by the ordinary, rounded
  // addition.
  static constexpr bool kPrecise = true, kRounds = false;
  static constexpr int kStepDepth = 8;

  static __device__ __forceinline__ void split(uint32_t raw, uint32_t& high, uint32_t& low) {
    const float value = float_of(raw);
    high = round_to_tf32(value);
    low = round_to_tf32(value - float_of(high));
  }
  static __device__ __forceinline__ A left(const uint32_t (&raw)[4]) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(raw[i], a.high.bits[i], a.low.bits[i]);
    return a;
  }
  static __device__ __forceinline__ B right(uint32_t raw0, uint32_t raw1) {
    B b;
    split(raw0, b.high.bits[0], b.low.bits[0]);
    split(raw1, b.high.bits[1], b.low.bits[1]);
    return b;
  }
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const A& a, const B& b) {
    Tf32::multiply_add(sum, a.low, b.high);  // the small terms first
    Tf32::multiply_add(sum, a.high, b.low);
    Tf32::multiply_add(sum, a.high, b.high);
  }
  static __device__ __forceinline__ A left_of_results(const float (*results)[4], int step) {
    const float (&result)[4] = results[step];
    return left({bits_of(result[0]), bits_of(result[2]), bits_of(result[1]), bits_of(result[3])});
  }
};

}  // namespace medmoco
