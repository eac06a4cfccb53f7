// The forward kernel of queue_info_nce: attention of the queries over the queue, which is both its
// keys and its values, in one pass.
//
// A block holds a tile of queries in shared memory and streams tiles of the queue past it, a ring
// of them under way. Each warp multiplies its queries with the tile, turns the logits into weights,
// and multiplies these with the same tile, so the logits never leave the registers. What it has
// gathered at the end is one part of the softmax; queue_info_nce_combine.cuh puts the parts
// together.

#pragma once

#include "rows.cuh"

namespace medmoco {

// How the queue is shared out. The work is a list of units, a tile of queries and a tile of the
// queue each, in order of the queries; a block takes a run of them. So few queries fill the GPU as
// many do, and no block has more than one unit more than another. A run that reaches into several
// tiles of queries leaves a part for each; parts are numbered in order.
struct Schedule {
  int64_t queue_tiles, units, units_per_block;

  static Schedule of(int64_t query_tiles, int64_t queue_tiles, int64_t blocks_at_once) {
    const int64_t units = query_tiles * queue_tiles;
    return {queue_tiles, units, (units + blocks_at_once - 1) / blocks_at_once};
  }
  int64_t blocks() const { return (units + units_per_block - 1) / units_per_block; }
  // Going along the units, each new block and each new tile of queries begins a part.
  int64_t parts() const { return blocks() + units / queue_tiles; }
  __device__ int64_t begin(int block) const { return block * units_per_block; }
  __device__ int64_t end(int block) const {
    const int64_t next = begin(block) + units_per_block;
    return next < units ? next : units;
  }
  // The tiles of queries that the units of a block lie in, and for one of them those of the queue.
  __device__ int first_query_tile(int block) const { return int(begin(block) / queue_tiles); }
  __device__ bool has_query_tile(int block, int query_tile) const {
    return query_tile * queue_tiles < end(block);
  }
  __device__ int first_queue_tile(int block, int query_tile) const {
    const int64_t first = begin(block) - query_tile * queue_tiles;
    return first > 0 ? int(first) : 0;
  }
  __device__ int end_queue_tile(int block, int query_tile) const {
    const int64_t next = end(block) - query_tile * queue_tiles;
    return int(next < queue_tiles ? next : queue_tiles);
  }
  __device__ int part(int block, int query_tile) const { return block + query_tile; }
  __device__ int first_block(int query_tile) const {
    return int(query_tile * queue_tiles / units_per_block);
  }
  __device__ int last_block(int query_tile) const {
    return int(((query_tile + 1) * queue_tiles - 1) / units_per_block);
  }
};

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

constexpr int kForwardThreads = 128;

// Sizes that keep accumulators within the registers, and two blocks on a multiprocessor.
template <typename Kind, int kDim_>
struct Sizes {
  using Element = typename Kind::Element;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kForwardThreads / 32;
  static constexpr int kLeftTiles = kDim > 128 || Kind::kPrecise ? 1 : 2;  // of 16 queries, a warp
  static constexpr int kWarpQueries = 16 * kLeftTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kRowBytes = kDim * int(sizeof(Element));
  static constexpr int kKeys = kRowBytes < 256 ? 64 : 16384 / kRowBytes;  // in a tile of the queue
  static constexpr int kRightTiles = kKeys / 8;
  static constexpr int kSteps = kRowBytes / 32;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kStages = kQueryBytes > 32768 ? 2 : 3;  // tiles of the queue under way
  static constexpr int kStageBytes = kKeys * kRowBytes;
  static constexpr int kPositivesOffset = kQueryBytes + kStages * kStageBytes;
  static constexpr int kTileOffset = kPositivesOffset + kQueries * 4;
  static constexpr int kIdsOffset = kTileOffset + kForwardThreads * 4;
  static constexpr int shared_bytes(bool ids) {
    return kIdsOffset + (ids ? (kQueries + kStages * kKeys) * 8 : 0);
  }
};

// A weight may grow to 2^(kHeadroom + kSlack): the peak follows a larger logit only when it must,
// as rescaling what has been gathered costs more than the largest logit's place being approximate.
// For float16, whose smallest normal number is 2^-14, the weights lie as high as they can.
template <typename Kind>
constexpr float kHeadroom = 0;
template <>
constexpr float kHeadroom<SixteenBit<Half>> = 7;
constexpr float kSlack = 8;
constexpr float kNoPeak = -1e38f;  // below any logit, and finite: -infinity - -infinity is NaN

template <typename Kind, int kDim, bool kWithDirection>
struct Gathered {
  using S = Sizes<Kind, kDim>;
  static constexpr int kLines = 2 * S::kLeftTiles;  // queries of a lane
  float peak[kLines], sum[kLines];
  int rank[kLines];
  float direction[S::kLeftTiles][kWithDirection ? kDim / 8 : 1][4];
};

// Calls visit(m, n, i, line) for every value of a lane: at [m][n][i], of the query `line`.
template <int kLeftTiles, int kRightTiles, typename Visit>
__device__ __forceinline__ void for_each_value(Visit visit) {
#pragma unroll
  for (int m = 0; m < kLeftTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kRightTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i, 2 * m + i / 2);
    }
  }
}

