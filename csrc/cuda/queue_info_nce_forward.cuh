// The forward kernel of queue_info_nce: attention of the queries over the queue, which is both its
// keys and its values, in one pass.
//
// A block holds a tile of queries in shared memory and streams tiles of the queue past it, a ring
// of them under way. Each warp multiplies its queries with the tile, turns the logits into weights,
// and multiplies these with the same tile, so the logits never leave the registers. What it has
// gathered at the end is one part of the softmax; queue_info_nce_combine.cuh puts the parts
// together.

#pragma once

#include "queue_info_nce_softmax.cuh"
#include "rows.cuh"
#include "schedule.cuh"

namespace medmoco {

// What a part knows of a query, besides the weighted sum of its keys.
struct Statistics {
  float peak;      // weights are 2^(logit - peak)
  float sum;       // of the weights
  float positive;  // query . key, not yet divided by the temperature
  int rank;        // negatives not below the positive
};

template <typename Element>
struct ForwardArguments {
  AlignedRows<Element> query, key, queue;
  const int64_t *query_ids, *queue_ids;
  int64_t query_ids_stride, queue_ids_stride;
  float scale;  // log2(e) / temperature: logits count in powers of 2
  Schedule schedule;
  int direction_dim;       // of a row of `directions`
  Statistics* statistics;  // (parts, query tile)
  float* directions;       // (parts, query tile, direction_dim): sum of weight * queue row
};

// The positive of each query, query . key, by the same instructions in the same order as
// query . queue, so that a key that also stands in the queue ties exactly. The keys come from
// global memory.
template <typename Kind, int kDim>
__device__ __forceinline__ void multiply_with_keys(
    const ForwardArguments<typename Kind::Element>& p, int64_t first_query) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  const int thread = thread_id(), lane = thread % kWarpLanes, row = lane / 4, pair = lane % 4;
  const int place = left_place(M::queries(), lane);
#pragma unroll
  for (int m = 0; m < S::kLeftTiles; ++m) {
    const int first_row = thread / kWarpLanes * S::kWarpQueries + 16 * m;
    auto left = [&](uint32_t (&raw)[4], int, int step) {
      load_operand<typename M::Operand>(raw, place, first_row, step);
    };
    auto right = [&](uint32_t (&raw)[4], int, int step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t key = first_query + first_row + row + i / 2 * 8;
        const int chunk = 2 * step + i % 2;
        const auto* words = reinterpret_cast<const uint32_t*>(p.key.data + key * p.key.stride);
        raw[i] = key < p.key.count && chunk < p.key.chunks ? words[4 * chunk + pair] : 0;
      }
    };
    float sums[1][2][4];
    multiply<Kind, S::kSteps>(sums, left, right);
    if (pair == row / 2) {  // this lane has the diagonal
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float positive = row % 2 ? sums[0][half][2 * half + 1] : sums[0][half][2 * half];
        shared_store(M::positives() + first_row + 8 * half + row, positive);
      }
    }
  }
}

// Writes a part: the four lanes of a line add up what they have.
template <typename Kind, int kDim, bool kWithDirection>
__device__ __forceinline__ void write_part(const ForwardArguments<typename Kind::Element>& p,
                                           int query_tile,
                                           const Gathered<Kind, kDim, kWithDirection>& gathered) {
  using S = Sizes<Kind, kDim>;
  const int64_t first_query = int64_t(query_tile) * S::kQueries;
  const int64_t part = p.schedule.part(block_id(), query_tile);
  const int thread = thread_id(), pair = thread % 4;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    float sum = gathered.sum[line];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    int rank = gathered.rank[line];
    rank += shuffle_xor(rank, 1);
    rank += shuffle_xor(rank, 2);
    const int row = thread / kWarpLanes * S::kWarpQueries + 8 * line + thread % kWarpLanes / 4;
    if (first_query + row >= p.query.count) continue;
    const int64_t place = part * S::kQueries + row;
    if (pair == 0) {
      const float positive = shared_load(Shared<Kind, kDim>::positives() + row);
      p.statistics[place] = {gathered.peak[line], sum, positive, rank};
    }
    if constexpr (kWithDirection) {
      struct alignas(8) Pair {
        float first, second;
      };
      float* direction = p.directions + place * p.direction_dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = 8 * n + 2 * pair;
        if (column >= p.direction_dim) continue;
        const float* values = gathered.direction[line / 2][n] + line % 2 * 2;
        *reinterpret_cast<Pair*>(direction + column) = {values[0], values[1]};
      }
    }
  }
}

