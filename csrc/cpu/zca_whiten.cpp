// ZCA whitening of features, group by group, on the CPU.
//
// Threads share out groups, panels of columns and blocks of rows. What they share is cut by the
// shape alone and added up in a fixed order, so the bits do not depend on how many threads there
// are (but LAPACK's may, for groups of more than kLargestOwnSize).

#include "zca_whiten.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "lapack.h"
#include "tasks.h"

#define MEDMOCO_KERNELS "zca_whiten.inl"
#include "for_each_instruction_set.h"

namespace medmoco {
namespace {

constexpr int64_t kLargestOwnSize = 64;  // beyond it the blocked algorithms of LAPACK are faster
constexpr int64_t kLeastParts = 64;      // what a pass is cut into, for as many threads

template <typename T, typename Scalar>
Kernels<T, Scalar> choose_kernels() {
  switch (chosen_instruction_set()) {
#if MEDMOCO_X86_KERNELS
    case InstructionSet::kAvx512: return avx512::all_kernels<T, Scalar>();
    case InstructionSet::kAvx2: return avx2::all_kernels<T, Scalar>();
#endif
    default: return baseline::all_kernels<T, Scalar>();
  }
}

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// function(i, workspace) for i in [0, count), shared out over threads.
template <typename T, typename Function>
void for_each_part(int64_t count, const Function& function) {
  share_out(count, [&](Tasks& tasks) {
    Workspace<T> work;
    for (int64_t i; tasks.take(i);) function(i, work);
  });
}

// The shape of a problem and how it is cut.
template <typename T, typename Scalar>
struct Whitening {
  Kernels<T, Scalar> kernels = choose_kernels<T, Scalar>();
  int64_t samples, features, size, groups;

  Whitening(const Tensor& rows, int64_t group_size)
      : samples(rows.size(0)),
        features(rows.size(1)),
        size(group_size),
        groups(features / group_size) {}

  // Blocks of whole tiles, as many as make kLeastParts parts of `others` and the rows allow.
  int64_t row_blocks(int64_t others) const {
    const int64_t wanted = divide_up(kLeastParts, std::max<int64_t>(others, 1));
    return std::min(wanted, divide_up(samples, kTileRows));
  }

  Part part(int64_t group, int64_t block, int64_t blocks) const {
    const int64_t rows = divide_up(samples, blocks);
    return {group * size, size, std::min(samples, block * rows),
            std::min(samples, (block + 1) * rows)};
  }

  void take_mean(const Matrix<T, Scalar>& values, T* mean) const {
    const int64_t blocks = row_blocks(groups);
    std::vector<double> sums(blocks * features);
    for_each_part<T>(blocks * groups, [&](int64_t i, Workspace<T>&) {
      const int64_t block = i / groups, group = i % groups;
      kernels.sum(values, part(group, block, blocks),
                  sums.data() + block * features + group * size);
    });
    for (int64_t c = 0; c < features; ++c) {
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) total += sums[block * features + c];
      mean[c] = T(total / double(samples));
    }
  }

  // left^T right of every group.
  class Moments;

  void apply(const std::vector<Term<T, Scalar>>& terms, Scalar* out) const {
    const int64_t blocks = divide_up(samples, kTileRows);
    for_each_part<T>(blocks * groups, [&](int64_t i, Workspace<T>& work) {
      kernels.apply(terms, part(i % groups, i / groups, blocks), work, out, features);
    });
  }
};

template <typename T, typename Scalar>
class Whitening<T, Scalar>::Moments {
 public:
  Moments(const Whitening& problem, const Centred<T, Scalar>& left, const Centred<T, Scalar>& right,
          bool symmetric)
      : size_(problem.size), panel_rows_(problem.kernels.panel_rows), symmetric_(symmetric) {
    // Four panels at a time, so that a tile is laid out for enough of them to be worth it.
    const int64_t panels = divide_up(size_, panel_rows_), cuts = divide_up(panels, 4);
    const int64_t groups = problem.groups;
    blocks_ = problem.row_blocks(groups * cuts);
    matrix_ = panels * size_ * panel_rows_;
    block_ = groups * matrix_;
    values_.resize(blocks_ * block_);
    for_each_part<T>(blocks_ * groups * cuts, [&](int64_t i, Workspace<T>& work) {
      const int64_t block = i / (groups * cuts), group = i / cuts % groups;
      Part part = problem.part(group, block, blocks_);
      part.first_panel = i % cuts * 4;
      part.last_panel = std::min(panels, part.first_panel + 4);
      problem.kernels.moment(left, right, symmetric, part, work,
                             values_.data() + block * block_ + group * matrix_);
    });
  }

