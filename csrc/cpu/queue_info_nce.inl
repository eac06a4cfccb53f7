// Kernel of queue_info_nce, included by for_each_instruction_set.h.
//
// A panel holds queries: lane = query. Every step below is the same on all lanes, and both
// products, query . queue and weights . queue, take the queue as it lies, so it is never
// transposed.

#include "multiply.inl"

constexpr int64_t kGroupRows = 256;  // of the batch that share a tile of the queue

// Queries of a panel and what has been gathered for them so far.
template <typename T>
struct Panel {
  AlignedVector<T> direction;             // [embed_dim][lane]
  alignas(64) T positive[kPanelRows<T>];  // query . key
  alignas(64) T peak[kPanelRows<T>];      // weights are e^{(query . queue - peak) / temperature}
  alignas(64) T sum[kPanelRows<T>];       // of the weights
  alignas(64) typename LanesOf<T>::Integer rank[kPanelRows<T>];
  int64_t ids[kPanelRows<T>];
};

// What a thread works with.
template <typename T>
struct Workspace {
  AlignedVector<T> queries;  // [panel][embed_dim][lane]
  AlignedVector<T> key;      // [embed_dim][lane]
  AlignedVector<T> logits;   // [key of the tile][lane], then the weights
  AlignedVector<T> converted;
  std::vector<int64_t> ids;
};

// Consecutive rows of the queue, as T with unit column stride.
template <typename T>
struct Tile {
  const T* data;
  int64_t keys, stride;
  const int64_t* ids;  // null without ids
};

// Keys [first, last) of the queue: in place, or `converted`.
template <typename T, typename Scalar>
Tile<T> read_tile(const Problem<T, Scalar>& problem, int64_t first, int64_t last,
                  Workspace<T>& work) {
  const auto& queue = problem.queue;
  const int64_t dim = problem.embed_dim;
  Tile<T> tile{nullptr, last - first, dim, nullptr};
  if (problem.queue_ids) {
    work.ids.resize(tile.keys);
    for (int64_t j = 0; j < tile.keys; ++j) {
      work.ids[j] = problem.queue_ids[(first + j) * problem.queue_ids_stride];
    }
    tile.ids = work.ids.data();
  }
  if constexpr (std::is_same_v<T, Scalar>) {
    if (queue.column_stride == 1) {
      tile.data = queue.data + first * queue.row_stride;
      tile.stride = queue.row_stride;
      return tile;
    }
  }
  work.converted.resize(tile.keys * dim);
  for (int64_t j = 0; j < tile.keys; ++j) {
    const Scalar* row = queue.data + (first + j) * queue.row_stride;
    T* to = work.converted.data() + j * dim;
    if (queue.column_stride == 1) {
      for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<T>(row[c]);
    } else {
      for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<T>(row[c * queue.column_stride]);
    }
  }
  tile.data = work.converted.data();
  return tile;
}

template <typename T, typename Scalar>
void start_panel(const Problem<T, Scalar>& problem, int64_t first_row, T* query, T* key,
                 Panel<T>& panel) {
  const int64_t dim = problem.embed_dim, size = dim * kPanelRows<T>;
  const int64_t rows = problem.batch - first_row;
  std::memset(query, 0, size * sizeof(T));
  std::memset(key, 0, size * sizeof(T));
  panel.direction.assign(problem.direction ? size : 0, T(0));
  for (int lane = 0; lane < kPanelRows<T>; ++lane) {
    panel.sum[lane] = 0;
    panel.rank[lane] = 0;
    panel.ids[lane] = -1;
    if (lane >= rows) continue;
    const int64_t row = first_row + lane;
    for (int64_t c = 0; c < dim; ++c) {
      query[c * kPanelRows<T> + lane] = problem.query.at(row, c);
      key[c * kPanelRows<T> + lane] = problem.key.at(row, c);
    }
    if (problem.query_ids) panel.ids[lane] = problem.query_ids[row * problem.query_ids_stride];
  }
  // In the order of `multiply`, so that a key that also stands in the queue ties exactly.
  for (int v = 0; v < kPanelVectors; ++v) {
    typename LanesOf<T>::Vector total = {};
    for (int64_t start = 0; start < dim; start += kDepthBlock) {
      typename LanesOf<T>::Vector sum = {};
      for (int64_t c = start; c < dim && c < start + kDepthBlock; ++c) {
        const int64_t offset = c * kPanelRows<T> + v * kLanes<T>;
        sum += load(key + offset) * load(query + offset);
      }
      total += sum;
    }
    store(panel.positive + v * kLanes<T>, total);
    store(panel.peak + v * kLanes<T>, total);
  }
}

