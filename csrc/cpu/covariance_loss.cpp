// VICReg's covariance term on the CPU: through the (D, D) covariance, or with fewer samples than
// dimensions through an (N, N) Gram matrix.
//
// Panels of the features are centred as they are read, so there is no centred copy. Work is cut up
// by the shape alone and partial sums are added in a fixed order: the result is the same at any
// number of threads.

#include "covariance_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "../checks.h"
#include "aligned.h"
#include "tasks.h"

#define MEDMOCO_KERNELS "covariance_loss.inl"
#include "for_each_instruction_set.h"

namespace medmoco {
namespace {

template <typename T, typename Scalar>
struct Kernels {
  void (*sums)(const Features<T, Scalar>&, int64_t, double*, Tasks&);
  void (*square_sums)(const Features<T, Scalar>&, int64_t, double*, Tasks&);
  void (*product)(const Product<T, Scalar>&, Tasks&);
  void (*combine)(const Product<T, Scalar>&, Tasks&);
  void (*direct)(const Features<T, Scalar>&, double*, Tasks&);
  void (*gradient)(const Gradient<T, Scalar>&, Tasks&);
  int64_t panel_rows;
};

#define MEDMOCO_CHOOSE(set)              \
  {set::moment_kernel<T, Scalar, false>, \
   set::moment_kernel<T, Scalar, true>,  \
   set::product_kernel<T, Scalar>,       \
   set::combine_kernel<T, Scalar>,       \
   set::direct_kernel<T, Scalar>,        \
   set::gradient_kernel<T, Scalar>,      \
   set::kPanelRows<T>}

template <typename T, typename Scalar>
Kernels<T, Scalar> choose_kernels() {
  switch (chosen_instruction_set()) {
#if MEDMOCO_X86_KERNELS
    case InstructionSet::kAvx512: return MEDMOCO_CHOOSE(avx512);
    case InstructionSet::kAvx2: return MEDMOCO_CHOOSE(avx2);
#endif
    default: return MEDMOCO_CHOOSE(baseline);
  }
}

// Mean over the rows of the centred features or of their squares, in double.
template <typename T, typename Scalar, typename Kernel>
std::vector<double> column_sums(const Features<T, Scalar>& features, Kernel kernel) {
  constexpr int64_t kMostSlices = 64;
  const int64_t slice_rows = std::max<int64_t>(1024, ceil_divide(features.samples, kMostSlices));
  const int64_t slices = ceil_divide(features.samples, slice_rows);
  std::vector<double> sums(slices * features.dims);
  share_out(slices * ceil_divide(features.dims, kMomentColumns),
            [&](Tasks& tasks) { kernel(features, slice_rows, sums.data(), tasks); });
  for (int64_t slice = 1; slice < slices; ++slice) {
    for (int64_t c = 0; c < features.dims; ++c) sums[c] += sums[slice * features.dims + c];
  }
  sums.resize(features.dims);
  return sums;
}

template <typename T, typename Scalar>
void centre(Features<T, Scalar>& features, const double* mean, int64_t stride) {
  for (int64_t c = 0; c < features.dims; ++c) {
    features.mean[c] = T(mean[c * stride]);
    features.mean_rest[c] = T(mean[c * stride] - double(features.mean[c]));
  }
}

// The columns of largest variance, sorted; of equal ones the lower. NaN counts as the largest.
std::vector<int64_t> largest_columns(const std::vector<double>& variance) {
  auto rank = [&](int64_t column) {
    return std::isnan(variance[column]) ? std::numeric_limits<double>::infinity()
                                        : variance[column];
  };
  std::vector<int64_t> columns(variance.size());
  std::iota(columns.begin(), columns.end(), int64_t(0));
  const auto last = columns.begin() + std::min<int64_t>(kDirectColumns, columns.size());
  std::partial_sort(columns.begin(), last, columns.end(), [&](int64_t a, int64_t b) {
    return rank(a) > rank(b) || (rank(a) == rank(b) && a < b);
  });
  columns.erase(last, columns.end());
  std::sort(columns.begin(), columns.end());
  return columns;
}

// The direct columns, and the covariance among them. That one in double: where they hold nearly all
// of the variance, it is nearly all of the loss, and may be small beside the terms of its sum.
template <typename T, typename Scalar>
void choose_direct(Features<T, Scalar>& features, const double* mean, int64_t mean_stride,
                   const Kernels<T, Scalar>& kernels) {
  features.variance = column_sums(features, kernels.square_sums);
  for (double& variance : features.variance) variance /= double(features.samples - 1);
  features.direct = largest_columns(features.variance);
  const int64_t count = features.direct.size();
  features.direct_values.resize(count * features.samples);
  double centred[kDirectColumns], products[kDirectColumns][kDirectColumns] = {};
  for (int64_t row = 0; row < features.samples; ++row) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t column = features.direct[s];
      centred[s] = double(features.values.at(row, column)) - mean[column * mean_stride];
      features.direct_values[s * features.samples + row] = T(centred[s]);
    }
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t t = 0; t < count; ++t) products[s][t] += centred[s] * centred[t];
    }
  }
  features.direct_covariance.resize(count * count);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t t = 0; t < count; ++t) {
      features.direct_covariance[s * count + t] =
          s == t ? T(0) : T(products[s][t] / double(features.samples - 1));
    }
  }
}

