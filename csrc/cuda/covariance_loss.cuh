// covariance_loss on the GPU, without PyTorch: what a caller needs to allocate and launch.
//
// With C the covariance, V its diagonal and Z the centred features, the loss is the sum of the
// squares of C - V, over D, and its gradient 4 / (D (N-1)) Z (C - V). With fewer samples than
// features the Gram form has W = Z Z^T / (N-1) in place of C: the squares are as many, but V can
// only be subtracted. So the columns of largest variance are left out of W. With Z_d those direct
// columns and C_d their rows of C, less V, the gradient is as W Z + Z_d C_d - V Z.

#pragma once

#include <algorithm>
#include <stdexcept>

#include "centred_apply.cuh"
#include "column_moments.cuh"
#include "covariance_loss_combine.cuh"
#include "workspace.cuh"

namespace medmoco {

struct CovarianceFeatures {
  Matrix values;  // (samples, dims)
  int64_t samples, dims;

  bool gram() const { return samples < dims; }
  int64_t side() const { return std::min(samples, dims); }  // of the matrix
  double scale() const { return 1 / double(samples - 1); }
  int64_t panels() const { return gram() ? direct_panels(dims) : 0; }
  MomentShape shape() const { return {1, side(), side(), std::max(samples, dims), true}; }
};

struct CovarianceLoss {
  float* loss;    // ()
  double* mean;   // (dims)
  float* matrix;  // (side, side)
};

struct CovarianceGradient {
  const float* grad_loss;  // ()
  Matrix matrix;           // (side, side)
  void* grad_features;     // (samples, dims), stored as the features are
};

// What the kernels hand to each other.
struct CovarianceWorkspace {
  unsigned char* moments;
  double *mean, *squares;  // of each column
  float *mean_high, *mean_low;
  // Of the Gram form alone:
  int* rank;
  double *direct, *direct_sums;
  float *direct_rounded, *direct_rows, *rest_variance;
  // Of the loss alone:
  float* parts;
  double* square_sums;
  int64_t bytes;

