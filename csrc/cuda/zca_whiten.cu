// zca_whiten on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "../checks.h"
#include "device.cuh"
#include "zca_whiten.cuh"

namespace medmoco {
namespace {

using torch::stable::accelerator::DeviceGuard;

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kFloat16;
    default: return Storage::kFloat32;
  }
}

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), storage_of(tensor), tensor.stride(0), tensor.stride(1)};
}

float* data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

void check_kernel_takes(const char* op, const Tensor& features, int64_t group_size) {
  if (features.scalar_type() == ScalarType::Double) {
    fail(op, ": features must be float32, bfloat16 or float16 on CUDA, got ", dtype_text(features));
  }
  if (group_size > kLargestGroup) {
    fail(op, ": group_size must be at most ", kLargestGroup, " on CUDA, got ", group_size);
  }
}

// pass(multiprocessors, allocate, stream) on the device of `features`.
template <typename Pass>
void on_device_of(const Tensor& features, Pass pass) {
  const int32_t device = features.get_device_index();
  const DeviceGuard guard(device);
  // Freed when this returns, though the kernels may still have to run: what is given this memory
  // next on the same stream runs after them.
  Tensor workspace;
  auto allocate = [&](int64_t bytes) {
    workspace = torch::stable::new_empty(features, {bytes}, ScalarType::Byte);
    return workspace.mutable_data_ptr();
  };
  pass(multiprocessors(device), allocate, current_stream(device));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zca_whiten_cuda(Tensor features,
                                                                   int64_t group_size, double eps,
                                                                   bool allow_tf32) {
  check_zca_whiten(features, group_size, eps);
  check_kernel_takes("zca_whiten", features, group_size);
  const int64_t samples = features.size(0), count = features.size(1), groups = count / group_size;
  auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::new_empty(features, sizes, ScalarType::Float);
  };
  Tensor whitened = torch::stable::new_empty(features, {samples, count});
  Tensor mean = empty({count}), scale = empty({groups, group_size});
  Tensor matrix = empty({groups, group_size, group_size});
  Tensor vectors = empty({groups, group_size, group_size});
  const ZcaWhiten p{{samples, groups, int(group_size)},
                    matrix_of(features),
                    eps,
                    whitened.mutable_data_ptr(),
                    data(mean),
                    data(matrix),
                    data(scale),
                    data(vectors)};
  on_device_of(features, [&](int multiprocessors, auto& allocate, Stream stream) {
    if (allow_tf32) {
      zca_whiten_forward<Tf32>(p, multiprocessors, allocate, stream);
    } else {
      zca_whiten_forward<Tf32x3>(p, multiprocessors, allocate, stream);
    }
  });
  return {whitened, mean, matrix, scale, vectors};
}

Tensor zca_whiten_backward_cuda(Tensor grad_whitened, Tensor features, Tensor mean, Tensor matrix,
                                Tensor scale, Tensor vectors, bool allow_tf32) {
  check_zca_whiten_backward(grad_whitened, features, mean, matrix, scale, vectors);
  const int64_t samples = features.size(0), count = features.size(1);
  check_kernel_takes("zca_whiten_backward", features, matrix.size(1));
  Tensor grad_features = torch::stable::new_empty(features, {samples, count});
  on_device_of(features, [&](int multiprocessors, auto& allocate, Stream stream) {
    using torch::stable::contiguous;
    const Tensor means = contiguous(mean), matrices = contiguous(matrix);
    const Tensor scales = contiguous(scale), bases = contiguous(vectors);
    const ZcaWhitenBackward p{{samples, matrix.size(0), int(matrix.size(1))},
                              matrix_of(features),
                              matrix_of(grad_whitened),
                              data(means),
                              data(matrices),
                              data(scales),
                              data(bases),
                              grad_features.mutable_data_ptr()};
    if (allow_tf32) {
      zca_whiten_backward<Tf32>(p, multiprocessors, allocate, stream);
    } else {
      zca_whiten_backward<Tf32x3>(p, multiprocessors, allocate, stream);
    }
  });
  return grad_features;
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CUDA, m) {
  if (medmoco::unverified_kernels_enabled()) {
    m.impl("zca_whiten", TORCH_BOX(&medmoco::zca_whiten_cuda));
    m.impl("zca_whiten_backward", TORCH_BOX(&medmoco::zca_whiten_backward_cuda));
  }
}
