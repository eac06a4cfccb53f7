// covariance_loss on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "covariance_loss.cuh"
#include "tensors.cuh"

namespace medmoco {
namespace {

CovarianceFeatures features_of(const Tensor& features) {
  return {matrix_of(features), features.size(0), features.size(1)};
}

std::tuple<Tensor, Tensor, Tensor> covariance_loss_cuda(Tensor features, bool allow_tf32) {
  check_covariance_loss(features);
  refuse_float64("covariance_loss", "features", features);
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
  refuse_float64(op, "features", features);
  check_beside_features(op, "grad_loss", grad_loss, features);
  check_beside_features(op, "mean", mean, features);
  check_beside_features(op, "matrix", matrix, features);
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
