// How work of two dimensions is shared out over blocks.

#pragma once

#include "primitives.cuh"

namespace medmoco {

// The work is a list of units, a tile of queries and a tile of the queue each, in order of the
// queries; a block takes a run of them. So few queries fill the GPU as many do, and no block works
// longer than another. Of each tile of queries that its run reaches into, a block leaves a part;
// parts are numbered in order.
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

  // What a block leaves of a tile of queries; those of one tile come from blocks first to last.
  __device__ int part(int block, int query_tile) const { return block + query_tile; }
  __device__ int first_block(int query_tile) const {
    return int(query_tile * queue_tiles / units_per_block);
  }
  __device__ int last_block(int query_tile) const {
    return int(((query_tile + 1) * queue_tiles - 1) / units_per_block);
  }
};

}  // namespace medmoco
