// Kernel of dense_match, included by for_each_instruction_set.h.
//
// A panel holds query positions: lane = position. Tiles of both maps are rearranged with channels
// as the slow axis and brought to unit length, so that their product is the cosine.

#include "multiply.inl"

namespace {

// Keys that are rearranged at a time: whole vectors and whole register blocks on every machine.
constexpr int kTileKeys = 48;
// Of query panels that meet one tile of keys: with it they fill a second-level cache of 1 MiB. The
// more they are, the less often the tiles are rearranged.
constexpr int64_t kGroupBytes = 832 * 1024;

template <typename T>
int64_t most_panels(int64_t channels) {
  const int64_t fitting = kGroupBytes / ((channels + 1) * kPanelRows<T> * int64_t(sizeof(T)));
  return fitting < 1 ? 1 : fitting;
}

// The best key of each lane so far.
template <typename T>
struct Best {
  alignas(64) T similarity[kPanelRows<T>];
  int64_t index[kPanelRows<T>];
};

// out[c][i] = map[batch][c][first + i] for i < count, zero from there to Width.
template <int Width, typename T, typename Scalar>
void rearrange(const FeatureMap<Scalar>& map, int64_t batch, int64_t first, int64_t count,
               int64_t channels, T* out) {
  const Scalar* from = map.data + batch * map.batch_stride + first * map.position_stride;
  if (count < Width) std::memset(out, 0, channels * Width * sizeof(T));
  auto copy_rows = [&](auto length) {
    for (int64_t c = 0; c < channels; ++c) {
      const Scalar* row = from + c * map.channel_stride;
      for (int64_t i = 0; i < length; ++i) out[c * Width + i] = static_cast<T>(row[i]);
    }
  };
  if (map.position_stride == 1) {
    if (count == Width) {
      copy_rows(std::integral_constant<int, Width>());
    } else {
      copy_rows(count);
    }
    return;
  }
  // A cache line of a channels-last map holds channels of one position, so it is read to its end.
  constexpr int64_t kRun = 16;
  for (int64_t start = 0; start < channels; start += kRun) {
    const int64_t end = start + kRun < channels ? start + kRun : channels;
    for (int64_t i = 0; i < count; ++i) {
      const Scalar* position = from + i * map.position_stride;
      for (int64_t c = start; c < end; ++c) {
        out[c * Width + i] = static_cast<T>(position[c * map.channel_stride]);
      }
    }
  }
}

// The power of two that takes x >= 0 near 1, so that its square neither overflows nor vanishes.
template <typename T>
inline typename LanesOf<T>::Vector power_of_two_towards_one(typename LanesOf<T>::Vector x) {
  using Lanes = LanesOf<T>;
  using Mask = typename Lanes::Mask;
  constexpr int kLargestExponent = 2 * Lanes::kExponentBias - 1;  // still has a normal reciprocal
  Mask exponent = (Mask)x >> Lanes::kExponentShift;
  exponent = exponent < 1 ? Mask{} + 1 : exponent;
  exponent = exponent > kLargestExponent ? Mask{} + kLargestExponent : exponent;
  return (typename Lanes::Vector)((kLargestExponent + 1 - exponent) << Lanes::kExponentShift);
}

// Brings the columns of panel[c][i], i < Width, to unit length; a column of zeros stays.
template <int Width, typename T>
void normalise(T* panel, int64_t channels) {
  using Vector = typename LanesOf<T>::Vector;
  constexpr int kVectors = Width / kLanes<T>;
  static_assert(Width % kLanes<T> == 0);
  auto place = [&](int64_t c, int v) { return panel + c * Width + v * kLanes<T>; };
  Vector largest[kVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      const Vector x = load(place(c, v));
      const Vector magnitude = x < T(0) ? -x : x;
      largest[v] = magnitude > largest[v] ? magnitude : largest[v];
    }
  }
  Vector scale[kVectors], total[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) scale[v] = power_of_two_towards_one<T>(largest[v]);
  constexpr int64_t kStretch = 32;  // summed apart, which keeps the rounding small
  for (int64_t start = 0; start < channels; start += kStretch) {
    Vector sum[kVectors] = {};
    for (int64_t c = start; c < channels && c < start + kStretch; ++c) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector x = load(place(c, v)) * scale[v];
        sum[v] += x * x;
      }
    }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
  alignas(64) T factor[Width];
  for (int v = 0; v < kVectors; ++v) store(factor + v * kLanes<T>, total[v]);
  for (T& square : factor) square = square == T(0) ? T(1) : T(1) / std::sqrt(square);
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      store(place(c, v), load(place(c, v)) * scale[v] * load(factor + v * kLanes<T>));
    }
  }
}

// blocks[block][c][m] = tile[c][block * kRegisterBlock + m]: what a register block reads lies
// together, however large the maps.
template <typename T>
void split_into_blocks(const T* tile, int64_t channels, T* blocks) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int block = 0; block < kTileKeys / kRegisterBlock; ++block) {
      T* to = blocks + (block * channels + c) * kRegisterBlock;
      const T* from = tile + c * kTileKeys + block * kRegisterBlock;
      for (int m = 0; m < kRegisterBlock; ++m) to[m] = from[m];
    }
  }
}