// sums (left tile, right tile) = left operands . right operands, over the whole depth.
template <typename Kind, int kSteps, int kLeftTiles, int kRightTiles, typename LoadLeft,
          typename LoadRight>
__device__ __forceinline__ void multiply(float (&sums)[kLeftTiles][kRightTiles][4],
                                         LoadLeft load_left, LoadRight load_right) {
  constexpr int kRun = 4;  // steps in a row that tensor cores sum up where sums must be rounded;
                           // unrolled further, the compiler runs out of registers
  for_each_value<kLeftTiles, kRightTiles>([&](int m, int n, int i, int) { sums[m][n][i] = 0; });
#pragma unroll 1
  for (int start = 0; start < kSteps; start += kRun) {
    float run[kLeftTiles][kRightTiles][4] = {};
    auto& target = Kind::kPrecise ? run : sums;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int step = start + i;
      typename Kind::A left[kLeftTiles];
      uint32_t raw[4];
#pragma unroll
      for (int m = 0; m < kLeftTiles; ++m) {
        load_left(raw, m, step);
        left[m] = Kind::left(raw);
      }
#pragma unroll
      for (int n = 0; n < kRightTiles; n += 2) {
        load_right(raw, n, step);
        const auto near = Kind::right(raw[0], raw[1]), far = Kind::right(raw[2], raw[3]);
#pragma unroll
        for (int m = 0; m < kLeftTiles; ++m) {
          Kind::multiply_add(target[m][n], left[m], near);
          Kind::multiply_add(target[m][n + 1], left[m], far);
        }
      }
    }
    if constexpr (Kind::kPrecise) {
      for_each_value<kLeftTiles, kRightTiles>(
          [&](int m, int n, int i, int) { sums[m][n][i] += run[m][n][i]; });
    }
  }
}

// positives[i] = query . key of query i, by the same instructions in the same order as query .
// queue, so that a key that also stands in the queue ties exactly. The keys come from global
// memory.
template <typename Kind, int kDim>
__device__ __forceinline__ void multiply_with_keys(
    const ForwardArguments<typename Kind::Element>& p, int64_t first_query,
    Tile<typename Kind::Element, kDim> queries, float* positives) {
  using S = Sizes<Kind, kDim>;
  using Operand = Tile<typename Kind::Element, kDim>;
  const int thread = thread_id(), lane = thread % kWarpLanes, row = lane / 4, pair = lane % 4;
  const int place = left_place(queries, lane);
#pragma unroll
  for (int m = 0; m < S::kLeftTiles; ++m) {
    const int first_row = thread / kWarpLanes * S::kWarpQueries + 16 * m;
    auto left = [&](uint32_t (&raw)[4], int, int step) {
      load_operand<Operand>(raw, place, first_row, step);
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
        shared_store(positives + first_row + 8 * half + row, positive);
      }
    }
  }
}

// Moves the peak of lines whose largest logit outgrew it, and rescales what was gathered. All lanes
// of a line must agree on its peak.
template <typename Kind, int kDim, bool kWithDirection>
__device__ __forceinline__ void raise_peaks(Gathered<Kind, kDim, kWithDirection>& gathered,
                                            float (&largest)[2 * Sizes<Kind, kDim>::kLeftTiles]) {
#pragma unroll
  for (int line = 0; line < gathered.kLines; ++line) {
    largest[line] = fmaxf(largest[line], shuffle_xor(largest[line], 1));
    largest[line] = fmaxf(largest[line], shuffle_xor(largest[line], 2));
    if (!(largest[line] - gathered.peak[line] > kHeadroom<Kind> + kSlack)) continue;
    const float peak = largest[line] - kHeadroom<Kind>;
    const float factor = exp2_fast(gathered.peak[line] - peak);
    gathered.peak[line] = peak;
    gathered.sum[line] *= factor;
    if constexpr (kWithDirection) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        gathered.direction[line / 2][n][line % 2 * 2] *= factor;
        gathered.direction[line / 2][n][line % 2 * 2 + 1] *= factor;
      }
    }
  }
}