// Takes the keys that share a query's id to -infinity, and out of its rank.
template <typename T>
inline void leave_out_same_ids(Panel<T>& panel, const Tile<T>& tile, T* logits) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < tile.keys; ++j) {
    int64_t any = 0;
    for (int lane = 0; lane < kPanelRows<T>; ++lane) any |= panel.ids[lane] == tile.ids[j];
    if (!any || tile.ids[j] < 0) continue;
    for (int lane = 0; lane < kPanelRows<T>; ++lane) {
      if (panel.ids[lane] != tile.ids[j]) continue;
      logits[j * kPanelRows<T> + lane] = nothing;
      // scan_logits will count it where the positive is NaN or -infinity.
      panel.rank[lane] -= !(nothing < panel.positive[lane]);
    }
  }
}

// Counts the logits that are not below the positive into the rank, and finds the largest.
template <typename T>
inline void scan_logits(Panel<T>& panel, const T* logits, int64_t keys, T* largest) {
  using Vector = typename LanesOf<T>::Vector;
  using Mask = typename LanesOf<T>::Mask;
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector positive = load(panel.positive + v * kLanes<T>);
    Vector most = Vector{} - std::numeric_limits<T>::infinity();
    Mask rank;
    std::memcpy(&rank, panel.rank + v * kLanes<T>, sizeof rank);
    for (int64_t j = 0; j < keys; ++j) {
      const Vector logit = load(logits + j * kPanelRows<T> + v * kLanes<T>);
      rank -= ~(Mask)(logit < positive);  // -1 where it counts, NaN included
      most = logit > most ? logit : most;
    }
    std::memcpy(panel.rank + v * kLanes<T>, &rank, sizeof rank);
    store(largest + v * kLanes<T>, most);
  }
}

// Raises the peak where a logit outgrew it by more than 2^8 and rescales what was gathered; below
// that, sums have room, and rescaling the direction at each new maximum would cost more.
template <typename T>
inline void raise_peak(Panel<T>& panel, const T* largest, T scale) {
  using Vector = typename LanesOf<T>::Vector;
  using Mask = typename LanesOf<T>::Mask;
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector peak = load(panel.peak + v * kLanes<T>);
    const Vector most = load(largest + v * kLanes<T>);
    const Mask outgrown = (most - peak) * scale > T(8);
    bool any = false;
    for (int lane = 0; lane < kLanes<T>; ++lane) any |= outgrown[lane] != 0;
    if (!any) continue;
    const Vector raised = outgrown ? most : peak;
    const Vector factor = outgrown ? exp2_lanes<T>((peak - raised) * scale) : Vector{} + T(1);
    store(panel.peak + v * kLanes<T>, raised);
    store(panel.sum + v * kLanes<T>, load(panel.sum + v * kLanes<T>) * factor);
    for (size_t place = v * kLanes<T>; place < panel.direction.size(); place += kPanelRows<T>) {
      store(panel.direction.data() + place, load(panel.direction.data() + place) * factor);
    }
  }
}