  // `plan` is that of the loss; null: of the gradient. No memory: its bytes are counted.
  static CovarianceWorkspace of(const CovarianceFeatures& f, const MomentPlan* plan,
                                int multiprocessors, void* memory) {
    WorkspacePieces pieces(memory);
    CovarianceWorkspace w{};
    const int64_t gram = f.gram() ? 1 : 0;
    w.moments =
        pieces.take<unsigned char>(column_moments_bytes(f.samples, f.dims, multiprocessors));
    w.squares = pieces.take<double>(f.dims);
    w.mean_high = pieces.take<float>(f.dims);
    w.mean_low = pieces.take<float>(f.dims);
    w.rank = pieces.take<int>(gram * f.dims);
    w.direct = pieces.take<double>(gram * f.samples * kDirectColumns);
    if (plan) {
      w.direct_sums = pieces.take<double>(f.panels());
      w.parts = pieces.take<float>(plan->bytes() / int64_t(sizeof(float)));
      w.square_sums = pieces.take<double>(squares_of(plan->parts.tiles));
    } else {
      w.mean = pieces.take<double>(f.dims);
      w.direct_rounded = pieces.take<float>(gram * f.samples * kDirectColumns);
      w.direct_rows = pieces.take<float>(gram * f.dims * kDirectColumns);
      w.rest_variance = pieces.take<float>(gram * f.dims);
    }
    w.bytes = pieces.bytes();
    return w;
  }
};

inline CentredOperand centred(const CovarianceFeatures& f, const CovarianceWorkspace& w) {
  CentredOperand operand{};
  operand.values = f.values;
  operand.rows = f.samples;
  operand.columns = f.dims;
  operand.mean_high = w.mean_high;
  operand.mean_low = w.mean_low;
  return operand;
}

inline CentredOperand plain(const Matrix& values, int64_t rows, int64_t columns) {
  CentredOperand operand{};
  operand.values = values;
  operand.rows = rows;
  operand.columns = columns;
  return operand;
}

// Moments of the columns and, for the Gram form, their ranks.
inline void prepare_covariance(const CovarianceFeatures& f, const CovarianceWorkspace& w,
                               int multiprocessors, Stream stream) {
  constexpr int64_t kMost = int64_t(1) << 30;  // ranks count in 32 bits
  if (f.gram() && f.dims > kMost) {
    throw std::runtime_error("covariance_loss: more than 2^30 features");
  }
  column_moments(f.values, f.samples, f.dims, {w.mean, w.mean_high, w.mean_low, w.squares},
                 w.moments, multiprocessors, stream);
  if (!f.gram()) return;
  rank_columns({f.values, f.samples, f.dims, w.mean, w.squares, w.rank, w.direct, w.direct_rounded,
                w.rest_variance},
               stream);
}

// Loss, mean and matrix, on `stream`, of at least two samples. allocate(bytes) gives the workspace,
// aligned to 16 bytes.
template <typename Kind, typename Allocate>
void covariance_loss_forward(const CovarianceFeatures& f, const CovarianceLoss& out,
                             int multiprocessors, Allocate allocate, Stream stream) {
  CovarianceSumArguments sum{};
  sum.dims = f.dims;
  sum.loss = out.loss;
  if (f.dims == 0) return sum_covariance_loss(sum, stream);  // NaN

  MomentPlan plan = MomentPlan::of(f.shape(), multiprocessors);
  auto workspace = [&](void* memory) {
    return CovarianceWorkspace::of(f, &plan, multiprocessors, memory);
  };
  auto w = workspace(allocate(workspace(nullptr).bytes));
  w.mean = out.mean;
  prepare_covariance(f, w, multiprocessors, stream);

  Term term{centred(f, w), {}, std::max(f.samples, f.dims)};
  term.left.rank = f.gram() ? w.rank : nullptr;
  term.left.least_rank = kDirectColumns;
  term.right = term.left;
  plan.parts.data = w.parts;
  constexpr const char* kName = "covariance_loss";
  if (f.gram()) {
    centred_moment<Kind, kRowsAreLines>(kName, plan, term, stream);
  } else {
    centred_moment<Kind, kRowsAreDepth>(kName, plan, term, stream);
  }

  CovarianceCombineArguments combine{};
  combine.parts = plan.parts;
  combine.side = f.side();
  combine.squares = squares_of(plan.parts.tiles);
  combine.with_diagonal = f.gram();
  combine.scale = f.scale();
  combine.matrix = out.matrix;
  combine.sums = w.square_sums;
  combine.direct = {f.values, f.samples, f.dims, w.mean, w.rank, w.direct, nullptr, w.direct_sums};
  combine_covariance(combine, f.panels(), stream);

  sum.samples = f.samples;
  sum.squares = combine.squares;
  sum.panels = f.panels();
  sum.square_sums = w.square_sums;
  sum.direct_sums = w.direct_sums;
  sum.column_squares = w.squares;
  sum.rank = w.rank;
  sum_covariance_loss(sum, stream);
}

// The gradient, on `stream`. The moments are worked out anew: the Gram form needs all of them.
template <typename Kind, typename Allocate>
void covariance_loss_backward(const CovarianceFeatures& f, const CovarianceGradient& p,
                              int multiprocessors, Allocate allocate, Stream stream) {
  if (f.dims == 0) return;
  auto workspace = [&](void* memory) {
    return CovarianceWorkspace::of(f, nullptr, multiprocessors, memory);
  };
  const auto w = workspace(allocate(workspace(nullptr).bytes));
  prepare_covariance(f, w, multiprocessors, stream);

  ApplyArguments a{};
  a.batch = 1;
  a.rows = f.samples;
  a.columns = f.dims;
  a.term_count = 1;
  a.scale = float(4 * f.scale() / double(f.dims));
  a.factor = p.grad_loss;
  a.out = {p.grad_features, f.values.storage, 0, f.dims};
  constexpr const char* kName = "covariance_loss_backward";
  if (!f.gram()) {
    a.terms[0] = {centred(f, w), plain(p.matrix, f.dims, f.dims), f.dims};
    a.terms[0].right.zero_diagonal = true;
    // The matrix is its own mirror image; so it is read along its rows.
    centred_apply<Kind, kRowsAreLines>(kName, a, multiprocessors, stream);
    return;
  }
  CovarianceCombineArguments direct{};
  direct.direct = {f.values, f.samples, f.dims, w.mean, w.rank, w.direct, w.direct_rows, nullptr};
  combine_covariance(direct, f.panels(), stream);
  a.term_count = 2;
  a.terms[0] = {plain(p.matrix, f.samples, f.samples), centred(f, w), f.samples};
  const Matrix columns{w.direct_rounded, Storage::kFloat32, kDirectColumns, 1};
  const Matrix rows{w.direct_rows, Storage::kFloat32, f.dims, 1};
  a.terms[1] = {plain(columns, f.samples, kDirectColumns), plain(rows, kDirectColumns, f.dims),
                kDirectColumns};
  a.feature_factor = w.rest_variance;
  a.features = centred(f, w);
  centred_apply<Kind, kRowsAreDepth>(kName, a, multiprocessors, stream);
}

}  // namespace medmoco