// direction += weights . tile of the queue.
template <typename Kind, int kDim>
__device__ __forceinline__ void add_directions(
    const float (&weights)[Sizes<Kind, kDim>::kLeftTiles][Sizes<Kind, kDim>::kRightTiles][4],
    Tile<typename Kind::Element, kDim> keys, Gathered<Kind, kDim, true>& gathered) {
  using S = Sizes<Kind, kDim>;
  const int place = values_place(keys, thread_id() % kWarpLanes);
  // Where long sums must be rounded, those of this tile are apart.
  constexpr int kSteps = S::kKeys / Kind::kStepDepth;
  constexpr int kOuterSteps = Kind::kPrecise ? 1 : kSteps, kInnerSteps = kSteps / kOuterSteps;
#pragma unroll
  for (int outer = 0; outer < kOuterSteps; ++outer) {
    typename Kind::A left[kInnerSteps][S::kLeftTiles];
#pragma unroll
    for (int inner = 0; inner < kInnerSteps; ++inner) {
#pragma unroll
      for (int m = 0; m < S::kLeftTiles; ++m) {
        left[inner][m] = Kind::left_of_results(weights[m], outer * kInnerSteps + inner);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      float run[S::kLeftTiles][2][4] = {};
#pragma unroll
      for (int inner = 0; inner < kInnerSteps; ++inner) {
        uint32_t raw[4];
        load_values<Tile<typename Kind::Element, kDim>>(raw, place, outer * kInnerSteps + inner,
                                                        n / 2);
        const auto near = Kind::right(raw[0], raw[1]), far = Kind::right(raw[2], raw[3]);
#pragma unroll
        for (int m = 0; m < S::kLeftTiles; ++m) {
          auto& direction = gathered.direction[m];
          Kind::multiply_add(Kind::kPrecise ? run[m][0] : direction[n], left[inner][m], near);
          Kind::multiply_add(Kind::kPrecise ? run[m][1] : direction[n + 1], left[inner][m], far);
        }
      }
      if constexpr (Kind::kPrecise) {
        for_each_value<S::kLeftTiles, 2>(
            [&](int m, int i, int j, int) { gathered.direction[m][n + i][j] += run[m][i][j]; });
      }
    }
  }
}

// Whether a lane has a query and a key whose ids may be the same: the lower halves tell apart
// nearly all, at half the cost.
template <typename S>
__device__ __forceinline__ bool may_share_an_id(const int64_t* query_ids,
                                                const int64_t* queue_ids) {
  const int thread = thread_id(), pair = thread % 4;
  const int row = thread / kWarpLanes * S::kWarpQueries + thread % kWarpLanes / 4;
  int of_queries[2 * S::kLeftTiles];
#pragma unroll
  for (int line = 0; line < 2 * S::kLeftTiles; ++line) {
    of_queries[line] = int(shared_load(query_ids + row + 8 * line));
  }
  bool equal = false;
#pragma unroll
  for (int key = 0; key < 2 * S::kRightTiles; ++key) {
    const int id = int(shared_load(queue_ids + key / 2 * 8 + 2 * pair + key % 2));
#pragma unroll
    for (int line = 0; line < 2 * S::kLeftTiles; ++line) equal |= id == of_queries[line];
  }
  return equal;
}

// Which keys of a lane do not count for its query `line`, a bit each: those beyond the end of the
// queue, and those with the id of the query.
template <typename S, bool kWithIds>
__device__ __forceinline__ uint32_t left_out(int line, int keys_left, const int64_t* query_ids,
                                             const int64_t* queue_ids) {
  const int thread = thread_id(), pair = thread % 4;
  const int row = thread / kWarpLanes * S::kWarpQueries + thread % kWarpLanes / 4 + 8 * line;
  uint32_t out = 0;
#pragma unroll 1  // rare, and short of registers
  for (int bit = 0; bit < 2 * S::kRightTiles; ++bit) {
    const int key = bit / 2 * 8 + 2 * pair + bit % 2;
    bool counts = key < keys_left;
    if constexpr (kWithIds) {
      const int64_t id = shared_load(queue_ids + key);
      counts = counts && (id < 0 || id != shared_load(query_ids + row));
    }
    out |= uint32_t(!counts) << bit;
  }
  return out;
}

// One tile of the queue: logits, rank, weights, direction.
template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__device__ __forceinline__ void add_tile(Tile<typename Kind::Element, kDim> queries,
                                         Tile<typename Kind::Element, kDim> keys, int tile,
                                         const int64_t* query_ids, const int64_t* queue_ids,
                                         const float* positives,
                                         const ForwardArguments<typename Kind::Element>& p,
                                         Gathered<Kind, kDim, kWithDirection>& gathered) {
  using S = Sizes<Kind, kDim>;
  using Operand = Tile<typename Kind::Element, kDim>;
  const int thread = thread_id(), lane = thread % kWarpLanes;
  const int first_row = thread / kWarpLanes * S::kWarpQueries;
  float logits[S::kLeftTiles][S::kRightTiles][4];
  const int of_queries = left_place(queries, lane) + first_row * Operand::kRowBytes;
  const int of_keys = right_place(keys, lane);
  multiply<Kind, S::kSteps>(
      logits,
      [&](uint32_t (&raw)[4], int m, int step) {
        load_operand<Operand>(raw, of_queries, 16 * m, step);
      },
      [&](uint32_t (&raw)[4], int n, int step) {
        load_operand<Operand>(raw, of_keys, 8 * n, step);
      });
  const int64_t left = p.queue.count - int64_t(tile) * S::kKeys;
  const int keys_left = left < S::kKeys ? int(left) : S::kKeys;
  bool leave_out = keys_left < S::kKeys;
  if constexpr (kWithIds) leave_out = leave_out || may_share_an_id<S>(query_ids, queue_ids);
  float positive[gathered.kLines], largest[gathered.kLines];
#pragma unroll
  for (int line = 0; line < gathered.kLines; ++line) {
    positive[line] = shared_load(positives + first_row + 8 * line + lane / 4);
    largest[line] = kNoPeak;
  }
  if (leave_out) {
    constexpr float kNothing = -__builtin_huge_valf();
    uint32_t out[gathered.kLines];
#pragma unroll
    for (int line = 0; line < gathered.kLines; ++line) {
      out[line] = left_out<S, kWithIds>(line, keys_left, query_ids, queue_ids);
      // Below, they will be counted where the positive is NaN or -infinity.
      if (!(kNothing < positive[line])) gathered.rank[line] -= count_bits(out[line]);
    }
    for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
      if (out[line] >> (2 * n + i % 2) & 1) logits[m][n][i] = kNothing;
    });
  }
  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
    gathered.rank[line] += !(logits[m][n][i] < positive[line]);  // so counts a NaN
    largest[line] = fmaxf(largest[line], logits[m][n][i]);
  });
  bool outgrown = false;
