// covariance_loss on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "../checks.h"
#include "covariance_loss.cuh"
#include "device.cuh"

namespace medmoco {
namespace {

using torch::stable::accelerator::DeviceGuard;

Matrix matrix_of(const Tensor& tensor) {
  Storage storage = Storage::kFloat32;
  if (tensor.scalar_type() == ScalarType::BFloat16) storage = Storage::kBFloat16;
  if (tensor.scalar_type() == ScalarType::Half) storage = Storage::kFloat16;
  return {tensor.const_data_ptr(), storage, tensor.stride(0), tensor.stride(1)};
}

CovarianceFeatures features_of(const Tensor& features) {
  return {matrix_of(features), features.size(0), features.size(1)};
}

void refuse_float64(const char* op, const Tensor& features) {
  if (features.scalar_type() == ScalarType::Double) {
    fail(op, ": features must be float32, bfloat16 or float16 on CUDA, got ", dtype_text(features));
  }
}

// Calls run(multiprocessors, allocate, stream) for the device of `features`.
template <typename Run>
void run_on_device_of(const Tensor& features, Run run) {
  const int32_t device = features.get_device_index();
  const DeviceGuard guard(device);
  // Freed when this returns, though the kernels may still have to run: what is given this memory
  // next on the same stream runs after them.
  Tensor workspace;
  auto allocate = [&](int64_t bytes) {
    workspace = torch::stable::new_empty(features, {bytes}, ScalarType::Byte);
    return workspace.mutable_data_ptr();
  };
  run(multiprocessors(device), allocate, current_stream(device));
}

std::tuple<Tensor, Tensor, Tensor> covariance_loss_cuda(Tensor features, bool allow_tf32) {
  check_covariance_loss(features);
  refuse_float64("covariance_loss", features);
  const CovarianceFeatures f = features_of(features);
  Tensor loss = torch::stable::new_empty(features, {}, ScalarType::Float);
  Tensor mean = torch::stable::new_empty(features, {f.dims}, ScalarType::Double);
  Tensor matrix = torch::stable::new_empty(features, {f.side(), f.side()}, ScalarType::Float);
  const CovarianceLoss out{static_cast<float*>(loss.mutable_data_ptr()),
                           static_cast<double*>(mean.mutable_data_ptr()),
                           static_cast<float*>(matrix.mutable_data_ptr())};
  run_on_device_of(features, [&](auto... where) {
    if (allow_tf32) {
      covariance_loss_forward<Tf32>(f, out, where...);
    } else {
      covariance_loss_forward<Tf32x3>(f, out, where...);
    }
  });
  return {loss, mean, matrix};
}

Tensor covariance_loss_backward_cuda(Tensor grad_loss, Tensor features, Tensor mean, Tensor matrix,
                                     bool allow_tf32) {
  const char* op = "covariance_loss_backward";
  check_covariance_loss_backward(grad_loss, features, mean, matrix);
  refuse_float64(op, features);
  for (const auto& [name, tensor] : {std::pair("grad_loss", &grad_loss), {"matrix", &matrix}}) {
    if (device_text(*tensor) != device_text(features)) {
      fail(op, ": ", name, " must be on ", device_text(features), " to match features, got ",
           device_text(*tensor));
    }
  }
  Tensor grad_features = torch::stable::new_empty(features, features.sizes());
  const CovarianceGradient p{static_cast<const float*>(grad_loss.const_data_ptr()),
                             matrix_of(matrix), grad_features.mutable_data_ptr()};
  run_on_device_of(features, [&](auto... where) {
    if (allow_tf32) {
      covariance_loss_backward<Tf32>(features_of(features), p, where...);
    } else {
      covariance_loss_backward<Tf32x3>(features_of(features), p, where...);
    }
  });
  return grad_features;
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CUDA, m) {
  if (medmoco::unverified_kernels_enabled()) {
    m.impl("covariance_loss", TORCH_BOX(&medmoco::covariance_loss_cuda));
    m.impl("covariance_loss_backward", TORCH_BOX(&medmoco::covariance_loss_backward_cuda));
  }
}
