// The matrices of zca_whiten's groups: covariance = U diag(l) U^T and W = U diag(scale) U^T with
// scale = (max(l, 0) + eps)^{-1/2}.

#pragma once

#include "centred_moment.cuh"
#include "eigh.cuh"
#include "zca_whiten_products.cuh"

namespace medmoco {

constexpr int kWhitenCombineThreads = 256;

struct WhitenCombineArguments {
  MomentParts parts;
  int64_t groups, samples;
  int size;
  bool add_transposed;
  float* out;  // (groups, size, size)
};

// What the blocks of the product have left, added up and divided by the samples.
static __global__ void __launch_bounds__(kWhitenCombineThreads)
    zca_whiten_combine_kernel(WhitenCombineArguments p) {
  const int64_t i = int64_t(blockIdx.x) * kWhitenCombineThreads + threadIdx.x;
  const int64_t area = int64_t(p.size) * p.size, group = i / area;
  if (group >= p.groups) return;
  const int row = int(i % area) / p.size, column = int(i % area) % p.size;
  float sum = p.parts.at(group, row, column);
  if (p.add_transposed) sum += p.parts.at(group, column, row);
  p.out[i] = sum / float(p.samples);
}

inline void combine_moments(const WhitenCombineArguments& p, Stream stream) {
  const int64_t count = p.groups * p.size * p.size;
  launch("zca_whiten_combine", zca_whiten_combine_kernel,
         dim3(unsigned((count + kWhitenCombineThreads - 1) / kWhitenCombineThreads)),
         dim3(kWhitenCombineThreads), 0, stream, p);
}

struct WhitenMatrixArguments {
  int size;
  double eps;
  float* matrix;   // (groups, size, size): the covariance, and W in its place
  float* scale;    // (groups, size)
  float* vectors;  // (groups, size, size), in columns
};

// Copies a covariance to shared memory. Returns whether it is finite.
__device__ __forceinline__ bool load_covariance(const float* covariance, const EighShared& shared) {
  constexpr float kLargest = 0x1.fffffep127f;
  const int size = shared.size, side = shared.side();
  bool finite = true;
  for (int i = thread_id(); i < side * side; i += kWhitenThreads) {
    const int row = i / side, column = i % side;
    const bool exists = row < size && column < size;
    const float value = exists ? covariance[row * size + column] : 0;
    finite = finite && fabsf(value) <= kLargest;  // which NaN is not
    shared_store(shared.matrix() + i, value);
  }
  return !block_any<kWhitenThreads>(!finite, shared.flags());
}

// A block for each group. Where the covariance is not finite, or its eigenvalues are not found, all
// of the group is NaN.
static __global__ void __launch_bounds__(kWhitenThreads, 1)
    zca_whiten_matrix_kernel(WhitenMatrixArguments p) {
  const int size = p.size, area = size * size;
  const EighShared shared{size};
  const int side = shared.side();
  float* matrix = p.matrix + int64_t(blockIdx.x) * area;
  float* scale = p.scale + int64_t(blockIdx.x) * size;
  float* vectors = p.vectors + int64_t(blockIdx.x) * area;
  Eigenvalues eigenvalues{false, 0};
  if (load_covariance(matrix, shared)) eigenvalues = eigh<kWhitenThreads>(shared, kMostSweeps);
  if (!eigenvalues.found) {
    const float nan = float_of(0x7fc00000u);
    for (int i = thread_id(); i < area; i += kWhitenThreads) {
      matrix[i] = vectors[i] = nan;
      if (i < size) scale[i] = nan;
    }
    return;
  }
  // In double, so that no scale of the features overflows, and no eps vanishes.
  auto* scales = reinterpret_cast<float*>(shared.rotations());
  for (int k = thread_id(); k < size; k += kWhitenThreads) {
    const double value =
        double(shared_load(shared.matrix() + k * (side + 1))) * double(eigenvalues.unit);
    scale[k] = float(1 / sqrt((value > 0 ? value : 0) + p.eps));
    shared_store(scales + k, scale[k]);
  }
  for (int i = thread_id(); i < area; i += kWhitenThreads) {
    vectors[i] = shared_load(shared.vectors() + i % size * side + i / size);
  }
  block_barrier();  // scales are there
  auto element = [&](int k, int i) { return shared_load(shared.vectors() + k * side + i); };
  multiply_square(
      size, [&](int i, int k) { return shared_load(scales + k) * element(k, i); }, element,
      [&](int i, int j, float value) {
        if (i < j) return;  // symmetric to the bit
        matrix[i * size + j] = value;
        matrix[j * size + i] = value;
      });
}

}  // namespace medmoco