#pragma unroll
  for (int line = 0; line < gathered.kLines; ++line) {
    largest[line] *= p.scale;
    outgrown |= largest[line] - gathered.peak[line] > kHeadroom<Kind> + kSlack;
  }
  if (warp_any(outgrown)) raise_peaks(gathered, largest);

  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
    logits[m][n][i] = exp2_fast(fmaf(logits[m][n][i], p.scale, -gathered.peak[line]));
    gathered.sum[line] += logits[m][n][i];
  });
  if constexpr (kWithDirection) add_directions<Kind, kDim>(logits, keys, gathered);
}

// Writes a part: the four lanes of a line add up what they have.
template <typename Kind, int kDim, bool kWithDirection>
__device__ __forceinline__ void write_part(const ForwardArguments<typename Kind::Element>& p,
                                           int query_tile, const float* positives,
                                           Gathered<Kind, kDim, kWithDirection>& gathered) {
  using S = Sizes<Kind, kDim>;
  const int64_t first_query = int64_t(query_tile) * S::kQueries;
  const int part = p.schedule.part(block_id(), query_tile);
  const int lane = thread_id() % kWarpLanes, pair = lane % 4;
#pragma unroll
  for (int line = 0; line < gathered.kLines; ++line) {
    float sum = gathered.sum[line];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    int rank = gathered.rank[line];
    rank += shuffle_xor(rank, 1);
    rank += shuffle_xor(rank, 2);
    const int row = thread_id() / kWarpLanes * S::kWarpQueries + 8 * line + lane / 4;
    if (first_query + row >= p.query.count) continue;
    const int64_t place = int64_t(part) * S::kQueries + row;
    if (pair == 0) {
      p.statistics[place] = {gathered.peak[line], sum, shared_load(positives + row), rank};
    }
    if constexpr (kWithDirection) {
      float* direction = p.directions + place * p.direction_dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = 8 * n + 2 * pair;
        if (column >= p.direction_dim) continue;
        direction[column] = gathered.direction[line / 2][n][line % 2 * 2];
        direction[column + 1] = gathered.direction[line / 2][n][line % 2 * 2 + 1];
      }
    }
  }
}

