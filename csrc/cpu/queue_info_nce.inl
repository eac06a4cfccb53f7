// Kernel of queue_info_nce, included by for_each_instruction_set.h.
//
// A panel holds queries: lane = query. Every step below is the same on all lanes, and both
// products, query . queue and weights . queue, take the queue as it lies, so it is never
// transposed.

#include "multiply.inl"

constexpr int kMostPanels = 4;  // panels that share one converted tile of the queue

// Queries of a panel and what has been gathered for them so far.
template <typename T>
struct Panel {
  std::vector<T> query, key, direction;   // [embed_dim][lane]
  std::vector<T> logits;                  // [key of the tile][lane], then the weights
  alignas(64) T positive[kPanelRows<T>];  // query . key
  alignas(64) T peak[kPanelRows<T>];      // weights are e^{(query . queue - peak) / temperature}
  alignas(64) T sum[kPanelRows<T>];       // of the weights
  alignas(64) typename LanesOf<T>::Integer rank[kPanelRows<T>];
  int64_t ids[kPanelRows<T>];
};

template <typename T, typename Scalar>
void start_panel(const Problem<T, Scalar>& problem, int64_t first_row, Panel<T>& panel) {
  const int64_t dim = problem.embed_dim;
  const int64_t rows = problem.batch - first_row;
  panel.query.assign(dim * kPanelRows<T>, T(0));
  panel.key.assign(dim * kPanelRows<T>, T(0));
  panel.direction.assign(problem.direction ? dim * kPanelRows<T> : 0, T(0));
  for (int lane = 0; lane < kPanelRows<T>; ++lane) {
    panel.sum[lane] = 0;
    panel.rank[lane] = 0;
    panel.ids[lane] = -1;
    if (lane >= rows) continue;
    const int64_t row = first_row + lane;
    for (int64_t c = 0; c < dim; ++c) {
      panel.query[c * kPanelRows<T> + lane] = problem.query.at(row, c);
      panel.key[c * kPanelRows<T> + lane] = problem.key.at(row, c);
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
        sum += load(panel.key.data() + offset) * load(panel.query.data() + offset);
      }
      total += sum;
    }
    store(panel.positive + v * kLanes<T>, total);
    store(panel.peak + v * kLanes<T>, total);
  }
}

// Takes left-out keys to -infinity, counts the others into the rank, finds the largest logit.
template <typename T, bool HasIds>
inline void scan_logits(Panel<T>& panel, int64_t keys, const int64_t* ids, T* largest) {
  using Vector = typename LanesOf<T>::Vector;
  using Mask = typename LanesOf<T>::Mask;
  const Vector nothing = Vector{} - std::numeric_limits<T>::infinity();
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector positive = load(panel.positive + v * kLanes<T>);
    Vector most = nothing;
    Mask rank;
    std::memcpy(&rank, panel.rank + v * kLanes<T>, sizeof rank);
    for (int64_t j = 0; j < keys; ++j) {
      T* place = panel.logits.data() + j * kPanelRows<T> + v * kLanes<T>;
      Vector logit = load(place);
      Mask not_below = ~(Mask)(logit < positive);  // -1 where it counts, NaN included
      if (HasIds && ids[j] >= 0) {
        typename LanesOf<T>::Integer same[kLanes<T>];
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          same[lane] = panel.ids[v * kLanes<T> + lane] == ids[j] ? -1 : 0;
        }
        Mask left_out;
        std::memcpy(&left_out, same, sizeof left_out);
        logit = left_out ? nothing : logit;
        not_below &= ~left_out;
        store(place, logit);
      }
      rank -= not_below;
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
void add_tile(Panel<T>& panel, const T* tile, int64_t keys, int64_t stride, int64_t dim,
              const int64_t* ids, T scale) {
  using Vector = typename LanesOf<T>::Vector;
  panel.logits.assign(keys * kPanelRows<T>, T(0));
  multiply<T, false>(tile, keys, stride, panel.query.data(), dim, panel.logits.data());
  alignas(64) T largest[kPanelRows<T>];
  if (ids) {
    scan_logits<T, true>(panel, keys, ids, largest);
  } else {
    scan_logits<T, false>(panel, keys, ids, largest);
  }
  raise_peak(panel, largest, scale);
  for (int v = 0; v < kPanelVectors; ++v) {
    const Vector peak = load(panel.peak + v * kLanes<T>);
    Vector sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      T* place = panel.logits.data() + j * kPanelRows<T> + v * kLanes<T>;
      const Vector weight = exp2_lanes<T>((load(place) - peak) * scale);
      store(place, weight);
      sum += weight;
    }
    store(panel.sum + v * kLanes<T>, load(panel.sum + v * kLanes<T>) + sum);
  }
  if (!panel.direction.empty()) {
    multiply<T, true>(tile, dim, stride, panel.logits.data(), keys, panel.direction.data());
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
          panel.direction[offset] * from_queue + panel.key[offset] * from_key;
    }
  }
}

// Rows [first_row, last_row) of the batch, at most kMostPanels panels.
template <typename T, typename Scalar>
void forward_kernel(const Problem<T, Scalar>& problem, int64_t first_row, int64_t last_row) {
  const int64_t count = (last_row - first_row + kPanelRows<T> - 1) / kPanelRows<T>;
  std::vector<Panel<T>> panels(count);
  for (int64_t p = 0; p < count; ++p) {
    start_panel(problem, first_row + p * kPanelRows<T>, panels[p]);
  }
  const T scale = T(1.44269504088896340736 / problem.temperature);  // log2(e) / temperature
  const int64_t dim = problem.embed_dim;
  std::vector<T> converted;
  std::vector<int64_t> ids;
  for (int64_t start = 0; start < problem.queue_size; start += problem.tile_keys) {
    const int64_t left = problem.queue_size - start;
    const int64_t keys = left < problem.tile_keys ? left : problem.tile_keys;
    int64_t stride = 0;
    const T* tile = problem.queue_tile(start, keys, converted, stride);
    if (problem.queue_ids) {
      ids.resize(keys);
      for (int64_t j = 0; j < keys; ++j) {
        ids[j] = problem.queue_ids[(start + j) * problem.queue_ids_stride];
      }
    }
    for (Panel<T>& panel : panels) {
      add_tile(panel, tile, keys, stride, dim, problem.queue_ids ? ids.data() : nullptr, scale);
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    finish_panel(problem, first_row + p * kPanelRows<T>, panels[p]);
  }
}
