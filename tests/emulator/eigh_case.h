// Runs the eigensolver of small matrices by itself: what it finds must make up the matrix again.

#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/eigh.cuh"
#include "expect.h"

namespace medmoco::test {

constexpr int kEighThreads = 128;

struct EighArguments {
  int size, most_sweeps;
  const float* matrix;
  float *values, *vectors;  // vectors in rows
  bool* found;
};

inline __global__ void eigh_kernel(EighArguments p) {
  const EighShared shared{p.size};
  const int side = shared.side();
  for (int i = thread_id(); i < side * side; i += kEighThreads) {
    const int row = i / side, column = i % side;
    const bool exists = row < p.size && column < p.size;
    shared_store(shared.matrix() + i, exists ? p.matrix[row * p.size + column] : 0.0f);
  }
  const Eigenvalues eigenvalues = eigh<kEighThreads>(shared, p.most_sweeps);
  if (thread_id() == 0) *p.found = eigenvalues.found;
  for (int i = thread_id(); i < p.size; i += kEighThreads) {
    p.values[i] = shared_load(shared.matrix() + i * (side + 1)) * eigenvalues.unit;
  }
  for (int i = thread_id(); i < p.size * p.size; i += kEighThreads) {
    p.vectors[i] = shared_load(shared.vectors() + i / p.size * side + i % p.size);
  }
}

struct Found {
  bool found = false;
  std::vector<float> values, vectors;
};

inline Found decompose(int size, const std::vector<float>& matrix, int most_sweeps = kMostSweeps,
                       uint64_t seed = 1) {
  Found result{false, std::vector<float>(size), std::vector<float>(size * size)};
  EmulatedDevice device{.seed = seed};
  launch("eigh", eigh_kernel, dim3(1), dim3(kEighThreads), EighShared{size}.bytes(kEighThreads),
         &device,
         EighArguments{size, most_sweeps, matrix.data(), result.values.data(),
                       result.vectors.data(), &result.found});
  return result;
}

// U diag(l) U^T is the matrix and U^T U = 1, each to a few roundings beside the largest element.
inline void expect_decomposed(const std::string& name, int size, const std::vector<float>& matrix,
                              const Found& f) {
  const std::string what = name + ", size " + std::to_string(size);
  double largest = 0, missed = 0, skew = 0;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      double element = 0, product = 0;
      for (int k = 0; k < size; ++k) {
        element += double(f.vectors[k * size + i]) * f.values[k] * f.vectors[k * size + j];
        product += double(f.vectors[i * size + k]) * f.vectors[j * size + k];
      }
      largest = std::max(largest, std::abs(double(matrix[i * size + j])));
      missed = std::max(missed, std::abs(element - matrix[i * size + j]));
      skew = std::max(skew, std::abs(product - (i == j)));
    }
  }
  expect(f.found, "eigenvalues of " + what);
  expect(missed <= 2e-6 * largest, "the matrix from its eigenvalues, off by " +
                                       std::to_string(missed / largest * 1e6) + "e-6: " + what);
  expect(skew <= 2e-6,
         "orthogonal eigenvectors, off by " + std::to_string(skew * 1e6) + "e-6: " + what);
}

inline Found decompose_and_check(const std::string& name, int size,
                                 const std::vector<float>& matrix) {
  Found found;
  try {
    found = decompose(size, matrix);
    expect_decomposed(name, size, matrix, found);
  } catch (const std::exception& error) {
    fail(name + ": " + error.what(), std::source_location::current());
  }
  return found;
}

// Of `samples` normal rows: columns with these deviations, or the second half repeating the first.
inline std::vector<float> covariance(int size, int samples, double factor = 1,
                                     const std::vector<double>& deviations = {},
                                     bool repeated = false) {
  std::mt19937_64 random(size * 131 + samples);
  std::normal_distribution<double> normal;
  std::vector<double> rows(samples * size);
  for (int i = 0; i < samples * size; ++i) {
    const int column = i % size;
    rows[i] = repeated && column >= (size + 1) / 2 ? rows[i - size / 2] : normal(random);
    if (!deviations.empty()) rows[i] *= deviations[column];
  }
  std::vector<float> matrix(size * size);
  for (int i = 0; i < size * size; ++i) {
    double sum = 0;
    for (int r = 0; r < samples; ++r) {
      sum += rows[r * size + i / size] * rows[r * size + i % size];
    }
    matrix[i] = float(sum / samples * factor);
  }
  return matrix;
}

// Three that hang together, whose pairs all meet before the last round of a sweep.
inline std::vector<float> early_pairs() {
  std::vector<float> matrix(64);
  for (int i = 0; i < 8; ++i) matrix[9 * i] = float(i + 2);
  for (const int i : {1, 8, 2, 16, 10, 17}) matrix[i] = 1;
  return matrix;
}

}  // namespace medmoco::test
