// dense_match on the GPU, without PyTorch: what a caller needs to plan, allocate and launch.

#pragma once

#include <algorithm>
#include <stdexcept>

#include "dense_match_combine.cuh"

namespace medmoco {

template <typename Element>
struct DenseMatch {
  FeatureMap<Element> query, key;
  int64_t batch, channels;
  int64_t* index;     // (batch, query positions) contiguous
  float* similarity;  // likewise
};

// Where everything lies that the kernels hand to each other, one after the other.
template <typename Element>
struct MatchWorkspace {
  ReadableMap<Element> query, key;
  int64_t query_tiles;  // of an image
  Schedule schedule;
  int64_t query_bytes, key_bytes, found_bytes;

  int64_t bytes() const { return query_bytes + key_bytes + found_bytes; }
};

template <typename S>
MatchWorkspace<typename S::Element> plan_match(const DenseMatch<typename S::Element>& p,
                                               int multiprocessors) {
  using Map = ReadableMap<typename S::Element>;
  const auto query = Map::of(S::kLayout, p.query, p.channels);
  const auto key = Map::of(S::kLayout, p.key, p.channels);
  const int64_t query_tiles = (p.query.positions + S::kQueries - 1) / S::kQueries;
  const int64_t key_tiles = (p.key.positions + S::kKeys - 1) / S::kKeys;
  constexpr int64_t kMost = int64_t(1) << 30;  // the kernels count in 32 bits
  if (p.key.positions > kMost || p.batch * query_tiles > kMost) {
    throw std::runtime_error("dense_match: more than 2^30 key positions or tiles of queries");
  }
  const int64_t blocks = int64_t(multiprocessors) * S::kBlocksPerMultiprocessor;
  const auto schedule = Schedule::of(p.batch * query_tiles, key_tiles, blocks);
  return {query,
          key,
          query_tiles,
          schedule,
          query.bytes(p.batch),
          key.bytes(p.batch),
          schedule.parts() * S::kQueries * int64_t(sizeof(Found))};
}

template <typename S>
void launch_match(const DenseMatch<typename S::Element>& p,
                  const MatchWorkspace<typename S::Element>& plan, unsigned char* workspace,
                  Stream stream) {
  using Element = typename S::Element;
  MatchArguments<Element> a{};
  a.query = plan.query.copy_to(workspace, p.query, p.batch, stream);
  workspace += plan.query_bytes;
  a.key = plan.key.copy_to(workspace, p.key, p.batch, stream);
  workspace += plan.key_bytes;
  a.channels = p.channels;
  a.query_tiles = int(plan.query_tiles);
  a.schedule = plan.schedule;
  const int64_t chunks = (p.channels + kChunkDepth<Element> - 1) / kChunkDepth<Element>;
  a.query_slots = chunks <= S::kMostResident ? std::max(int(chunks), 1) : S::kStages;
  a.found = reinterpret_cast<Found*>(workspace);
  launch("dense_match", dense_match_forward_kernel<S>, dim3(unsigned(plan.schedule.blocks())),
         dim3(kMatchThreads), MatchShared<S>{a.query_slots}.bytes(), stream, a);

  ChooseArguments<Element> c{};
  c.query = p.query;
  c.key = p.key;
  c.batch = p.batch;
  c.channels = p.channels;
  c.query_tiles = a.query_tiles;
  c.tile_queries = S::kQueries;
  c.schedule = plan.schedule;
  c.found = a.found;
  c.index = p.index;
  c.similarity = p.similarity;
  const int64_t queries = p.batch * p.query.positions;
  launch("dense_match_choose", dense_match_choose_kernel<Element>,
         dim3(unsigned((queries + kChooseThreads - 1) / kChooseThreads)), dim3(kChooseThreads), 0,
         stream, c);
}

// Calls use.template operator()<S>() with the sizes of the kernel for these maps.
template <typename Kind, typename Use>
auto with_match_sizes(const DenseMatch<typename Kind::Element>& p, Use use) {
  auto with_layout = [&]<MapLayout kLayout>() {
    return std::max(p.query.positions, p.key.positions) > 64
               ? use.template operator()<MatchSizes<Kind, kLayout, true>>()
               : use.template operator()<MatchSizes<Kind, kLayout, false>>();
  };
  switch (choose_layout(p.query, p.key, p.channels)) {
    case MapLayout::kChannelsLast:
      return with_layout.template operator()<MapLayout::kChannelsLast>();
    case MapLayout::kUnaligned: return with_layout.template operator()<MapLayout::kUnaligned>();
    default: return with_layout.template operator()<MapLayout::kChannelsFirst>();
  }
}

// Index and similarity, on `stream`; there must be a channel and a key position. allocate(bytes)
// gives the workspace, aligned to 16 bytes. No query: nothing is launched.
template <typename Kind, typename Allocate>
void dense_match_forward(const DenseMatch<typename Kind::Element>& p, int multiprocessors,
                         Allocate allocate, Stream stream) {
  if (p.batch == 0 || p.query.positions == 0) return;
  with_match_sizes<Kind>(p, [&]<typename S>() {
    const auto plan = plan_match<S>(p, multiprocessors);
    launch_match<S>(p, plan, static_cast<unsigned char*>(allocate(plan.bytes())), stream);
  });
}

}  // namespace medmoco
