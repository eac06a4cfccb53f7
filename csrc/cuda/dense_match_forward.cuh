// The kernel of dense_match: for each query position the best key by dot product over the key's
// length. The query's length does not matter to the choice, so it is left to the end.
//
// A block holds a tile of query positions and streams tiles of the image's keys past it, each in
// chunks of channels, a ring of them under way. Dot products stay in registers; lengths are summed
// up from the same operands. What a block has found is one part; dense_match_combine.cuh chooses
// among the parts.

#pragma once

#include "dense_match_found.cuh"
#include "dense_match_products.cuh"
#include "schedule.cuh"

namespace medmoco {

template <typename Element>
struct MatchArguments {
  FeatureMap<Element> query, key;
  int64_t channels;
  int query_tiles;  // of an image; the schedule's go through all images
  Schedule schedule;
  int query_slots;  // of chunks in shared memory
  Found* found;     // (parts, query tile)
};

// A key of the tile: its dot products count as dot * factor + bias.
struct alignas(8) KeyScale {
  float factor, bias;  // 1 / length, or NaN; and 0, or -infinity for none
};
struct alignas(16) TwoKeyScales {
  KeyScale keys[2];
};
struct alignas(8) Candidate {
  float score;
  int position;  // negative: irregular
};

// What lies in shared memory: chunks of queries, chunks of keys, then what warps tell each other.
template <typename S>
struct MatchShared {
  static constexpr int kSquareBytes = 2 * kMatchThreads * int(sizeof(SquareShare));
  static constexpr int kCandidateBytes = 2 * kMatchThreads * int(sizeof(Candidate));
  static_assert(kCandidateBytes <= kSquareBytes);
  int query_slots;

  __device__ __forceinline__ int query_chunk(int slot) const {
    return slot * S::QueryChunk::kBytes;
  }
  __device__ __forceinline__ int key_chunk(int slot) const {
    return query_slots * S::QueryChunk::kBytes + slot * S::KeyChunk::kBytes;
  }
  __device__ __forceinline__ unsigned char* behind_chunks() const {
    return shared_memory() + key_chunk(S::kStages);
  }
  // Of query or key `i` of the tile, from one of the two warps that share it.
  __device__ __forceinline__ SquareShare* key_square(int share, int i) const {
    return reinterpret_cast<SquareShare*>(behind_chunks()) + share * kMatchThreads + i;
  }
  __device__ __forceinline__ SquareShare* query_square(int share, int i) const {
    return key_square(share + 2, i);
  }
  __device__ __forceinline__ KeyScale* key_scale(int i) const {
    return reinterpret_cast<KeyScale*>(behind_chunks() + 2 * kSquareBytes) + i;
  }
  __device__ __forceinline__ Candidate* candidate(int share, int i) const {
    return reinterpret_cast<Candidate*>(key_scale(kMatchThreads)) + share * kMatchThreads + i;
  }
  int bytes() const {
    return query_slots * S::QueryChunk::kBytes + S::kStages * S::KeyChunk::kBytes +
           2 * kSquareBytes + kMatchThreads * int(sizeof(KeyScale)) + kCandidateBytes;
  }
};

// Starts the copies of a part, chunk after chunk.
template <typename S>
struct ChunkCopies {
  int tile, chunk = 0, slot = 0;  // of the next copy
  int first_tile;

