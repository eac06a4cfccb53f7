// Eigendecomposition of symmetric matrices by torch's own LAPACK, which goes through a batch one
// matrix after another: callers share a batch out over threads.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace medmoco {

// Eigenvalues (count, size) and eigenvectors (count, size, size), in columns, of finite matrices:
// LAPACK may not return from others. False if it fails, so that no exception leaves a thread.
template <typename T>
bool eigh_by_lapack(const T* matrices, int64_t count, int64_t size, T* values, T* vectors) {
  using torch::stable::Tensor;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  constexpr auto dtype = sizeof(T) == sizeof(double) ? torch::headeronly::ScalarType::Double
                                                     : torch::headeronly::ScalarType::Float;
  Tensor batch = torch::stable::empty({count, size, size}, dtype);
  std::copy_n(matrices, count * size * size, static_cast<T*>(batch.mutable_data_ptr()));
  std::array<StableIValue, 2> stack{from(batch), from(std::string("L"))};
  if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION)) return false;
  const Tensor found_values = to<Tensor>(stack[0]);
  const Tensor found_vectors = torch::stable::contiguous(to<Tensor>(stack[1]));
  std::copy_n(static_cast<const T*>(found_values.const_data_ptr()), count * size, values);
  std::copy_n(static_cast<const T*>(found_vectors.const_data_ptr()), count * size * size, vectors);
  return true;
}

}  // namespace medmoco
