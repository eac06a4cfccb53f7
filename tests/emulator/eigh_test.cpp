// The eigensolver of small matrices by itself: what it finds must make up the matrix again.

#include "cuda/eigh.cuh"

#include <algorithm>
#include <random>
#include <vector>

#include "expect.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

constexpr int kThreads = 128;

struct EighArguments {
  int size, most_sweeps;
  const float* matrix;
  float *values, *vectors;  // vectors in rows
  bool* found;
};

__global__ void eigh_kernel(EighArguments p) {
  const EighShared shared{p.size};
  const int side = shared.side();
  for (int i = thread_id(); i < side * side; i += kThreads) {
    const int row = i / side, column = i % side;
    const bool exists = row < p.size && column < p.size;
    shared_store(shared.matrix() + i, exists ? p.matrix[row * p.size + column] : 0.0f);
  }
  const Eigenvalues eigenvalues = eigh<kThreads>(shared, p.most_sweeps);
  if (thread_id() == 0) *p.found = eigenvalues.found;
  for (int i = thread_id(); i < p.size; i += kThreads) {
    p.values[i] = shared_load(shared.matrix() + i * (side + 1)) * eigenvalues.unit;
  }
  for (int i = thread_id(); i < p.size * p.size; i += kThreads) {
    p.vectors[i] = shared_load(shared.vectors() + i / p.size * side + i % p.size);
  }
}

struct Found {
  bool found = false;
  std::vector<float> values, vectors;
};

Found decompose(int size, const std::vector<float>& matrix, int most_sweeps = kMostSweeps,
                uint64_t seed = 1) {
  Found result{false, std::vector<float>(size), std::vector<float>(size * size)};
  EmulatedDevice device{.seed = seed};
  launch("eigh", eigh_kernel, dim3(1), dim3(kThreads), EighShared{size}.bytes(kThreads), &device,
         EighArguments{size, most_sweeps, matrix.data(), result.values.data(),
                       result.vectors.data(), &result.found});
  return result;
}

// U diag(l) U^T is the matrix and U^T U = 1, each to a few roundings beside the largest element.
void expect_decomposed(const std::string& name, int size, const std::vector<float>& matrix,
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

Found check(const std::string& name, int size, const std::vector<float>& matrix) {
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
std::vector<float> covariance(int size, int samples, double factor = 1,
                              const std::vector<double>& deviations = {}, bool repeated = false) {
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

void test_all_sizes() {
  for (const int size : {1, 2, 3, 5, 16, 17, 64}) {
    check("random", size, covariance(size, 2 * size + 2));
  }
}

void test_the_largest_size() { check("random", 128, covariance(128, 1000)); }

void test_equal_and_missing_eigenvalues() {
  for (const int size : {2, 5, 16}) {
    const std::vector<float> ones(size * size, 1.0f);
    check("rank one", size, ones);
    check("few samples", size, covariance(size, size / 2));
    check("duplicate columns", size, covariance(size, 3 * size, 1, {}, true));
    check("zero", size, std::vector<float>(size * size));
  }
}

void test_a_diagonal_matrix_is_left_as_it_is() {
  constexpr int kSize = 6;
  std::vector<float> matrix(kSize * kSize);
  for (int i = 0; i < kSize; ++i) matrix[i * (kSize + 1)] = float(i % 4);
  const Found found = check("diagonal", kSize, matrix);
  for (int i = 0; i < kSize; ++i) expect_equal(found.values[i], i % 4, "an eigenvalue");
}

void test_two_by_two_by_hand() {
  const Found found = check("by hand", 2, {5, 4, 4, 5});
  const auto [least, most] = std::minmax(found.values[0], found.values[1]);
  expect(std::abs(least - 1) < 1e-6 && std::abs(most - 9) < 1e-6, "eigenvalues 1 and 9");
}

// Features of very different spread keep the digits of the small ones: what couples them is small
// beside both.
void test_small_variances_keep_their_digits() {
  const std::vector<float> matrix = {1e6f, 1e-1f, 1e-2f, 1e-1f, 1, 1e-7f, 1e-2f, 1e-7f, 1e-6f};
  Found found = check("of very different spread", 3, matrix);
  std::sort(found.values.begin(), found.values.end());
  // 1e-6 less 1e-2^2 / 1e6, and 1 less 1e-1^2 / 1e6.
  expect(std::abs(found.values[0] - (1e-6 - 1e-10)) < 4e-13, "the least eigenvalue");
  expect(std::abs(found.values[1] - 1) < 4e-7, "the second eigenvalue");
}

void test_condition_and_scale_do_not_matter() {
  constexpr int kSize = 12;
  std::vector<double> deviations;
  for (int i = 0; i < kSize; ++i) deviations.push_back(std::pow(10, -3.0 * i / (kSize - 1)));
  check("condition 1e6", kSize, covariance(kSize, 40, 1, deviations));
  for (const double factor : {1e-44, 1e-30, 1e30, 2e37}) {
    const auto matrix = covariance(kSize, 40, factor);
    const Found found = decompose(kSize, matrix);
    expect(found.found, "eigenvalues at any scale");
    if (factor > 1e-40) expect_decomposed("scaled", kSize, matrix, found);
  }
}

void test_twenty_schedules_give_the_same_bits() {
  const auto matrix = covariance(9, 30);
  const Found expected = decompose(9, matrix);
  for (uint64_t seed = 2; seed <= 20; ++seed) {
    const Found found = decompose(9, matrix, kMostSweeps, seed);
    expect(found.values == expected.values && found.vectors == expected.vectors, "the same bits");
  }
}

void test_too_few_sweeps_are_told() {
  const auto matrix = covariance(16, 40);
  expect(!decompose(16, matrix, 2).found, "no eigenvalues after two sweeps");
  expect(decompose(16, matrix, 12).found, "eigenvalues after a dozen");
}

}  // namespace

int main() {
  test_all_sizes();
  test_the_largest_size();
  test_equal_and_missing_eigenvalues();
  test_a_diagonal_matrix_is_left_as_it_is();
  test_two_by_two_by_hand();
  test_small_variances_keep_their_digits();
  test_condition_and_scale_do_not_matter();
  test_twenty_schedules_give_the_same_bits();
  test_too_few_sweeps_are_told();
  return report();
}