  template <typename Element>
  __device__ __forceinline__ void start(const MatchArguments<Element>& p, int64_t image,
                                        int64_t first_query, int chunks, int end_tile) {
    const MatchShared<S> shared{p.query_slots};
    if (tile < end_tile) {
      const int64_t channel = int64_t(chunk) * kChunkDepth<Element>;
      const bool resident = p.query_slots >= chunks;
      if (!resident || tile == first_tile) {
        const auto window =
            MapWindow<Element>::of(p.query, p.channels, image, channel, first_query);
        S::QueryChunk::copy(window, shared.query_chunk(resident ? chunk : slot), p.found);
      }
      const auto window =
          MapWindow<Element>::of(p.key, p.channels, image, channel, int64_t(tile) * S::kKeys);
      S::KeyChunk::copy(window, shared.key_chunk(slot), p.found);
    }
    cp_async_commit();  // also without a chunk, so that the groups keep count
    if (++chunk == chunks) {
      chunk = 0;
      ++tile;
    }
    if (++slot == S::kStages) slot = 0;
  }
};

// The best key so far of each of a lane's queries.
template <typename S>
struct Best {
  float score[S::kLines];
  int position[S::kLines];
  bool irregular;
};

// Tells the other warps about the squares of this warp's vectors, at place(0), place(1), ...
template <int kVectors, typename Place>
__device__ __forceinline__ void share_squares(Squares<kVectors>& squares, Place place) {
  squares.gather();
  if (thread_id() % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    shared_store(place(8 * i + thread_id() % kWarpLanes / 4),
                 SquareShare{squares.sum[i], squares.seen[i]});
  }
}

// Turns the squares of the tile's keys into scales, for all threads to read.
template <typename S>
__device__ __forceinline__ void scale_keys(const MatchShared<S>& shared,
                                           Squares<S::kRightTiles>& squares, int64_t keys_left) {
  const int thread = thread_id(), warp = thread / kWarpLanes;
  share_squares(squares,
                [&](int i) { return shared.key_square(warp / 2, warp % 2 * S::kWarpKeys + i); });
  block_barrier();  // squares are there, and nobody reads chunks or the scales before
  if (thread < S::kKeys) {
    const float factor = inverse_length(shared_load(shared.key_square(0, thread)),
                                        shared_load(shared.key_square(1, thread)));
    const bool exists = thread < keys_left;
    shared_store(shared.key_scale(thread),
                 exists ? KeyScale{factor, 0} : KeyScale{0, -__builtin_huge_valf()});
  }
  block_barrier();  // all scales are there
}

// Compares the scores of a tile with the best so far.
template <typename S>
__device__ __forceinline__ void keep_best(Dots<S>& dots, const MatchShared<S>& shared,
                                          int64_t first_key, Best<S>& best) {
  const int thread = thread_id();
  const int first = thread / kWarpLanes % 2 * S::kWarpKeys + thread % 4 * 2;
  float most[S::kLines];
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) most[line] = -__builtin_huge_valf();
#pragma unroll
  for (int n = 0; n < S::kRightTiles; ++n) {
    const auto scales =
        shared_load(reinterpret_cast<const TwoKeyScales*>(shared.key_scale(first + 8 * n)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const KeyScale key = scales.keys[i];
      best.irregular |= key.factor != key.factor;
#pragma unroll
      for (int line = 0; line < S::kLines; ++line) {
        float& score = dots[line / 2][n][line % 2 * 2 + i];
        score = fmaf(score, key.factor, key.bias);
        most[line] = fmaxf(most[line], score);
      }
    }
  }
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    if (!(most[line] > best.score[line])) continue;  // soon, nearly always
    best.score[line] = most[line];
    int position = 0;
#pragma unroll
    for (int i = 2 * S::kRightTiles - 1; i >= 0; --i) {  // the first of equals is the last to stay
      const float score = dots[line / 2][i / 2][line % 2 * 2 + i % 2];
      if (score == most[line]) position = 8 * (i / 2) + i % 2;
    }
    best.position[line] = int(first_key) + first + position;
  }
}

// Writes a part: the four lanes of a query, and then the two warps of it, agree on the best.
template <typename S>
__device__ __forceinline__ void write_part(const MatchShared<S>& shared, Best<S>& best,
                                           int64_t queries_left, Found* found) {
  auto better = [](const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.position < b.position);
  };
  const int thread = thread_id(), lane = thread % kWarpLanes, warp = thread / kWarpLanes;
  const bool irregular = warp_any(best.irregular);
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    Candidate mine{best.score[line], best.position[line]};
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      const Candidate other{shuffle_xor(mine.score, mask), shuffle_xor(mine.position, mask)};
      if (better(other, mine)) mine = other;
    }
    if (irregular) mine.position = -1;
    const int row = warp / 2 * S::kWarpQueries + 8 * line + lane / 4;
    if (lane % 4 == 0) shared_store(shared.candidate(warp % 2, row), mine);
  }
  block_barrier();  // all candidates and the squares of the queries are there
  if (thread >= S::kQueries || thread >= queries_left) return;
  Candidate chosen = shared_load(shared.candidate(0, thread));
  const Candidate other = shared_load(shared.candidate(1, thread));
  const bool known = chosen.position >= 0 && other.position >= 0;
  if (better(other, chosen)) chosen = other;
  found[thread] = {known ? match_of(chosen.score, uint32_t(chosen.position)) : kIrregular,
                   inverse_length(shared_load(shared.query_square(0, thread)),
                                  shared_load(shared.query_square(1, thread)))};
}

