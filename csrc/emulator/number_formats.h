// bfloat16, float16 and TF32 as the GPU rounds to them.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda_words.h"

namespace medmoco {

// Storage alone: arithmetic goes through to_float and pack, as in the kernels.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace emulator {

// Drops the low `count` bits, rounding to nearest, ties to even.
inline uint32_t drop_bits(uint32_t bits, int count) {
  const uint32_t below_half = (1u << (count - 1)) - 1, odd = (bits >> count) & 1;
  return (bits + below_half + odd) >> count;
}

inline uint16_t bfloat16_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>(drop_bits(std::bit_cast<uint32_t>(value), 16));
}

inline uint16_t half_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= std::bit_cast<uint32_t>(65520.0f)) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < std::bit_cast<uint32_t>(0x1p-14f)) {
    // Subnormal: a multiple of 2^-24. Adding 1/2, whose last bit is 2^-24, rounds to it.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) & 0x7ff);
  }
  constexpr uint32_t kExponentBiases = (127 - 15) << 23;
  return sign | static_cast<uint16_t>(drop_bits(magnitude - kExponentBiases, 13));
}

// What the tensor cores see of a TF32 operand: the upper 19 bits.
inline float truncate_to_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

}  // namespace emulator

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  const uint32_t exponent_bias = magnitude >= 0x7c00 ? 255 - 31 : 127 - 15;  // infinity and NaN
  const float subnormal = 0x1p-24f * static_cast<float>(magnitude);
  const uint32_t bits = magnitude < 0x400 ? std::bit_cast<uint32_t>(subnormal)
                                          : (magnitude << 13) + (exponent_bias << 23);
  return std::bit_cast<float>(sign | bits);
}

// Rounds to nearest even.
template <typename Scalar>
__device__ __forceinline__ Scalar from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {emulator::bfloat16_bits(value)};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return {emulator::half_bits(value)};
}

// Rounds both to nearest even: `low` in the lower 16 bits.
template <typename Scalar>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(from_float<Scalar>(high).bits) << 16 | from_float<Scalar>(low).bits;
}

// To 10 bits of mantissa, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffff;
  if (std::isinf(value)) return std::bit_cast<uint32_t>(value);
  return (std::bit_cast<uint32_t>(value) + 0x1000u) & 0xffffe000u;
}

// Exact to float32's rounding, where the GPU errs by up to 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace medmoco
