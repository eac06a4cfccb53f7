// The gradient of zca_whiten by the covariance of each group.

#pragma once

#include "operands.cuh"
#include "zca_whiten_products.cuh"

namespace medmoco {

struct WhitenGradientArguments {
  int size;
  const float* scale;    // (groups, size)
  const float* vectors;  // (groups, size, size), in columns
  float* gradient;       // (groups, size, size): by W, symmetric; by the covariance in its place
};

// Two matrices, rows padded to an odd length: a column too is read without bank conflicts.
struct WhitenGradientShared {
  int size;

  __host__ __device__ int stride() const { return size | 1; }
  __device__ float* gradient() const { return reinterpret_cast<float*>(shared_memory()); }
  __device__ float* vectors() const { return gradient() + size * stride(); }
  __host__ __device__ int bytes() const { return 2 * size * stride() * int(sizeof(float)); }
};

// A block for each group: takes the gradient to the eigenbasis, multiplies it there by the divided
// differences of l^{-1/2}, and takes it back.
static __global__ void __launch_bounds__(kWhitenThreads, 1)
    zca_whiten_gradient_kernel(WhitenGradientArguments p) {
  const int size = p.size, area = size * size;
  const WhitenGradientShared shared{size};
  const int stride = shared.stride();
  const float* scale = p.scale + int64_t(blockIdx.x) * size;
  const float* vectors = p.vectors + int64_t(blockIdx.x) * area;
  float* gradient = p.gradient + int64_t(blockIdx.x) * area;
  for (int i = thread_id(); i < area; i += kWhitenThreads) {
    const int place = i / size * stride + i % size;
    shared_store(shared.gradient() + place, gradient[i]);
    shared_store(shared.vectors() + place, vectors[i]);
  }
  block_barrier();  // both are there
  auto x = [&](int i, int j) { return shared_load(shared.gradient() + i * stride + j); };
  auto set = [&](int i, int j, float value) {
    shared_store(shared.gradient() + i * stride + j, value);
  };
  auto u = [&](int i, int j) { return shared_load(shared.vectors() + i * stride + j); };
  auto transposed_u = [&](int i, int j) { return u(j, i); };
  multiply_square(size, x, u, set);
  multiply_square(size, transposed_u, x, [&](int i, int j, float value) {
    // At scale_i = l_i^{-1/2}, -1 / (sqrt l_i sqrt l_j (sqrt l_i + sqrt l_j)): nothing is divided
    // by l_i - l_j, and the derivative itself stands on the diagonal. In this order the cube of a
    // scale, which may not fit, never stands alone.
    const float both = scale[i] * scale[j];
    set(i, j, -both * (both / (scale[i] + scale[j]) * value));
  });
  multiply_square(size, u, x, set);
  multiply_square(size, x, transposed_u,
                  [&](int i, int j, float value) { gradient[i * size + j] = value; });
}

}  // namespace medmoco