// Streams the tiles of keys that this block has to see past a tile of queries.
template <typename S>
__device__ __forceinline__ void match_part(const MatchArguments<typename S::Element>& p,
                                           int query_tile) {
  using Window = MapWindow<typename S::Element>;
  constexpr int kDepth = kChunkDepth<typename S::Element>;
  const MatchShared<S> shared{p.query_slots};
  const int64_t image = query_tile / p.query_tiles;
  const int64_t first_query = int64_t(query_tile % p.query_tiles) * S::kQueries;
  const int first = p.schedule.first_queue_tile(block_id(), query_tile);
  const int end = p.schedule.end_queue_tile(block_id(), query_tile);
  const int chunks = int((p.channels + kDepth - 1) / kDepth);
  const int thread = thread_id(), warp = thread / kWarpLanes;

  // The part before is done with its chunks: see scale_keys.
  ChunkCopies<S> copies{.tile = first, .first_tile = first};
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) copies.start(p, image, first_query, chunks, end);

  Best<S> best;
#pragma unroll
  for (int line = 0; line < S::kLines; ++line) {
    best.score[line] = -__builtin_huge_valf();
    best.position[line] = 0x7fffffff;
  }
  best.irregular = false;
  int slot = 0;
#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    const int64_t first_key = int64_t(tile) * S::kKeys;
    Dots<S> dots;
    Squares<S::kLines> query_squares;
    Squares<S::kRightTiles> key_squares;
    for_each_value<S::kLeftTiles, S::kRightTiles>(
        [&](int m, int n, int i, int) { dots[m][n][i] = 0; });
    query_squares.clear();
    key_squares.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<S::kStages - 2>();
      block_barrier();  // this chunk has arrived, and nobody reads the one before
      copies.start(p, image, first_query, chunks, end);
      const int64_t channel = int64_t(chunk) * kDepth;
      const int query_slot = p.query_slots >= chunks ? chunk : slot;
      const typename S::QueryChunk::Reader query(
          shared.query_chunk(query_slot), warp / 2 * S::kWarpQueries,
          Window::of(p.query, p.channels, image, channel, first_query));
      const typename S::KeyChunk::Reader key(
          shared.key_chunk(slot), warp % 2 * S::kWarpKeys,
          Window::of(p.key, p.channels, image, channel, first_key));
      add_chunk<S>(dots, query, key, tile == first, query_squares, key_squares);
      if (++slot == S::kStages) slot = 0;
    }
    if (tile == first) {
      share_squares(query_squares, [&](int i) {
        return shared.query_square(warp % 2, warp / 2 * S::kWarpQueries + i);
      });
    }
    scale_keys(shared, key_squares, p.key.positions - first_key);
    keep_best<S>(dots, shared, first_key, best);
  }
  const int64_t part = p.schedule.part(block_id(), query_tile);
  write_part(shared, best, p.query.positions - first_query, p.found + part * S::kQueries);
}

template <typename S>
__global__ void __launch_bounds__(kMatchThreads, S::kBlocksPerMultiprocessor)
    dense_match_forward_kernel(MatchArguments<typename S::Element> p) {
  for (int tile = p.schedule.first_query_tile(block_id());
       p.schedule.has_query_tile(block_id(), tile); ++tile) {
    match_part<S>(p, tile);
  }
}

}  // namespace medmoco
