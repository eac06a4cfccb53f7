// Eigendecomposition of small symmetric matrices by torch's own LAPACK, which goes through a batch
// one matrix after another: callers share a batch out over threads.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

namespace medmoco {

// Eigenvalues (count, size), ascending, and eigenvectors (count, size, size), in columns, of any
// strides; nothing if LAPACK fails, so that no exception leaves a thread. The matrices must be
// finite: LAPACK may not return from others.
inline std::optional<std::pair<torch::stable::Tensor, torch::stable::Tensor>> eigh(
    const torch::stable::Tensor& matrices) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 2> stack{from(matrices), from(std::string("L"))};
  if (torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION)) return {};
  return std::pair(to<torch::stable::Tensor>(stack[0]), to<torch::stable::Tensor>(stack[1]));
}

}  // namespace medmoco