// One tile of the queue against one panel: logits, rank, softmax so far, direction so far.
template <typename T>
void add_tile(Panel<T>& panel, const T* query, const Tile<T>& tile, int64_t dim, T scale,
              T* logits) {
  using Vector = typename LanesOf<T>::Vector;
  std::memset(logits, 0, tile.keys * kPanelRows<T> * sizeof(T));
  multiply<T, false>(tile.data, tile.keys, tile.stride, query, dim, logits);
  if (tile.ids) leave_out_same_ids(panel, tile, logits);
  alignas(64) T largest[kPanelRows<T>];
  scan_logits(panel, logits, tile.keys, largest);
  raise_peak(panel, largest, scale);
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector peak = load(panel.peak + v * kLanes<T>);
    Vector sum = {};
    for (int64_t j = 0; j < tile.keys; ++j) {
      T* place = logits + j * kPanelRows<T> + v * kLanes<T>;
      const Vector weight = exp2_lanes<T>((load(place) - peak) * scale);
      store(place, weight);
      sum += weight;
    }
    store(panel.sum + v * kLanes<T>, load(panel.sum + v * kLanes<T>) + sum);
  }
  if (!panel.direction.empty()) {
    multiply<T, true>(tile.data, dim, tile.stride, logits, tile.keys, panel.direction.data());
  }
}

// loss = softplus(lse - positive); direction = (softmax . queue + expm1(-loss) key) / temperature,
// the softmax being over the queue and the positive.
template <typename T, typename Scalar>
void finish_panel(const Problem<T, Scalar>& problem, int64_t first_row, const Panel<T>& panel) {
  for (int lane = 0; lane < kPanelRows<T> && first_row + lane < problem.batch; ++lane) {
    const int64_t row = first_row + lane;
    // Once a row, so double costs nothing.
    const double below = (double(panel.peak[lane]) - panel.positive[lane]) / problem.temperature;
    const double excess = std::log(double(panel.sum[lane])) + below;  // lse - positive
    const double loss =
        excess > 0 ? excess + std::log1p(std::exp(-excess)) : std::log1p(std::exp(excess));
    problem.loss[row] = T(loss);
    problem.rank[row] = int32_t(panel.rank[lane]);
    if (!problem.direction) continue;
    const double total = panel.sum[lane] + std::exp(-below);
    const T from_queue = T(1 / (total * problem.temperature));
    const T from_key = T(std::expm1(-loss) / problem.temperature);
    for (int64_t c = 0; c < problem.embed_dim; ++c) {
      const int64_t offset = c * kPanelRows<T> + lane;
      problem.direction[row * problem.embed_dim + c] =
          panel.direction[offset] * from_queue + problem.key.at(row, c) * from_key;
    }
  }
}

// Asks for `part` of `parts` of the rows that follow a tile, which memory would be late with.
template <typename T>
inline void prefetch_next(const Tile<T>& tile, int64_t rows_after, int64_t dim, int64_t part,
                          int64_t parts) {
  const int64_t rows = rows_after < tile.keys ? rows_after : tile.keys;
  for (int64_t j = rows * part / parts; j < rows * (part + 1) / parts; ++j) {
    const T* row = tile.data + (tile.keys + j) * tile.stride;
    for (int64_t c = 0; c < dim; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
  }
}

// Starts `count` panels at `first_row` and streams keys [first_key, last_key) of the queue past
// them.
template <typename T, typename Scalar>
void gather(const Problem<T, Scalar>& problem, int64_t first_row, Panel<T>* panels, int64_t count,
            int64_t first_key, int64_t last_key, Workspace<T>& work) {
  const int64_t dim = problem.embed_dim, tile_keys = problem.tile_keys;
  work.queries.resize(count * dim * kPanelRows<T>);
  work.key.resize(dim * kPanelRows<T>);
  work.logits.resize(tile_keys * kPanelRows<T>);
  auto query = [&](int64_t p) { return work.queries.data() + p * dim * kPanelRows<T>; };
  for (int64_t p = 0; p < count; ++p) {
    start_panel(problem, first_row + p * kPanelRows<T>, query(p), work.key.data(), panels[p]);
  }
  for (int64_t start = first_key; start < last_key; start += tile_keys) {
    const int64_t end = start + tile_keys < last_key ? start + tile_keys : last_key;
    const Tile<T> tile = read_tile(problem, start, end, work);
    for (int64_t p = 0; p < count; ++p) {
      if (work.converted.empty()) prefetch_next(tile, last_key - end, dim, p, count);
      add_tile(panels[p], query(p), tile, dim, problem.scale, work.logits.data());
    }
  }
}

// Adds what another segment of the queue gave the same queries.
template <typename T>
void merge(const Panel<T>& other, T scale, Panel<T>& panel) {
  using Vector = typename LanesOf<T>::Vector;
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t lanes = v * kLanes<T>;
    const Vector a = load(panel.peak + lanes), b = load(other.peak + lanes);
    const Vector peak = b > a ? b : a;
    const Vector ours = exp2_lanes<T>((a - peak) * scale);
    const Vector theirs = exp2_lanes<T>((b - peak) * scale);
    store(panel.peak + lanes, peak);
    store(panel.sum + lanes, load(panel.sum + lanes) * ours + load(other.sum + lanes) * theirs);
    for (size_t place = lanes; place < panel.direction.size(); place += kPanelRows<T>) {
      store(panel.direction.data() + place, load(panel.direction.data() + place) * ours +
                                                load(other.direction.data() + place) * theirs);
    }
  }
  for (int lane = 0; lane < kPanelRows<T>; ++lane) panel.rank[lane] += other.rank[lane];
}

