// Puts the parts of a softmax over the queue together: loss, rank and direction of each query.
// Parts are added in an order that the shapes fix, so the same input gives the same bits.

#pragma once

#include "queue_info_nce_forward.cuh"

namespace medmoco {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kCombineWarps * 32;
constexpr int kLaneColumns = 4;  // 16 bytes at a time

template <typename Element>
struct CombineArguments {
  AlignedRows<Element> query, key;
  bool rounded;  // operands, by the tensor cores
  Schedule schedule;
  const Statistics* statistics;
  const float* directions;
  int64_t batch, embed_dim;
  int tile_queries, direction_dim;
  int warps_per_query;  // a power of 2: where a query has many parts, several warps share them
  float scale, inverse_temperature;
  float* loss;
  int32_t* rank;
  float* direction;  // (batch, embed_dim); null when not asked for
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// The parts of one query.
struct Parts {
  int first_block, last_block, query_tile, row;  // row of the tile
};

// All lanes of a warp work this out together, and all get the same.
template <typename Element>
__device__ __forceinline__ Statistics combine_statistics(const CombineArguments<Element>& p,
                                                         const Parts& parts) {
  const int lane = int(threadIdx.x) % kWarpLanes;
  auto part = [&](int block) {
    const int64_t part = p.schedule.part(block, parts.query_tile);
    return p.statistics[part * p.tile_queries + parts.row];
  };
  Statistics total = {kNoPeak, 0, part(parts.first_block).positive, 0};
  for (int block = parts.first_block + lane; block <= parts.last_block; block += kWarpLanes) {
    total.peak = fmaxf(total.peak, part(block).peak);
  }
  total.peak = warp_max(total.peak);
  for (int block = parts.first_block + lane; block <= parts.last_block; block += kWarpLanes) {
    const Statistics found = part(block);
    total.sum += found.sum * exp2_fast(found.peak - total.peak);
    total.rank += found.rank;
  }
  total.sum = warp_sum(total.sum);
  total.rank = warp_sum(total.rank);
  return total;
}

// query . key in float32, in all lanes.
template <typename Element>
__device__ __forceinline__ float unrounded_positive(const CombineArguments<Element>& p,
                                                    int64_t query) {
  const Element* a = p.query.data + query * p.query.stride;
  const Element* b = p.key.data + query * p.key.stride;
  float sum = 0;
  for (int64_t i = threadIdx.x % kWarpLanes; i < p.embed_dim; i += kWarpLanes) {
    sum += to_float(a[i]) * to_float(b[i]);
  }
  return warp_sum(sum);
}

// log(1 + e^x).
__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

// Adds this warp's share of the parts to kLaneColumns columns of the direction from `column` on.
template <typename Element>
__device__ __forceinline__ void add_parts(const CombineArguments<Element>& p, const Parts& parts,
                                          float peak, int share, int column,
                                          float (&sum)[kLaneColumns]) {
  struct alignas(16) Columns {
    float values[kLaneColumns];
  };
  constexpr int kAtOnce = 4;  // whose loads are under way together; beyond the last, it is repeated
  for (int first = parts.first_block + share; first <= parts.last_block;
       first += kAtOnce * p.warps_per_query) {
    float peaks[kAtOnce];
    Columns columns[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int wanted = first + i * p.warps_per_query;
      const int block = wanted < parts.last_block ? wanted : parts.last_block;
      const int64_t part = p.schedule.part(block, parts.query_tile);
      const int64_t place = part * p.tile_queries + parts.row;
      peaks[i] = p.statistics[place].peak;
      const float* direction = p.directions + place * p.direction_dim + column;
      columns[i] = *reinterpret_cast<const Columns*>(direction);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool counts = first + i * p.warps_per_query <= parts.last_block;
      const float weight = counts ? exp2_fast(peaks[i] - peak) : 0.0f;
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) sum[c] += weight * columns[i].values[c];
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kCombineThreads)
    queue_info_nce_combine_kernel(CombineArguments<Element> p) {
  const int warp = int(threadIdx.x) / kWarpLanes, lane = int(threadIdx.x) % kWarpLanes;
  const int share = warp % p.warps_per_query;
  const int64_t query =
      int64_t(blockIdx.x) * (kCombineWarps / p.warps_per_query) + warp / p.warps_per_query;
  const bool exists = query < p.batch;  // others stay, for the barriers
  Statistics total = {};
  Parts parts = {};
  float loss = 0;
  if (exists) {
    const int tile = int(query / p.tile_queries);
    parts = {p.schedule.first_block(tile), p.schedule.last_block(tile), tile,
             int(query % p.tile_queries)};
    total = combine_statistics(p, parts);
    // A rank compares products that are rounded alike; in the loss the rounding of the negatives
    // averages out, but that of the positive would stay.
    if (p.rounded) total.positive = unrounded_positive(p, query);
    // One rounding in peak - positive * scale: both are large where their difference is small.
    const float gap = fmaf(total.positive, -p.scale, total.peak) + log2f(total.sum);
    loss = softplus(gap * 0.693147181f);
    if (share == 0 && lane == 0) {
      p.loss[query] = loss;
      p.rank[query] = total.rank;
    }
  }
  if (!p.direction) return;

  // Softmax with the positive in it gives the negatives 1 - e^-loss.
  const float share_of_negatives = -expm1f(-loss);
  const float factor = share_of_negatives * p.inverse_temperature;
  auto* shares = reinterpret_cast<float*>(shared_memory());
  for (int start = 0; start < p.direction_dim; start += kWarpLanes * kLaneColumns) {
    const int column = start + kLaneColumns * lane;
    float sum[kLaneColumns] = {};
    if (exists && column < p.direction_dim) {
      add_parts(p, parts, total.peak, share, column, sum);
    }
    if (p.warps_per_query > 1) {
      block_barrier();  // the columns before have been read
      for (int i = 0; i < kLaneColumns; ++i) {
        shared_store(shares + (warp * kLaneColumns + i) * kWarpLanes + lane, sum[i]);
      }
      block_barrier();
    }
    if (!exists || share != 0) continue;
    for (int i = 0; i < kLaneColumns && column + i < p.embed_dim; ++i) {
      for (int other = 1; other < p.warps_per_query; ++other) {
        sum[i] += shared_load(shares + ((warp + other) * kLaneColumns + i) * kWarpLanes + lane);
      }
      const float mean = total.sum == 0 ? 0.0f : sum[i] / total.sum;  // no negatives: no weights
      const float key = to_float(p.key.data[query * p.key.stride + column + i]);
      p.direction[query * p.embed_dim + column + i] = factor * (mean - key);
    }
  }
}

}  // namespace medmoco
