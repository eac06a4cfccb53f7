// What queue_info_nce does with a tile of the queue: logits, rank, weights, direction, gathered
// over the tiles as in a softmax that is computed online.

#pragma once

#include "products.cuh"

namespace medmoco {

constexpr int kForwardThreads = 128;

// Sizes that keep accumulators within the registers, and two blocks on a multiprocessor.
template <typename Kind, int kDim_>
struct Sizes {
  using Element = typename Kind::Element;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kForwardThreads / 32;
  static constexpr int kLeftTiles = kDim > 128 || Kind::kPrecise ? 1 : 2;  // of 16 queries, a warp
  static constexpr int kLines = 2 * kLeftTiles;  // queries that a lane has values of
  static constexpr int kWarpQueries = 16 * kLeftTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kRowBytes = kDim * int(sizeof(Element));
  static constexpr int kKeys = kRowBytes < 256 ? 64 : 16384 / kRowBytes;  // in a tile of the queue
  static constexpr int kRightTiles = kKeys / 8;
  static constexpr int kSteps = kRowBytes / 32;
  static constexpr int kQueryBytes = kQueries * kRowBytes;
  static constexpr int kStages = kQueryBytes > 32768 ? 2 : 3;  // tiles of the queue under way
  static constexpr int kStageBytes = kKeys * kRowBytes;
};

// What lies in shared memory, and where.
template <typename Kind, int kDim>
struct Shared {
  using S = Sizes<Kind, kDim>;
  using Operand = Tile<typename Kind::Element, kDim>;
  static constexpr int kPositives = S::kQueryBytes + S::kStages * S::kStageBytes;
  static constexpr int kProgress = kPositives + S::kQueries * int(sizeof(float));
  static constexpr int kIds = kProgress + kForwardThreads * int(sizeof(int));

  static constexpr int bytes(bool with_ids) {
    return kIds + (with_ids ? (S::kQueries + S::kStages * S::kKeys) * int(sizeof(int64_t)) : 0);
  }
  static __device__ __forceinline__ Operand queries() { return {0}; }
  static __device__ __forceinline__ Operand keys(int queue_tile) {
    return {S::kQueryBytes + queue_tile % S::kStages * S::kStageBytes};
  }
  static __device__ __forceinline__ float* positives() {
    return reinterpret_cast<float*>(shared_memory() + kPositives);
  }
  // Where this thread is in its run. In shared memory, as all registers are taken.
  static __device__ __forceinline__ int* query_tile() {
    return reinterpret_cast<int*>(shared_memory() + kProgress) + thread_id();
  }
  static __device__ __forceinline__ int64_t* query_ids() {
    return reinterpret_cast<int64_t*>(shared_memory() + kIds);
  }
  static __device__ __forceinline__ int64_t* queue_ids(int queue_tile) {
    return query_ids() + S::kQueries + queue_tile % S::kStages * S::kKeys;
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
// Finite, as -infinity - -infinity is NaN; logits below it count as left out.
constexpr float kNoPeak = -1e38f;

// A lane's share of the logits of a warp's queries and a tile of the queue, and then of the
// weights.
template <typename Kind, int kDim>
using Logits = float[Sizes<Kind, kDim>::kLeftTiles][Sizes<Kind, kDim>::kRightTiles][4];

// What a lane has gathered so far, of a softmax over the queue.
template <typename Kind, int kDim, bool kWithDirection>
struct Gathered {
  using S = Sizes<Kind, kDim>;
  float peak[S::kLines], sum[S::kLines];
  int rank[S::kLines];
  float direction[S::kLeftTiles][kWithDirection ? kDim / 8 : 1][4];
};

// Moves the peak of lines whose largest logit outgrew it, and rescales what was gathered. All lanes
// of a line must agree on its peak.
template <typename Kind, int kDim, bool kWithDirection>
__device__ __forceinline__ void raise_peaks(Gathered<Kind, kDim, kWithDirection>& gathered,
                                            float (&largest)[Sizes<Kind, kDim>::kLines]) {
  using S = Sizes<Kind, kDim>;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
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
__device__ __forceinline__ void add_directions(const Logits<Kind, kDim>& weights, int queue_tile,
                                               Gathered<Kind, kDim, true>& gathered) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  const int place = values_place(M::keys(queue_tile), thread_id() % kWarpLanes);
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
      // Keeps values from being loaded far ahead, for which registers do not reach.
      if constexpr (Kind::kPrecise && kDim > 128) warp_barrier();
      float run[S::kLeftTiles][2][4] = {};
#pragma unroll
      for (int inner = 0; inner < kInnerSteps; ++inner) {
        uint32_t raw[4];
        load_values<typename M::Operand>(raw, place, outer * kInnerSteps + inner, n / 2);
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
template <typename Kind, int kDim>
__device__ __forceinline__ bool may_share_an_id(int queue_tile) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  const int thread = thread_id(), pair = thread % 4;
  const int row = thread / kWarpLanes * S::kWarpQueries + thread % kWarpLanes / 4;
  int of_queries[S::kLines];
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    of_queries[line] = int(shared_load(M::query_ids() + row + 8 * line));
  }
  bool equal = false;
#pragma unroll
  for (int key = 0; key < 2 * S::kRightTiles; ++key) {
    const int id = int(shared_load(M::queue_ids(queue_tile) + key / 2 * 8 + 2 * pair + key % 2));
#pragma unroll
    for (int line = 0; line < S::kLines; ++line) equal |= id == of_queries[line];
  }
  return equal;
}

// Which keys of a lane do not count for its queries, a bit each: those beyond the end of the queue,
// and those with the id of the query.
template <typename Kind, int kDim, bool kWithIds>
__device__ __forceinline__ void find_left_out(uint32_t (&out)[Sizes<Kind, kDim>::kLines],
                                              int queue_tile, int keys_left) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  const int thread = thread_id(), pair = thread % 4;
  const int row = thread / kWarpLanes * S::kWarpQueries + thread % kWarpLanes / 4;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) out[line] = 0;
#pragma unroll 1  // short of registers
  for (int bit = 0; bit < 2 * S::kRightTiles; ++bit) {
    const int key = bit / 2 * 8 + 2 * pair + bit % 2;
    int64_t id = -1;
    if constexpr (kWithIds) id = shared_load(M::queue_ids(queue_tile) + key);
#pragma unroll
    for (int line = 0; line < S::kLines; ++line) {
      bool counts = key < keys_left;
      if constexpr (kWithIds) {
        counts = counts && (id < 0 || id != shared_load(M::query_ids() + row + 8 * line));
      }
      out[line] |= uint32_t(!counts) << bit;
    }
  }
}

// Takes the logits that do not count to -infinity, and out of the rank, into which they will be
// counted where the positive is NaN or -infinity.
template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__device__ __forceinline__ void leave_out(Logits<Kind, kDim>& logits, int queue_tile,
                                          int64_t queue_size,
                                          const float (&positive)[Sizes<Kind, kDim>::kLines],
                                          Gathered<Kind, kDim, kWithDirection>& gathered) {
  using S = Sizes<Kind, kDim>;
  constexpr float kNothing = -__builtin_huge_valf();
  const int64_t left = queue_size - int64_t(queue_tile) * S::kKeys;
  const int keys_left = left < S::kKeys ? int(left) : S::kKeys;
  bool any = keys_left < S::kKeys;
  // The warp stays together: what follows is for all its lanes.
  if constexpr (kWithIds) any = warp_any(any || may_share_an_id<Kind, kDim>(queue_tile));
  if (!any) return;
  uint32_t out[S::kLines];
  find_left_out<Kind, kDim, kWithIds>(out, queue_tile, keys_left);
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    if (!(kNothing < positive[line])) gathered.rank[line] -= count_bits(out[line]);
  }
  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
    if (out[line] >> (2 * n + i % 2) & 1) logits[m][n][i] = kNothing;
  });
}

