// Runs covariance_loss on the emulator, forward and backward, on features of any layout.

#pragma once

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#include "cuda/covariance_loss.cuh"
#include "stored_matrix.h"

namespace medmoco::test {

struct CovarianceCase {
  int samples, dims;
  int multiprocessors = 1;
  Storage storage = Storage::kFloat32;
  Layout layout = Layout::kRows;
  Layout matrix_layout = Layout::kRows;  // of what backward gets
  float grad_loss = 1;
  uint64_t seed = 1;  // of the order in which threads run

  std::string text() const {
    std::ostringstream text;
    text << "samples " << samples << ", dims " << dims << ", multiprocessors " << multiprocessors
         << ", storage " << int(storage) << ", layout " << int(layout) << ", matrix layout "
         << int(matrix_layout) << ", seed " << seed;
    return text.str();
  }
  Values normal() const {
    return Values::normal(samples, dims, uint64_t(samples) * 1000 + uint64_t(dims));
  }
};

struct CovarianceResult {
  float loss = 9;
  std::vector<double> mean;
  Values matrix, gradient;

  explicit CovarianceResult(const CovarianceCase& c)
      : mean(size_t(c.dims), 9),
        matrix(std::min(c.samples, c.dims), std::min(c.samples, c.dims)),
        gradient(c.samples, c.dims) {}
  bool same_bits(const CovarianceResult& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return std::memcmp(&loss, &other.loss, sizeof loss) == 0 && same(mean, other.mean) &&
           same(matrix.data, other.matrix.data) && same(gradient.data, other.gradient.data);
  }
};

// Memory aligned to 16 bytes that ends where it is said to; NaN where nobody writes.
struct AlignedMemory {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};

  void* operator()(int64_t bytes) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 16, size_t(bytes)) != 0) std::abort();
    std::memset(allocated, 0xff, size_t(bytes));
    memory.reset(allocated);
    return allocated;
  }
};

// Throws what the emulator finds wrong.
template <typename Kind>
CovarianceResult run(const CovarianceCase& c, const StoredMatrix& stored) {
  EmulatedDevice device{.seed = c.seed};
  CovarianceResult result(c);
  const CovarianceFeatures f{stored.matrix, c.samples, c.dims};
  std::vector<float> matrix(result.matrix.data.size(), 9);
  AlignedMemory workspace;
  covariance_loss_forward<Kind>(f, {&result.loss, result.mean.data(), matrix.data()},
                                c.multiprocessors, std::ref(workspace), &device);
  std::copy(matrix.begin(), matrix.end(), result.matrix.data.begin());
  const StoredMatrix given(result.matrix, Storage::kFloat32, c.matrix_layout);
  const StoredMatrix gradient(result.gradient, c.storage, Layout::kRows);
  covariance_loss_backward<Kind>(
      f, {&c.grad_loss, given.matrix, const_cast<void*>(gradient.matrix.data)}, c.multiprocessors,
      std::ref(workspace), &device);
  for (int i = 0; i < c.samples; ++i) {
    for (int j = 0; j < c.dims; ++j) result.gradient.at(i, j) = load(gradient.matrix, i, j);
  }
  return result;
}

}  // namespace medmoco::test
