// Runs dense_match on the emulator, on maps of any layout.

#pragma once

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/dense_match.cuh"

namespace medmoco::test {

enum class Lies {
  kChannelsFirst,  // aligned where a row of positions is a multiple of 16 bytes
  kChannelsLast,   // aligned where the channels of a position are
  kOddStart,       // channels first, from 8 bytes behind an aligned address on
  kRowsApart,      // channels first, with five elements between the channels
  kChannelsApart,  // channels last, with eight elements between the positions
  kEveryOther,     // channels first, every other position
};

struct MatchCase {
  int batch, channels, queries, keys;
  int multiprocessors = 1;  // so blocks, and parts of the keys
  Lies query = Lies::kChannelsFirst, key = Lies::kChannelsFirst;
  uint64_t seed = 1;  // of the order in which threads run

  std::string text() const {
    std::ostringstream text;
    text << "batch " << batch << ", channels " << channels << ", queries " << queries << ", keys "
         << keys << ", multiprocessors " << multiprocessors << ", query layout " << int(query)
         << ", key layout " << int(key) << ", seed " << seed;
    return text.str();
  }
};

// A map in some layout. The memory begins and ends where the map does, so that AddressSanitizer
// sees a read beyond.
template <typename Element>
struct MapInMemory {
  int channels, positions;
  std::vector<double> values;  // (batch, positions, channels), rounded to Element
  std::unique_ptr<Element[]> memory;
  FeatureMap<Element> map;

  MapInMemory(std::vector<double> wanted, int batch, int channels, int positions, Lies lies)
      : channels(channels), positions(positions), values(std::move(wanted)) {
    const bool last = lies == Lies::kChannelsLast || lies == Lies::kChannelsApart;
    const int64_t column_stride = lies == Lies::kEveryOther ? 2 : 1;
    const int64_t columns = last ? channels : positions, rows = last ? positions : channels;
    const int64_t row_stride = columns * column_stride + (lies == Lies::kRowsApart       ? 5
                                                          : lies == Lies::kChannelsApart ? 8
                                                                                         : 0);
    const int64_t offset = lies == Lies::kOddStart ? 24 / sizeof(Element) : 0;
    const int64_t image = rows * row_stride;
    const int64_t size =
        (batch - 1) * image + (rows - 1) * row_stride + (columns - 1) * column_stride + 1 + offset;
    if (batch > 0 && positions > 0) memory.reset(new Element[size]);
    ASAN_POISON_MEMORY_REGION(memory.get(), offset * sizeof(Element));
    map = {memory ? memory.get() + offset : nullptr, image, last ? column_stride : row_stride,
           last ? row_stride : column_stride, positions};
    for (int64_t i = 0; i < int64_t(values.size()); ++i) {
      const int64_t c = i % channels, s = i / channels % positions, b = i / channels / positions;
      const Element rounded = from_float<Element>(float(values[i]));
      memory[offset + b * map.batch_stride + c * map.channel_stride + s * map.position_stride] =
          rounded;
      values[i] = to_float(rounded);
    }
  }
  const double* vector(int image, int position) const {
    return values.data() + (int64_t(image) * positions + position) * channels;
  }
};

// (batch, positions, channels), to be changed before a map is made of it.
struct Vectors {
  int batch, channels, positions;
  std::vector<double> values;

  static Vectors random(int batch, int channels, int positions, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    Vectors vectors{batch, channels, positions, {}};
    for (int64_t i = 0; i < int64_t(batch) * positions * channels; ++i) {
      vectors.values.push_back(normal(random));
    }
    return vectors;
  }
  double* at(int image, int position) {
    return values.data() + (int64_t(image) * positions + position) * channels;
  }
  void set(int image, int position, const double* from) {
    std::copy_n(from, channels, at(image, position));
  }
  void scale(int image, int position, double factor) {
    for (int c = 0; c < channels; ++c) at(image, position)[c] *= factor;
  }
};

struct MatchVectors {
  Vectors query, key;

  static MatchVectors random(const MatchCase& c) {
    const uint64_t seed = c.batch * 7919 + c.channels * 131 + c.queries * 31 + c.keys;
    return {Vectors::random(c.batch, c.channels, c.queries, seed),
            Vectors::random(c.batch, c.channels, c.keys, seed + 1)};
  }
};

template <typename Element>
struct MatchOperands {
  MapInMemory<Element> query, key;

  MatchOperands(const MatchCase& c, const MatchVectors& vectors)
      : query(vectors.query.values, c.batch, c.channels, c.queries, c.query),
        key(vectors.key.values, c.batch, c.channels, c.keys, c.key) {}
};

struct MatchResult {
  std::vector<int64_t> index;
  std::vector<float> similarity;

  bool same_bits(const MatchResult& other) const {
    for (size_t i = 0; i < index.size(); ++i) {
      if (index[i] != other.index[i] ||
          std::bit_cast<uint32_t>(similarity[i]) != std::bit_cast<uint32_t>(other.similarity[i])) {
        return false;
      }
    }
    return true;
  }
};

// Throws what the emulator finds wrong. workspace_bytes: how much the kernels asked for.
template <typename Kind>
MatchResult run(const MatchCase& c, const MatchOperands<typename Kind::Element>& operands,
                int64_t* workspace_bytes = nullptr) {
  EmulatedDevice device{.seed = c.seed};
  const size_t queries = size_t(c.batch) * c.queries;
  MatchResult result{std::vector<int64_t>(queries, -1), std::vector<float>(queries, 9)};
  DenseMatch<typename Kind::Element> p{};
  p.query = operands.query.map;
  p.key = operands.key.map;
  p.batch = c.batch;
  p.channels = c.channels;
  p.index = result.index.data();
  p.similarity = result.similarity.data();
  std::unique_ptr<void, decltype(&std::free)> workspace(nullptr, std::free);
  const auto allocate = [&](int64_t bytes) {
    if (workspace_bytes) *workspace_bytes = bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, size_t(bytes)) != 0) std::abort();
    std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff);  // NaN where nobody writes
    workspace.reset(memory);
    return memory;
  };
  dense_match_forward<Kind>(p, c.multiprocessors, allocate, &device);
  return result;
}

}  // namespace medmoco::test