// Starts to copy ids [first, first + kCount), zeros beyond the last. `anywhere` is an address that
// is valid even if there are no ids.
template <int kCount>
__device__ __forceinline__ void copy_ids(const int64_t* ids, int64_t stride, int64_t first,
                                         int64_t count, int64_t* to, const void* anywhere) {
  static_assert(kCount <= kForwardThreads);
  const int i = thread_id();
  const bool valid = first + i < count;
  const void* source = valid ? ids + (first + i) * stride : anywhere;
  if (i < kCount) cp_async<8>(to + i, source, valid);
}

// Streams the tiles of the queue that this block has to see past a tile of queries.
template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__device__ __forceinline__ void gather_part(const ForwardArguments<typename Kind::Element>& p,
                                            int query_tile) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  const int first = p.schedule.first_queue_tile(block_id(), query_tile);
  auto end = [&] {  // worked out anew: registers are short
    return p.schedule.end_queue_tile(block_id(), shared_load(M::query_tile()));
  };
  const int64_t first_query = int64_t(query_tile) * S::kQueries;
  auto start_copy = [&](int tile) {
    if (tile < end()) {
      const int64_t first_key = int64_t(tile) * S::kKeys;
      copy_rows<S::kKeys, kForwardThreads>(p.queue, first_key, M::keys(tile), p.query.data);
      if constexpr (kWithIds) {
        copy_ids<S::kKeys>(p.queue_ids, p.queue_ids_stride, first_key, p.queue.count,
                           M::queue_ids(tile), p.query.data);
      }
    }
    cp_async_commit();  // also without a tile, so that the groups keep count
  };

  block_barrier();  // the part before is done with the shared memory
  copy_rows<S::kQueries, kForwardThreads>(p.query, first_query, M::queries(), p.query.data);
  if constexpr (kWithIds) {
    copy_ids<S::kQueries>(p.query_ids, p.query_ids_stride, first_query, p.query.count,
                          M::query_ids(), p.query.data);
  }
  cp_async_commit();
  for (int i = 0; i < S::kStages - 1; ++i) start_copy(first + i);
  cp_async_wait<S::kStages - 1>();
  block_barrier();  // all copies of the queries have arrived
  multiply_with_keys<Kind, kDim>(p, first_query);

  Gathered<Kind, kDim, kWithDirection> gathered;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    gathered.peak[line] = kNoPeak;
    gathered.sum[line] = 0;
    gathered.rank[line] = 0;
  }
  for_each_value<S::kLeftTiles, kWithDirection ? kDim / 8 : 1>(
      [&](int m, int n, int i, int) { gathered.direction[m][n][i] = 0; });
  for (int tile = first; tile < end(); ++tile) {
    cp_async_wait<S::kStages - 2>();
    block_barrier();  // all copies of this tile have arrived, and nobody reads the one before
    start_copy(tile + S::kStages - 1);
    add_tile<Kind, kDim, kWithDirection, kWithIds>(tile, p.queue.count, p.scale, gathered);
  }
  write_part(p, shared_load(M::query_tile()), gathered);
}

template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__global__ void __launch_bounds__(kForwardThreads, 2)
    queue_info_nce_forward_kernel(ForwardArguments<typename Kind::Element> p) {
  auto* tile = Shared<Kind, kDim>::query_tile();
  shared_store(tile, p.schedule.first_query_tile(block_id()));
  while (p.schedule.has_query_tile(block_id(), shared_load(tile))) {
    gather_part<Kind, kDim, kWithDirection, kWithIds>(p, shared_load(tile));
    shared_store(tile, shared_load(tile) + 1);
  }
}

}  // namespace medmoco