// logits = queries of the warp . tile of the queue, not yet divided by the temperature.
template <typename Kind, int kDim>
__device__ __forceinline__ void multiply_with_queue(Logits<Kind, kDim>& logits, int queue_tile) {
  using S = Sizes<Kind, kDim>;
  using M = Shared<Kind, kDim>;
  using Operand = typename M::Operand;
  const int thread = thread_id(), lane = thread % kWarpLanes;
  const int first_row = thread / kWarpLanes * S::kWarpQueries;
  const int queries = left_place(M::queries(), lane) + first_row * S::kRowBytes;
  const int keys = right_place(M::keys(queue_tile), lane);
  multiply<Kind, S::kSteps>(
      logits,
      [&](uint32_t (&raw)[4], int m, int step) {
        load_operand<Operand>(raw, queries, 16 * m, step);
      },
      [&](uint32_t (&raw)[4], int n, int step) { load_operand<Operand>(raw, keys, 8 * n, step); });
}

// One tile of the queue.
template <typename Kind, int kDim, bool kWithDirection, bool kWithIds>
__device__ __forceinline__ void add_tile(int queue_tile, int64_t queue_size, float scale,
                                         Gathered<Kind, kDim, kWithDirection>& gathered) {
  using S = Sizes<Kind, kDim>;
  Logits<Kind, kDim> logits;
  multiply_with_queue<Kind, kDim>(logits, queue_tile);

  const int thread = thread_id(), row = thread % kWarpLanes / 4;
  float positive[S::kLines], largest[S::kLines];
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    const int query = thread / kWarpLanes * S::kWarpQueries + 8 * line + row;
    positive[line] = shared_load(Shared<Kind, kDim>::positives() + query);
    largest[line] = kNoPeak;
  }
  leave_out<Kind, kDim, kWithDirection, kWithIds>(logits, queue_tile, queue_size, positive,
                                                  gathered);
  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
    count_unless_below(gathered.rank[line], logits[m][n][i], positive[line]);
    largest[line] = fmaxf(largest[line], logits[m][n][i]);
  });
  bool outgrown = false;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    largest[line] *= scale;
    outgrown |= largest[line] - gathered.peak[line] > kHeadroom<Kind> + kSlack;
  }
  if (warp_any(outgrown)) raise_peaks(gathered, largest);

  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int line) {
    logits[m][n][i] = exp2_fast(fmaf(logits[m][n][i], scale, -gathered.peak[line]));
    gathered.sum[line] += logits[m][n][i];
  });
  if constexpr (kWithDirection) add_directions<Kind, kDim>(logits, queue_tile, gathered);
}

}  // namespace medmoco