  // The moment of one group, row-major.
  void copy(int64_t group, T* moment) const {
    std::fill_n(moment, size_ * size_, T(0));
    for (int64_t block = 0; block < blocks_; ++block) {
      const T* panel = values_.data() + block * block_ + group * matrix_;
      for (int64_t first = 0; first < size_; first += panel_rows_, panel += size_ * panel_rows_) {
        const int64_t width = std::min(panel_rows_, size_ - first);
        for (int64_t i = symmetric_ ? first : 0; i < size_; ++i) {
          for (int64_t lane = 0; lane < width; ++lane) {
            moment[i * size_ + first + lane] += panel[i * panel_rows_ + lane];
          }
        }
      }
    }
    for (int64_t i = 0; symmetric_ && i < size_; ++i) {
      for (int64_t j = 0; j < i; ++j) moment[j * size_ + i] = moment[i * size_ + j];
    }
  }

 private:
  int64_t size_, panel_rows_, blocks_ = 0, block_ = 0, matrix_ = 0;
  bool symmetric_;
  AlignedVector<T> values_;  // [row block][group][panel][row][lane]
};

template <typename T>
struct Decomposition {
  T *matrix, *scale, *vectors;
};

// Of the groups [first, last): eigenvectors, scale = (max(l, 0) + eps)^{-1/2}, and the whitening
// matrix. All of them NaN where the covariance is not finite. False if no decomposition is found.
template <typename T, typename Scalar>
bool decompose(const Whitening<T, Scalar>& problem,
               const typename Whitening<T, Scalar>::Moments& moments, double eps, int64_t first,
               int64_t last, const Decomposition<T>& out) {
  const int64_t size = problem.size, area = size * size, count = last - first;
  std::vector<T> covariances(count * area), values(count * size);
  std::vector<bool> finite(count, true);
  for (int64_t i = 0; i < count; ++i) {
    T* covariance = covariances.data() + i * area;
    moments.copy(first + i, covariance);
    for (int64_t e = 0; e < area; ++e) {
      covariance[e] /= T(problem.samples);
      if (!std::isfinite(covariance[e])) finite[i] = false;
    }
    if (!finite[i]) std::fill_n(covariance, area, T(0));
  }
  const auto eigh = size <= kLargestOwnSize ? problem.kernels.eigh : eigh_by_lapack<T>;
  if (!eigh(covariances.data(), count, size, values.data(), out.vectors + first * area)) {
    return false;
  }
  Workspace<T> work;
  for (int64_t i = 0; i < count; ++i) {
    T* scale = out.scale + (first + i) * size;
    T* vectors = out.vectors + (first + i) * area;
    for (int64_t k = 0; k < size; ++k) {
      scale[k] = T(1) / std::sqrt(std::max(values[i * size + k], T(0)) + T(eps));
    }
    if (!finite[i]) {
      std::fill_n(scale, size, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(vectors, area, std::numeric_limits<T>::quiet_NaN());
    }
    problem.kernels.compose(vectors, scale, size, work, out.matrix + (first + i) * area);
  }
  return true;
}

template <typename T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T, typename Scalar>
void forward(const Tensor& features, int64_t group_size, double eps, Tensor& whitened, Tensor& mean,
             Tensor& matrix, Tensor& scale, Tensor& vectors) {
  const Whitening<T, Scalar> problem(features, group_size);
  const Matrix<T, Scalar> values(features);
  problem.take_mean(values, data<T>(mean));
  const Centred<T, Scalar> centred{values, data<T>(mean)};
  const typename Whitening<T, Scalar>::Moments moments(problem, centred, centred, true);
  const Decomposition<T> out{data<T>(matrix), data<T>(scale), data<T>(vectors)};
  std::atomic<bool> failed = false;
  torch::stable::parallel_for(0, problem.groups, 1, [&](int64_t first, int64_t last) {
    if (!decompose(problem, moments, eps, first, last, out)) failed = true;
  });
  if (failed) fail("zca_whiten: the eigendecomposition of a covariance did not converge");
  problem.apply({{centred, out.matrix}}, data<Scalar>(whitened));
}

template <typename T, typename Scalar>
void backward(const Tensor& grad_whitened, const Tensor& features, const Tensor& mean,
              const Tensor& matrix, const Tensor& scale, const Tensor& vectors,
              Tensor& grad_features) {
  const int64_t size = matrix.size(1), area = size * size;
  const Whitening<T, Scalar> problem(features, size);
  const Matrix<T, Scalar> grads(grad_whitened);
  const T* scales = static_cast<const T*>(scale.const_data_ptr());
  const T* bases = static_cast<const T*>(vectors.const_data_ptr());
  // The gradient of centring, less its own mean, is taken where it costs least: before.
  std::vector<T> grad_mean(problem.features);
  problem.take_mean(grads, grad_mean.data());
  const Centred<T, Scalar> grad{grads, grad_mean.data()};
  const Centred<T, Scalar> centred{Matrix<T, Scalar>(features),
                                   static_cast<const T*>(mean.const_data_ptr())};
  const typename Whitening<T, Scalar>::Moments moments(problem, centred, grad, false);
  std::vector<T> grad_covariance(problem.groups * area);
  for_each_part<T>(problem.groups, [&](int64_t group, Workspace<T>& work) {
    std::vector<T> grad_matrix(area);
    moments.copy(group, grad_matrix.data());
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const T sum = grad_matrix[i * size + j] + grad_matrix[j * size + i];
        grad_matrix[i * size + j] = grad_matrix[j * size + i] = sum;
      }
    }
    problem.kernels.covariance_gradient(grad_matrix.data(), bases + group * area,
                                        scales + group * size, size, problem.samples, work,
                                        grad_covariance.data() + group * area);
  });
  problem.apply(
      {{grad, static_cast<const T*>(matrix.const_data_ptr())}, {centred, grad_covariance.data()}},
      data<Scalar>(grad_features));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zca_whiten_cpu(Tensor features,
                                                                  int64_t group_size, double eps,
                                                                  bool /*allow_tf32*/) {
  check_zca_whiten(features, group_size, eps);
  const int64_t count = features.size(1), groups = count / group_size;
  const ScalarType dtype = wide_dtype(features);
  Tensor whitened = torch::stable::new_empty(features, {features.size(0), count});
  Tensor mean = torch::stable::new_empty(features, {count}, dtype);
  Tensor matrix = torch::stable::new_empty(features, {groups, group_size, group_size}, dtype);
  Tensor scale = torch::stable::new_empty(features, {groups, group_size}, dtype);
  Tensor vectors = torch::stable::new_empty(features, {groups, group_size, group_size}, dtype);
  with_dtype(features.scalar_type(), [&]<typename T, typename Scalar>() {
    forward<T, Scalar>(features, group_size, eps, whitened, mean, matrix, scale, vectors);
  });
  return {whitened, mean, matrix, scale, vectors};
}

Tensor zca_whiten_backward_cpu(Tensor grad_whitened, Tensor features, Tensor mean, Tensor matrix,
                               Tensor scale, Tensor vectors, bool /*allow_tf32*/) {
  check_zca_whiten_backward(grad_whitened, features, mean, matrix, scale, vectors);
  Tensor grad_features = torch::stable::new_empty(features, {features.size(0), features.size(1)});
  using torch::stable::contiguous;
  with_dtype(features.scalar_type(), [&]<typename T, typename Scalar>() {
    backward<T, Scalar>(grad_whitened, features, contiguous(mean), contiguous(matrix),
                        contiguous(scale), contiguous(vectors), grad_features);
  });
  return grad_features;
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CPU, m) {
  m.impl("zca_whiten", TORCH_BOX(&medmoco::zca_whiten_cpu));
  m.impl("zca_whiten_backward", TORCH_BOX(&medmoco::zca_whiten_backward_cpu));
}