// How the work is shared out: groups of rows times segments of the queue. It does not depend on
// the number of threads, and neither do the bits of the result.
struct Plan {
  int64_t panels, groups, segments;

  template <typename T>
  static Plan of(int64_t batch, int64_t queue_size, int64_t embed_dim) {
    constexpr int64_t units = 32;  // enough to keep threads busy, and balanced
    constexpr int64_t least_units = 8;
    constexpr int64_t least_keys = 1024;         // worth a segment
    constexpr int64_t most_bytes = 8 * 1048576;  // of directions, one a segment
    const int64_t panels = (batch + kPanelRows<T> - 1) / kPanelRows<T>;
    int64_t groups = (panels * kPanelRows<T> + kGroupRows - 1) / kGroupRows;
    const int64_t segment_bytes = panels * kPanelRows<T> * embed_dim * int64_t(sizeof(T));
    int64_t segments = 1;
    while (groups * segments < units && 2 * segments * least_keys <= queue_size &&
           2 * segments * segment_bytes <= most_bytes) {
      segments *= 2;
    }
    // A queue too short for segments: fewer rows share a tile, but more threads have work.
    while (panels > 0 && groups * segments < least_units && 2 * groups <= panels) groups *= 2;
    return {panels, groups, segments};
  }
};

template <typename T, typename Scalar>
void forward_kernel(const Problem<T, Scalar>& problem) {
  const Plan plan = Plan::of<T>(problem.batch, problem.queue_size, problem.embed_dim);
  std::vector<Panel<T>> gathered(plan.segments * plan.panels);

  share_out(plan.groups * plan.segments, [&](Tasks& tasks) {
    Workspace<T> work;
    for (int64_t unit; tasks.take(unit);) {
      const int64_t group = unit / plan.segments, segment = unit % plan.segments;
      const int64_t first = plan.panels * group / plan.groups;
      const int64_t last = plan.panels * (group + 1) / plan.groups;
      gather(problem, first * kPanelRows<T>, gathered.data() + segment * plan.panels + first,
             last - first, problem.queue_size * segment / plan.segments,
             problem.queue_size * (segment + 1) / plan.segments, work);
      for (int64_t p = first; plan.segments == 1 && p < last; ++p) {
        finish_panel(problem, p * kPanelRows<T>, gathered[p]);
        gathered[p].direction = {};
      }
    }
  });
  if (plan.segments == 1) return;

  share_out(plan.panels, [&](Tasks& tasks) {
    for (int64_t p; tasks.take(p);) {
      for (int64_t segment = 1; segment < plan.segments; ++segment) {
        merge(gathered[segment * plan.panels + p], problem.scale, gathered[p]);
      }
      finish_panel(problem, p * kPanelRows<T>, gathered[p]);
    }
  });
}
