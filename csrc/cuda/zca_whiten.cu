// zca_whiten on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "tensors.cuh"
#include "zca_whiten.cuh"

namespace medmoco {
namespace {

float* data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

void check_kernel_takes(const char* op, const Tensor& features, int64_t group_size) {
  refuse_float64(op, "features", features);
  if (group_size > kLargestGroup) {
    fail(op, ": group_size must be at most ", kLargestGroup, " on CUDA, got ", group_size);
  }
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
  run_on_device_of(features, [&](auto... where) {
    if (allow_tf32) {
      zca_whiten_forward<Tf32>(p, where...);
    } else {
      zca_whiten_forward<Tf32x3>(p, where...);
    }
  });
  return {whitened, mean, matrix, scale, vectors};
}

Tensor zca_whiten_backward_cuda(Tensor grad_whitened, Tensor features, Tensor mean, Tensor matrix,
                                Tensor scale, Tensor vectors, bool allow_tf32) {
  const char* op = "zca_whiten_backward";
  check_zca_whiten_backward(grad_whitened, features, mean, matrix, scale, vectors);
  check_kernel_takes(op, features, matrix.size(1));
  check_beside_features(op, "grad_whitened", grad_whitened, features);
  check_beside_features(op, "mean", mean, features);
  check_beside_features(op, "matrix", matrix, features);
  check_beside_features(op, "scale", scale, features);
  check_beside_features(op, "vectors", vectors, features);
  Tensor grad_features = torch::stable::new_empty(features, {features.size(0), features.size(1)});
  run_on_device_of(features, [&](auto... where) {
    using torch::stable::contiguous;
    const Tensor means = contiguous(mean), matrices = contiguous(matrix);
    const Tensor scales = contiguous(scale), bases = contiguous(vectors);
    const ZcaWhitenBackward p{{features.size(0), matrix.size(0), int(matrix.size(1))},
                              matrix_of(features),
                              matrix_of(grad_whitened),
                              data(means),
                              data(matrices),
                              data(scales),
                              data(bases),
                              grad_features.mutable_data_ptr()};
    if (allow_tf32) {
      zca_whiten_backward<Tf32>(p, where...);
    } else {
      zca_whiten_backward<Tf32x3>(p, where...);
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