// Starts to copy ids [first, first + kCount), zeros beyond the last.
template <int kCount>
__device__ __forceinline__ void copy_ids(const int64_t* ids, int64_t stride, int64_t first,
                                         int64_t count, int64_t* to) {
  static_assert(kCount <= kForwardThreads);
  const int i = thread_id();
  const bool valid = first + i < count;
  if (i < kCount) cp_async<8>(to + i, valid ? ids + (first + i) * stride : ids, valid);
}

// Streams tiles [first, last) of the queue past a tile of queries.
template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__device__ __forceinline__ void gather_part(const ForwardArguments<typename Kind::Element>& p,
                                            const int* at) {
  using S = Sizes<Kind, kDim>;
  const int query_tile = shared_load(at);
  const int first = p.schedule.first_queue_tile(block_id(), query_tile);
  const int last = p.schedule.end_queue_tile(block_id(), query_tile);
  using Operand = Tile<typename Kind::Element, kDim>;
  const int64_t first_query = int64_t(query_tile) * S::kQueries;
  const Operand queries{0};
  auto* positives = reinterpret_cast<float*>(shared_memory() + S::kPositivesOffset);
  auto keys = [&](int tile) {
    return Operand{S::kQueryBytes + tile % S::kStages * S::kStageBytes};
  };
  auto* query_ids = reinterpret_cast<int64_t*>(shared_memory() + S::kIdsOffset);
  auto queue_ids = [&](int tile) { return query_ids + S::kQueries + tile % S::kStages * S::kKeys; };
  auto start_copy = [&](int tile) {
    if (tile < last) {
      const int64_t first_key = int64_t(tile) * S::kKeys;
      copy_rows<S::kKeys, kForwardThreads>(p.queue, first_key, keys(tile), p.query.data);
      if (kWithIds) {
        copy_ids<S::kKeys>(p.queue_ids, p.queue_ids_stride, first_key, p.queue.count,
                           queue_ids(tile));
      }
    }
    cp_async_commit();  // also without a tile, so that the groups keep count
  };

  block_barrier();  // the part before is done with the shared memory
  copy_rows<S::kQueries, kForwardThreads>(p.query, first_query, queries, p.query.data);
  if (kWithIds) {
    copy_ids<S::kQueries>(p.query_ids, p.query_ids_stride, first_query, p.query.count, query_ids);
  }
  cp_async_commit();
  for (int i = 0; i < S::kStages - 1; ++i) start_copy(first + i);

  Gathered<Kind, kDim, kWithDirection> gathered;
#pragma unroll
  for (int line = 0; line < gathered.kLines; ++line) {
    gathered.peak[line] = kNoPeak;
    gathered.sum[line] = 0;
    gathered.rank[line] = 0;
  }
  cp_async_wait<S::kStages - 1>();
  block_barrier();  // all copies of the queries have arrived
  multiply_with_keys<Kind>(p, first_query, queries, positives);
  for_each_value<S::kLeftTiles, kWithDirection ? kDim / 8 : 1>(
      [&](int m, int n, int i, int) { gathered.direction[m][n][i] = 0; });

  for (int tile = first; tile < last; ++tile) {
    cp_async_wait<S::kStages - 2>();
    block_barrier();  // all copies of this tile have arrived, and nobody reads the one before
    start_copy(tile + S::kStages - 1);
    add_tile<Kind, kDim, kWithDirection, kWithIds>(queries, keys(tile), tile, query_ids,
                                                   queue_ids(tile), positives, p, gathered);
  }
  write_part(p, shared_load(at), positives, gathered);
}

template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__global__ void __launch_bounds__(kForwardThreads, 2)
    queue_info_nce_forward_kernel(ForwardArguments<typename Kind::Element> p) {
  // All registers are taken, so where a thread is in its run lies in shared memory.
  using S = Sizes<Kind, kDim>;
  auto* tile = reinterpret_cast<int*>(shared_memory() + S::kTileOffset) + thread_id();
  shared_store(tile, p.schedule.first_query_tile(block_id()));
  while (p.schedule.has_query_tile(block_id(), shared_load(tile))) {
    gather_part<Kind, kDim, kWithDirection, kWithIds>(p, tile);
    shared_store(tile, shared_load(tile) + 1);
  }
}

}  // namespace medmoco
