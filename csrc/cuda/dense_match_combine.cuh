// Chooses among the parts of dense_match. Where a length is irregular, one that float32 cannot
// square safely, or that does not exist, the query is compared with all keys anew, with care.

#pragma once

#include "dense_match_forward.cuh"

namespace medmoco {

constexpr int kChooseThreads = 128;

template <typename Element>
struct ChooseArguments {
  FeatureMap<Element> query, key;
  int64_t batch, channels;
  int query_tiles, tile_queries;
  Schedule schedule;
  const Found* found;
  int64_t* index;     // (batch, query positions)
  float* similarity;  // likewise
};

// The power of two that takes x >= 0 near 1, so that its square neither overflows nor vanishes.
__device__ __forceinline__ float power_of_two_towards_one(float x) {
  const uint32_t exponent = bits_of(x) >> 23;
  const uint32_t bounded = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return float_of((254 - bounded) << 23);
}

// A vector of channels, to be multiplied by `scale` and then by `inverse`, which makes it as long
// as 1, or leaves zeros. An infinite entry gives NaN.
struct UnitScale {
  float scale, inverse;

  // Over every step-th channel from the first on; gather() brings lanes together.
  template <typename Element, typename Gather>
  __device__ static UnitScale of(const Element* vector, int64_t stride, int64_t channels, int first,
                                 int step, Gather gather) {
    float largest = 0;
    for (int64_t c = first; c < channels; c += step) {
      largest = fmaxf(largest, fabsf(to_float(vector[c * stride])));
    }
    largest = gather(largest, [](float a, float b) { return fmaxf(a, b); });
    const float scale = power_of_two_towards_one(largest);
    float square = 0;
    for (int64_t c = first; c < channels; c += step) {
      const float x = to_float(vector[c * stride]) * scale;
      square = fmaf(x, x, square);
    }
    square = gather(square, [](float a, float b) { return a + b; });
    return {scale, square == 0 ? 1 : 1 / sqrtf(square)};
  }
};

// The best match of one query, worked out by a whole warp: all lanes get it.
template <typename Element>
__device__ uint64_t match_with_care(const ChooseArguments<Element>& p, int64_t image,
                                    int64_t query_position) {
  constexpr int kStretch = 32;  // summed apart, which keeps the rounding small
  const int lane = int(threadIdx.x) % kWarpLanes;
  const Element* query =
      p.query.data + image * p.query.batch_stride + query_position * p.query.position_stride;
  const auto unit_query = UnitScale::of(query, p.query.channel_stride, p.channels, lane, kWarpLanes,
                                        [](float value, auto add) {
                                          for (int mask = 1; mask < kWarpLanes; mask *= 2) {
                                            value = add(value, shuffle_xor(value, mask));
                                          }
                                          return value;
                                        });
  uint64_t best = 0;
  for (int64_t position = lane; position < p.key.positions; position += kWarpLanes) {
    const Element* key = p.key.data + image * p.key.batch_stride + position * p.key.position_stride;
    const auto unit_key = UnitScale::of(key, p.key.channel_stride, p.channels, 0, 1,
                                        [](float value, auto) { return value; });
    float dot = 0;
    for (int64_t start = 0; start < p.channels; start += kStretch) {
      const int64_t end = start + kStretch < p.channels ? start + kStretch : p.channels;
      float sum = 0;
      for (int64_t c = start; c < end; ++c) {
        const float x = to_float(query[c * p.query.channel_stride]) * unit_query.scale;
        sum = fmaf(x, to_float(key[c * p.key.channel_stride]) * unit_key.scale, sum);
      }
      dot += sum;
    }
    const uint64_t match =
        match_of(dot * unit_key.inverse * unit_query.inverse, uint32_t(position));
    best = match > best ? match : best;
  }
  for (int mask = 1; mask < kWarpLanes; mask *= 2) {
    const auto high = uint32_t(shuffle_xor(int(best >> 32), mask));
    const auto low = uint32_t(shuffle_xor(int(uint32_t(best)), mask));
    const uint64_t other = uint64_t(high) << 32 | low;
    best = other > best ? other : best;
  }
  return best;
}

// The best match of the parts. kIrregular: some length is.
template <typename Element>
__device__ __forceinline__ Found choose_part(const ChooseArguments<Element>& p, int64_t image,
                                             int64_t query_position) {
  const int tile = int(image * p.query_tiles + query_position / p.tile_queries);
  const int row = int(query_position % p.tile_queries);
  const int first = p.schedule.first_block(tile), last = p.schedule.last_block(tile);
  auto part = [&](int block) {
    return p.found[int64_t(p.schedule.part(block, tile)) * p.tile_queries + row];
  };
  Found chosen = part(first);
  for (int block = first + 1; block <= last; ++block) {
    const uint64_t match = part(block).best;
    chosen.best = match > chosen.best ? match : chosen.best;
  }
  if (chosen.inverse_length != chosen.inverse_length) chosen.best = kIrregular;
  return chosen;
}

template <typename Element>
__global__ void __launch_bounds__(kChooseThreads)
    dense_match_choose_kernel(ChooseArguments<Element> p) {
  const int lane = int(threadIdx.x) % kWarpLanes;
  const int64_t query = int64_t(blockIdx.x) * kChooseThreads + threadIdx.x;
  const bool exists = query < p.batch * p.query.positions;  // others stay, for the warp
  Found chosen{0, 0};
  if (exists) chosen = choose_part(p, query / p.query.positions, query % p.query.positions);
  const bool irregular = chosen.best == kIrregular;
  for (int turn = 0; turn < kWarpLanes; ++turn) {
    if (!warp_any(irregular && lane == turn)) continue;
    const int64_t whose = query - lane + turn;
    const uint64_t match = match_with_care(p, whose / p.query.positions, whose % p.query.positions);
    if (lane == turn) chosen = {match, 1};
  }
  if (!exists) return;
  const float cosine = score_of(chosen.best) * chosen.inverse_length;
  p.index[query] = position_of(chosen.best);
  // Rounding may take it just beyond 1; NaN stays.
  p.similarity[query] = cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : cosine;
}

}  // namespace medmoco
