// queue_info_nce on the GPU, without PyTorch: what a caller needs to plan, allocate and launch.

#pragma once

#include "queue_info_nce_combine.cuh"

namespace medmoco {

constexpr int64_t kMostEmbedDim = 256;  // of the kernel; accumulators of more would not fit

template <typename Element>
struct QueueInfoNce {
  Rows<Element> query, key, queue;
  double temperature;
  const int64_t *query_ids, *queue_ids;  // both or neither; neither: null
  int64_t query_ids_stride, queue_ids_stride;
  float* loss;       // (batch)
  int32_t* rank;     // (batch)
  float* direction;  // (batch, embed_dim) contiguous; null when not asked for
};

// Where everything lies that the kernels hand to each other, one after the other.
template <typename Element>
struct Workspace {
  Schedule schedule;
  int tile_queries;
  int64_t query_bytes, key_bytes, queue_bytes, statistics_bytes, direction_bytes;

  int64_t bytes() const {
    return query_bytes + key_bytes + queue_bytes + statistics_bytes + direction_bytes;
  }
};

template <typename Kind, int kDim>
Workspace<typename Kind::Element> plan_workspace(const QueueInfoNce<typename Kind::Element>& p,
                                                 int multiprocessors) {
  using S = Sizes<Kind, kDim>;
  const int64_t query_tiles = (p.query.count + S::kQueries - 1) / S::kQueries;
  // An empty queue is one tile in which nothing counts.
  const int64_t queue_tiles = p.queue.count > 0 ? (p.queue.count + S::kKeys - 1) / S::kKeys : 1;
  const auto schedule = Schedule::of(query_tiles, queue_tiles, 2 * int64_t(multiprocessors));
  const int64_t rows = schedule.parts() * S::kQueries;
  const int64_t row_bytes =
      padded_dim<typename Kind::Element>(p.query.dim) * int64_t(sizeof(float));
  return {schedule,
          S::kQueries,
          packed_bytes(p.query),
          packed_bytes(p.key),
          packed_bytes(p.queue),
          rows * int64_t(sizeof(Statistics)),
          p.direction ? rows * row_bytes : 0};
}

inline int warps_per_query(const Schedule& schedule) {
  const int64_t parts = schedule.queue_tiles / schedule.units_per_block + 1;
  int warps = 1;
  while (warps < kCombineWarps && warps < parts) warps *= 2;
  return warps;
}

template <typename Kind, int kDim>
void launch_forward(const QueueInfoNce<typename Kind::Element>& p,
                    const Workspace<typename Kind::Element>& plan, unsigned char* workspace,
                    Stream stream) {
  // Of shared memory compute capability 8.0 has 164 KiB, and takes 1 for itself from each block.
  static_assert(sizeof(typename Kind::Element) == 4 ||
                    2 * (Shared<Kind, kDim>::bytes(false) + 1024) <= 164 * 1024,
                "two blocks fit a multiprocessor");
  ForwardArguments<typename Kind::Element> a{};
  a.query = align_rows(p.query, workspace, stream);
  workspace += plan.query_bytes;
  a.key = align_rows(p.key, workspace, stream);
  workspace += plan.key_bytes;
  a.queue = align_rows(p.queue, workspace, stream);
  workspace += plan.queue_bytes;
  a.query_ids = p.query_ids;
  a.queue_ids = p.queue_ids;
  a.query_ids_stride = p.query_ids_stride;
  a.queue_ids_stride = p.queue_ids_stride;
  a.scale = float(1.44269504088896340736 / p.temperature);
  a.schedule = plan.schedule;
  a.direction_dim = int(padded_dim<typename Kind::Element>(p.query.dim));
  a.statistics = reinterpret_cast<Statistics*>(workspace);
  a.directions = reinterpret_cast<float*>(workspace + plan.statistics_bytes);
  auto run = [&](auto kernel) {
    launch("queue_info_nce", kernel, dim3(unsigned(plan.schedule.blocks())), dim3(kForwardThreads),
           Shared<Kind, kDim>::bytes(p.query_ids), stream, a);
  };
  if (p.direction && p.query_ids) {
    run(queue_info_nce_forward_kernel<Kind, kDim, true, true>);
  } else if (p.direction) {
    run(queue_info_nce_forward_kernel<Kind, kDim, true, false>);
  } else if (p.query_ids) {
    run(queue_info_nce_forward_kernel<Kind, kDim, false, true>);
  } else {
    run(queue_info_nce_forward_kernel<Kind, kDim, false, false>);
  }

  CombineArguments<typename Kind::Element> c{};
  c.query = a.query;
  c.key = a.key;
  c.rounded = Kind::kRounds;
  c.schedule = a.schedule;
  c.statistics = a.statistics;
  c.directions = a.directions;
  c.batch = p.query.count;
  c.embed_dim = p.query.dim;
  c.tile_queries = plan.tile_queries;
  c.direction_dim = a.direction_dim;
  c.warps_per_query = p.direction ? warps_per_query(plan.schedule) : 1;
  c.scale = a.scale;
  c.inverse_temperature = float(1 / p.temperature);
  c.loss = p.loss;
  c.rank = p.rank;
  c.direction = p.direction;
  const int64_t queries_per_block = kCombineWarps / c.warps_per_query;
  launch("queue_info_nce_combine", queue_info_nce_combine_kernel<typename Kind::Element>,
         dim3(unsigned((c.batch + queries_per_block - 1) / queries_per_block)),
         dim3(kCombineThreads), kCombineThreads * kLaneColumns * int(sizeof(float)), stream, c);
}

// Calls use.template operator()<kDim>() with the kernel's width for `embed_dim` columns.
template <typename Use>
auto with_width(int64_t embed_dim, Use use) {
  if (embed_dim <= 64) return use.template operator()<64>();
  if (embed_dim <= 128) return use.template operator()<128>();
  return use.template operator()<256>();
}

// Loss, rank and direction of at most kMostEmbedDim columns, on `stream`. allocate(bytes) gives the
// workspace, aligned to 16 bytes. No query: nothing is launched.
template <typename Kind, typename Allocate>
void queue_info_nce_forward(const QueueInfoNce<typename Kind::Element>& p, int multiprocessors,
                            Allocate allocate, Stream stream) {
  if (p.query.count == 0) return;
  with_width(p.query.dim, [&]<int kDim>() {
    const auto plan = plan_workspace<Kind, kDim>(p, multiprocessors);
    launch_forward<Kind, kDim>(p, plan, static_cast<unsigned char*>(allocate(plan.bytes())),
                               stream);
  });
}

}  // namespace medmoco