// Fills the matrix; returns the sum of its squares, in the primal form without the diagonal.
template <typename T, typename Scalar>
double multiply_by_itself(const Features<T, Scalar>& features, const Kernels<T, Scalar>& kernels,
                          T* matrix) {
  // With few tiles the depth is cut up as well, so that all threads have work.
  constexpr int64_t kTasks = 32, kLeastDepth = 256;
  Product<T, Scalar> product{features, features.depth(), 1, matrix, nullptr, nullptr};
  const int64_t tiles = product.tiles();
  if (tiles < kTasks) {
    const int64_t slices = kTasks / std::max<int64_t>(tiles, 1);
    product.slice_depth = std::max(kLeastDepth, ceil_divide(features.depth(), slices));
    product.slices = ceil_divide(features.depth(), product.slice_depth);
  }
  std::vector<double> tile_sums(tiles);
  std::vector<T> partial(product.slices > 1 ? product.slices * tiles * kTile * kTile : 0);
  product.tile_sums = tile_sums.data();
  product.partial = partial.data();
  share_out(tiles * product.slices, [&](Tasks& tasks) { kernels.product(product, tasks); });
  if (product.slices > 1) {
    share_out(tiles, [&](Tasks& tasks) { kernels.combine(product, tasks); });
  }
  return std::accumulate(tile_sums.begin(), tile_sums.end(), 0.0);
}

template <typename T, typename Scalar>
void forward(const Tensor& input, Tensor& loss, Tensor& mean, Tensor& matrix) {
  const Kernels<T, Scalar> kernels = choose_kernels<T, Scalar>();
  Features<T, Scalar> features(input);
  double* means = static_cast<double*>(mean.mutable_data_ptr());
  const std::vector<double> sums = column_sums(features, kernels.sums);
  for (int64_t c = 0; c < features.dims; ++c) means[c] = sums[c] / double(features.samples);
  centre(features, means, 1);
  if (features.gram()) choose_direct(features, means, 1, kernels);

  T* matrix_data = static_cast<T*>(matrix.mutable_data_ptr());
  double total = multiply_by_itself(features, kernels, matrix_data);
  if (features.gram()) {
    for (int64_t c = 0; c < features.dims; ++c) {
      if (!features.is_direct(c)) total -= features.variance[c] * features.variance[c];
    }
    total = total < 0 ? 0 : total;  // by rounding; NaN stays
    std::vector<double> panel_sums(ceil_divide(features.dims, kernels.panel_rows));
    share_out(panel_sums.size(),
              [&](Tasks& tasks) { kernels.direct(features, panel_sums.data(), tasks); });
    total = std::accumulate(panel_sums.begin(), panel_sums.end(), total);
  }
  *static_cast<T*>(loss.mutable_data_ptr()) = T(total / double(features.dims));
}

std::tuple<Tensor, Tensor, Tensor> covariance_loss_cpu(Tensor features, bool /*allow_tf32*/) {
  check_covariance_loss(features);
  const int64_t side = std::min(features.size(0), features.size(1));
  const ScalarType dtype = wide_dtype(features);
  Tensor loss = torch::stable::new_empty(features, {}, dtype);
  Tensor mean = torch::stable::new_empty(features, {features.size(1)}, ScalarType::Double);
  Tensor matrix = torch::stable::new_empty(features, {side, side}, dtype);
  with_dtype(features.scalar_type(), [&]<typename T, typename Scalar>() {
    forward<T, Scalar>(features, loss, mean, matrix);
  });
  return {loss, mean, matrix};
}

template <typename T, typename Scalar>
void backward(const Tensor& grad_loss, const Tensor& input, const Tensor& mean,
              const Tensor& matrix, Tensor& grad_features) {
  const Kernels<T, Scalar> kernels = choose_kernels<T, Scalar>();
  Features<T, Scalar> features(input);
  const double* means = static_cast<const double*>(mean.const_data_ptr());
  centre(features, means, mean.stride(0));
  if (features.gram()) choose_direct(features, means, mean.stride(0), kernels);
  const double outer = *static_cast<const T*>(grad_loss.const_data_ptr());
  const double scale = 4 * outer / (double(features.dims) * double(features.samples - 1));
  const Gradient<T, Scalar> gradient{features, static_cast<const T*>(matrix.const_data_ptr()),
                                     T(scale),
                                     static_cast<Scalar*>(grad_features.mutable_data_ptr())};
  share_out(gradient.tasks(), [&](Tasks& tasks) { kernels.gradient(gradient, tasks); });
}

Tensor covariance_loss_backward_cpu(Tensor grad_loss, Tensor features, Tensor mean, Tensor matrix,
                                    bool /*allow_tf32*/) {
  check_covariance_loss_backward(grad_loss, features, mean, matrix);
  Tensor grad_features = torch::stable::new_empty(features, features.sizes());
  const Tensor rows = torch::stable::contiguous(matrix);
  with_dtype(features.scalar_type(), [&]<typename T, typename Scalar>() {
    backward<T, Scalar>(grad_loss, features, mean, rows, grad_features);
  });
  return grad_features;
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CPU, m) {
  m.impl("covariance_loss", TORCH_BOX(&medmoco::covariance_loss_cpu));
  m.impl("covariance_loss_backward", TORCH_BOX(&medmoco::covariance_loss_backward_cpu));
}