// Takes cosine[m][lane] of the keys first_key + m into account. The first of equals wins, and the
// first NaN wins over all.
template <typename T>
inline void keep_best(const T* cosine, int64_t keys, int64_t first_key, Best<T>& best) {
  using Vector = typename LanesOf<T>::Vector;
  using Mask = typename LanesOf<T>::Mask;
  for (int v = 0; v < kPanelVectors; ++v) {
    Vector most = load(best.similarity + v * kLanes<T>);
    Mask chosen = Mask{} - 1;
    for (int64_t m = 0; m < keys; ++m) {
      const Vector x = load(cosine + m * kPanelRows<T> + v * kLanes<T>);
      const Mask better = ~(Mask)(x <= most) & (Mask)(most == most);
      most = better ? x : most;
      chosen = better ? Mask{} + typename LanesOf<T>::Integer(m) : chosen;
    }
    store(best.similarity + v * kLanes<T>, most);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      int64_t& index = best.index[v * kLanes<T> + lane];
      index = chosen[lane] >= 0 ? first_key + chosen[lane] : index;
    }
  }
}

// One group of query panels of one map, and the keys that it meets.
template <typename T, typename Scalar>
struct Group {
  const Problem<T, Scalar>& problem;
  int64_t batch = 0, first_panel = 0, count = 0;
  AlignedVector<T> panels;        // [panel][c][lane]
  AlignedVector<T> tile, blocks;  // of keys: [c][key], and what split_into_blocks makes of it
  std::vector<Best<T>> best;      // [panel]

  explicit Group(const Problem<T, Scalar>& problem)
      : problem(problem),
        panels(problem.most_panels * problem.channels * kPanelRows<T>),
        tile(problem.channels * kTileKeys),
        blocks(problem.channels * kTileKeys),
        best(problem.most_panels) {}

  T* panel(int64_t p) { return panels.data() + p * problem.channels * kPanelRows<T>; }
};

// Reads the group's query positions; groups are numbered through all maps.
template <typename T, typename Scalar>
void start_group(Group<T, Scalar>& group, int64_t number) {
  const Problem<T, Scalar>& problem = group.problem;
  const int64_t place = number % problem.groups;
  group.batch = number / problem.groups;
  group.first_panel = place * problem.panels / problem.groups;
  group.count = (place + 1) * problem.panels / problem.groups - group.first_panel;
  for (int64_t p = 0; p < group.count; ++p) {
    const int64_t first = (group.first_panel + p) * kPanelRows<T>;
    const int64_t left = problem.queries - first;
    rearrange<kPanelRows<T>>(problem.query, group.batch, first,
                             left < kPanelRows<T> ? left : kPanelRows<T>, problem.channels,
                             group.panel(p));
    normalise<kPanelRows<T>>(group.panel(p), problem.channels);
    for (int lane = 0; lane < kPanelRows<T>; ++lane) {
      group.best[p].similarity[lane] = -std::numeric_limits<T>::infinity();
      group.best[p].index[lane] = 0;
    }
  }
}

// Compares keys [first_key, first_key + keys), at most a tile, with every panel. Were it inlined,
// the product's accumulators would no longer all stay in registers.
template <typename T, typename Scalar>
__attribute__((noinline)) void add_tile(Group<T, Scalar>& group, int64_t first_key, int64_t keys) {
  const int64_t channels = group.problem.channels;
  rearrange<kTileKeys>(group.problem.key, group.batch, first_key, keys, channels,
                       group.tile.data());
  normalise<kTileKeys>(group.tile.data(), channels);
  split_into_blocks(group.tile.data(), channels, group.blocks.data());
  for (int64_t start = 0; start < keys; start += kRegisterBlock) {
    const int64_t left = keys - start;
    for (int64_t p = 0; p < group.count; ++p) {
      alignas(64) T cosine[kRegisterBlock * kPanelRows<T>] = {};
      multiply<T, true>(group.blocks.data() + start * channels, kRegisterBlock, kRegisterBlock,
                        group.panel(p), channels, cosine);
      keep_best(cosine, left < kRegisterBlock ? left : kRegisterBlock, first_key + start,
                group.best[p]);
    }
  }
}

template <typename T, typename Scalar>
void finish_group(Group<T, Scalar>& group) {
  const Problem<T, Scalar>& problem = group.problem;
  const int64_t first = group.first_panel * kPanelRows<T>;
  const int64_t row = group.batch * problem.queries;
  for (int64_t i = 0; i < group.count * kPanelRows<T> && first + i < problem.queries; ++i) {
    const Best<T>& best = group.best[i / kPanelRows<T>];
    const T similarity = best.similarity[i % kPanelRows<T>];
    problem.index[row + first + i] = best.index[i % kPanelRows<T>];
    // Rounding may take it just beyond 1; NaN stays.
    problem.similarity[row + first + i] = similarity > T(1)    ? T(1)
                                          : similarity < T(-1) ? T(-1)
                                                               : similarity;
  }
}

// Groups [first_group, last_group).
template <typename T, typename Scalar>
void match_kernel(const Problem<T, Scalar>& problem, int64_t first_group, int64_t last_group) {
  Group<T, Scalar> group(problem);
  for (int64_t number = first_group; number < last_group; ++number) {
    start_group(group, number);
    for (int64_t first_key = 0; first_key < problem.keys; first_key += kTileKeys) {
      const int64_t left = problem.keys - first_key;
      add_tile(group, first_key, left < kTileKeys ? left : kTileKeys);
    }
    finish_group(group);
  }
}

}  // namespace
