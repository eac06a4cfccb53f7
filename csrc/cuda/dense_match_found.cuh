// What a part of dense_match leaves, and the order in which matches are better than others.

#pragma once

#include "operands.cuh"

namespace medmoco {

// What a part knows of a query position.
struct Found {
  uint64_t best;         // see match_of
  float inverse_length;  // of the query; NaN: irregular, see inverse_length()
};

// Orders by score, then by the lowest position, so that the largest is the best whatever the order
// in which they come. NaN is above all.
__device__ __forceinline__ uint64_t match_of(float score, uint32_t position) {
  uint32_t bits = bits_of(score + 0.0f);  // -0 becomes 0
  if (score != score) bits = 0x7fc00000u;
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | uint32_t(~position);
}
__device__ __forceinline__ float score_of(uint64_t match) {
  const uint32_t bits = uint32_t(match >> 32);
  return float_of(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ int64_t position_of(uint64_t match) { return uint32_t(~match); }

// Some key's length is irregular, so the part chooses none. Above all matches.
constexpr uint64_t kIrregular = ~uint64_t(0);

}  // namespace medmoco
