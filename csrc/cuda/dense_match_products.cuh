// The product of a tile of query positions and a tile of key positions, and their lengths, from
// chunks of channels as they come by.

#pragma once

#include "map_chunk.cuh"
#include "products.cuh"

namespace medmoco {

// Sizes that keep accumulators within the registers, twice as many where sums must be rounded.
// kLarge: for maps of more than 64 positions.
template <typename Kind_, MapLayout kLayout_, bool kLarge>
struct MatchSizes {
  using Kind = Kind_;
  using Element = typename Kind::Element;
  static constexpr MapLayout kLayout = kLayout_;
  // Four warps: two by the queries, two by the keys. In tiles of a product, of 16 queries and 8
  // keys, a warp has
  static constexpr int kLeftTiles = kLarge && !Kind::kPrecise ? 4 : 2;
  static constexpr int kRightTiles = kLarge && !Kind::kPrecise ? 8 : 4;
  static constexpr int kLines = 2 * kLeftTiles;  // queries that a lane has values of
  static constexpr int kWarpQueries = 16 * kLeftTiles, kWarpKeys = 8 * kRightTiles;
  static constexpr int kQueries = 2 * kWarpQueries, kKeys = 2 * kWarpKeys;
  static_assert(kQueries <= kMatchThreads && kKeys <= kMatchThreads);
  using QueryChunk = MapChunk<Element, kLayout, kQueries>;
  using KeyChunk = MapChunk<Element, kLayout, kKeys>;
  // Chunks under way. Large tiles are bound by products, small ones by the copies.
  static constexpr int kStages = kLarge ? 2 : 4;
  // Query chunks stay in shared memory while keys go by, if they are this few.
  static constexpr int kMostResident = kLarge ? 4 : kStages;
  static constexpr int kBlocksPerMultiprocessor = kLarge || Kind::kPrecise ? 2 : 3;
};

// Sums of squares, and all bits but the sign that occur: a vector of tiny numbers, whose squares
// vanish, is not a vector of zeros.
template <int kVectors>
struct Squares {
  float sum[kVectors];
  uint32_t seen[kVectors];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = 0;
      seen[i] = 0;
    }
  }
  template <typename Element>
  __device__ __forceinline__ void add(int i, uint32_t raw) {
    Element elements[4 / sizeof(Element)];
    memcpy(elements, &raw, sizeof raw);
#pragma unroll
    for (const Element& element : elements) {
      const float value = to_float(element);
      sum[i] = fmaf(value, value, sum[i]);
    }
    seen[i] |= raw & (sizeof(Element) == 2 ? 0x7fff7fffu : 0x7fffffffu);
  }
  // Over the four lanes that share the vectors.
  __device__ __forceinline__ void gather() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int mask = 1; mask <= 2; mask *= 2) {
        sum[i] += shuffle_xor(sum[i], mask);
        seen[i] |= uint32_t(shuffle_xor(int(seen[i]), mask));
      }
    }
  }
};

// What one of the two warps that share vectors knows of one.
struct alignas(8) SquareShare {
  float sum;
  uint32_t seen;
};

// 1 / length; 0 of zeros; NaN where squares, or products of the vector with another, may overflow
// or vanish, and where they do not exist.
__device__ __forceinline__ float inverse_length(const SquareShare& one, const SquareShare& other) {
  const float square = one.sum + other.sum;
  if ((one.seen | other.seen) == 0) return 0;
  const bool regular = square >= 0x1p-100f && square <= 0x1p100f;
  return regular ? 1 / sqrtf(square) : float_of(0x7fc00000u);
}

template <typename S>
using Dots = float[S::kLeftTiles][S::kRightTiles][4];

// dots += queries . keys of one chunk. Each of two warps that share vectors adds up the squares of
// every other step.
template <typename S>
__device__ __forceinline__ void add_chunk(Dots<S>& dots,
                                          const typename S::QueryChunk::Reader& query,
                                          const typename S::KeyChunk::Reader& key,
                                          bool with_query_squares,
                                          Squares<S::kLines>& query_squares,
                                          Squares<S::kRightTiles>& key_squares) {
  using Kind = typename S::Kind;
  using Element = typename S::Element;
  const int warp = thread_id() / kWarpLanes;
  float run[S::kLeftTiles][S::kRightTiles][4] = {};
  auto& target = Kind::kPrecise ? run : dots;
  // Unrolled further, addresses of single elements and parts of float32 would not fit the
  // registers.
  [[maybe_unused]] constexpr int kUnrolled = S::kLayout == MapLayout::kUnaligned ? 1
                                             : sizeof(Element) == 4              ? 2
                                                                                 : kChunkSteps;
#pragma unroll kUnrolled
  for (int step = 0; step < kChunkSteps; ++step) {
    typename Kind::A left[S::kLeftTiles];
    uint32_t raw[4];
#pragma unroll
    for (int m = 0; m < S::kLeftTiles; ++m) {
      query.left(raw, m, step);
      if (with_query_squares && step % 2 == warp % 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query_squares.template add<Element>(2 * m + i % 2, raw[i]);
      }
      left[m] = Kind::left(raw);
    }
#pragma unroll
    for (int n = 0; n < S::kRightTiles; n += 2) {
      key.right(raw, n, step);
      if (step % 2 == warp / 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) key_squares.template add<Element>(n + i / 2, raw[i]);
      }
      const auto near = Kind::right(raw[0], raw[1]), far = Kind::right(raw[2], raw[3]);
#pragma unroll
      for (int m = 0; m < S::kLeftTiles; ++m) {
        Kind::multiply_add(target[m][n], left[m], near);
        Kind::multiply_add(target[m][n + 1], left[m], far);
      }
    }
  }
  if constexpr (Kind::kPrecise) {
    for_each_value<S::kLeftTiles, S::kRightTiles>(
        [&](int m, int n, int i, int) { dots[m][n][i] += run[m][n][i]; });
  }
}

}  // namespace medmoco
