// Runs zca_whiten on the emulator, on features in any layout and number format.

#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/zca_whiten.cuh"

namespace medmoco::test {

enum class Rows {
  kTogether,    // one after the other
  kOddStart,    // from one element behind an aligned address on
  kApart,       // three elements between them
  kEveryOther,  // two elements a column
  kTransposed,
};
constexpr int kLayouts = 5;

struct WhitenCase {
  int samples, groups, size;
  Storage storage = Storage::kFloat32;
  Rows features = Rows::kTogether, grad = Rows::kTogether;
  double eps = 0.1;
  int multiprocessors = 2;
  uint64_t seed = 1;  // of the order in which threads run

  int columns() const { return groups * size; }
  std::string text() const {
    std::ostringstream text;
    text << samples << " samples, " << groups << " groups of " << size << ", storage "
         << int(storage) << ", layouts " << int(features) << " and " << int(grad) << ", eps " << eps
         << ", multiprocessors " << multiprocessors << ", seed " << seed;
    return text.str();
  }
};

// (samples, columns), row-major.
using Values = std::vector<double>;

// Normal, with a share of a neighbour's and a mean.
inline Values random_values(const WhitenCase& c, uint64_t seed, double mean = 0) {
  std::mt19937_64 random(seed * 7919 + c.samples * 131 + c.columns());
  std::normal_distribution<double> normal;
  Values values(size_t(c.samples) * c.columns());
  for (int i = 0; i < int(values.size()); ++i) {
    values[i] = normal(random) + mean + (i % c.columns() ? 0.5 * (values[i - 1] - mean) : 0);
  }
  return values;
}

// The memory ends where the matrix does, so that AddressSanitizer sees an access beyond.
struct MatrixInMemory {
  std::unique_ptr<unsigned char[]> memory;
  Matrix matrix;
  Values values;  // as they are stored

  MatrixInMemory(const WhitenCase& c, const Values& wanted, Rows rows) : values(wanted) {
    const int64_t columns = c.columns();
    const bool transposed = rows == Rows::kTransposed;
    const int64_t column_stride = transposed ? c.samples : rows == Rows::kEveryOther ? 2 : 1;
    const int64_t row_stride =
        transposed ? 1 : columns * column_stride + (rows == Rows::kApart ? 3 : 0);
    const int64_t offset = rows == Rows::kOddStart, size = bytes_of(c.storage);
    const int64_t count =
        offset + (c.samples - 1) * row_stride + std::max<int64_t>(columns - 1, 0) * column_stride;
    memory.reset(new unsigned char[(count + 1) * size]);
    unsigned char* data = memory.get() + offset * size;
    matrix = {data, c.storage, row_stride, column_stride};
    for (int64_t i = 0; i < int64_t(values.size()); ++i) {
      const int64_t row = i / columns, column = i % columns;
      store(data, c.storage, row * row_stride + column * column_stride, float(wanted[i]));
      values[i] = load(matrix, row, column);
    }
  }
};

struct WhitenResult {
  std::vector<float> whitened, mean, matrix, scale, vectors, grad_features;

  bool same_bits(const WhitenResult& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(whitened, other.whitened) && same(mean, other.mean) && same(matrix, other.matrix) &&
           same(scale, other.scale) && same(vectors, other.vectors) &&
           same(grad_features, other.grad_features);
  }
};

// Gives memory as an allocator does, full of NaN, and frees it at the end.
class Allocator {
 public:
  void* operator()(int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, size_t(bytes)) != 0) std::abort();
    std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff);
    memory_.reset(memory);
    bytes_ = bytes;
    return memory;
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, std::free};
  int64_t bytes_ = 0;
};

// (samples, columns) contiguous, for the kernels to write to.
struct OutputInMemory {
  Storage storage;
  std::unique_ptr<unsigned char[]> memory;

  OutputInMemory(const WhitenCase& c)
      : storage(c.storage),
        memory(new unsigned char[size_t(c.samples) * c.columns() * bytes_of(c.storage)]) {
    std::fill_n(memory.get(), size_t(c.samples) * c.columns() * bytes_of(c.storage), 0xff);
  }
  std::vector<float> values(int64_t count) const {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
      values.push_back(value_of(load_bits(memory.get(), storage, i), storage));
    }
    return values;
  }
};

// Forward and backward pass. Throws what the emulator finds wrong.
template <typename Kind>
WhitenResult run(const WhitenCase& c, const MatrixInMemory& features, const MatrixInMemory& grad) {
  EmulatedDevice device{.seed = c.seed};
  const WhitenShape shape{c.samples, c.groups, c.size};
  const size_t area = size_t(c.columns()) * c.size, count = size_t(c.samples) * c.columns();
  WhitenResult r;
  r.mean.resize(c.columns(), 9);
  r.matrix.resize(area, 9);
  r.scale.resize(c.columns(), 9);
  r.vectors.resize(area, 9);
  OutputInMemory whitened(c), grad_features(c);
  {
    Allocator allocate;
    zca_whiten_forward<Kind>({shape, features.matrix, c.eps, whitened.memory.get(), r.mean.data(),
                              r.matrix.data(), r.scale.data(), r.vectors.data()},
                             c.multiprocessors, std::ref(allocate), &device);
  }
  {
    Allocator allocate;
    zca_whiten_backward<Kind>({shape, features.matrix, grad.matrix, r.mean.data(), r.matrix.data(),
                               r.scale.data(), r.vectors.data(), grad_features.memory.get()},
                              c.multiprocessors, std::ref(allocate), &device);
  }
  r.whitened = whitened.values(count);
  r.grad_features = grad_features.values(count);
  return r;
}

}  // namespace medmoco::test
