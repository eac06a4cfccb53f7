// zca_whiten on the GPU, without PyTorch: what a caller needs to plan, allocate and launch.
//
// Both directions go over the rows twice, for a moment of two centred matrices, left^T right of
// each group, and for the rows times what was made of it. In between a block for each group works
// on the matrices.

#pragma once

#include "centred_apply.cuh"
#include "column_moments.cuh"
#include "workspace.cuh"
#include "zca_whiten_gradient.cuh"
#include "zca_whiten_matrix.cuh"

namespace medmoco {

constexpr int kLargestGroup = kLargestEighSize;

struct WhitenShape {
  int64_t samples, groups;
  int size;  // features of a group, at most kLargestGroup

  int64_t features() const { return groups * size; }
  MomentShape moment(bool symmetric) const { return {groups, size, size, samples, symmetric}; }
};

struct ZcaWhiten {
  WhitenShape shape;
  Matrix features;
  double eps;
  void* whitened;  // (samples, features) contiguous, stored as the features are
  float* mean;     // (features)
  float* matrix;   // (groups, size, size)
  float* scale;    // (groups, size)
  float* vectors;  // (groups, size, size)
};

struct ZcaWhitenBackward {
  WhitenShape shape;
  Matrix features, grad_whitened;
  const float *mean, *matrix, *scale, *vectors;  // of the forward pass, contiguous
  void* grad_features;                           // as whitened
};

// What the kernels hand to each other.
struct WhitenWorkspace {
  float *mean_high, *mean_low, *grad_covariance;
  unsigned char *column_sums, *parts;
  int64_t bytes;

  static WhitenWorkspace of(const WhitenShape& shape, const MomentPlan& plan, bool backward,
                            int multiprocessors, void* memory) {
    WorkspacePieces pieces(memory);
    WhitenWorkspace w{};
    w.mean_low = pieces.take<float>(shape.features());
    w.mean_high = pieces.take<float>(backward ? shape.features() : 0);
    w.grad_covariance = pieces.take<float>(backward ? shape.features() * shape.size : 0);
    w.column_sums = pieces.take<unsigned char>(
        column_moments_bytes(shape.samples, shape.features(), multiprocessors));
    w.parts = pieces.take<unsigned char>(plan.bytes());
    w.bytes = pieces.bytes();
    return w;
  }
};

// The features of every group, or gradients by them.
inline CentredOperand centred_groups(const WhitenShape& shape, const Matrix& values,
                                     const float* mean_high, const float* mean_low) {
  CentredOperand operand{};
  operand.values = values;
  operand.batch_stride = shape.size * values.column_stride;
  operand.rows = shape.samples;
  operand.columns = shape.size;
  operand.mean_high = mean_high;
  operand.mean_low = mean_low;
  operand.mean_batch_stride = shape.size;
  return operand;
}

// `matrices` (groups, size, size), symmetric, so that their rows may pass for columns.
inline Term groups_times(const WhitenShape& shape, const CentredOperand& rows,
                         const float* matrices) {
  CentredOperand right{};
  right.values = {matrices, Storage::kFloat32, shape.size, 1};
  right.batch_stride = int64_t(shape.size) * shape.size;
  right.rows = right.columns = shape.size;
  return {rows, right, shape.size};
}

template <typename Kind>
void write_groups(const char* name, const WhitenShape& shape, ApplyArguments a, void* out,
                  Storage storage, int multiprocessors, Stream stream) {
  a.batch = shape.groups;
  a.rows = shape.samples;
  a.columns = shape.size;
  a.scale = 1;
  a.out = {out, storage, shape.size, shape.features()};
  centred_apply<Kind, kRowsAreLines>(name, a, multiprocessors, stream);
}

// On `stream`. There must be a sample; without features nothing is launched. allocate(bytes) gives
// the workspace, aligned to 16 bytes.
template <typename Kind, typename Allocate>
void zca_whiten_forward(const ZcaWhiten& p, int multiprocessors, Allocate allocate, Stream stream) {
  const WhitenShape& shape = p.shape;
  if (shape.groups == 0) return;
  MomentPlan plan = MomentPlan::of(shape.moment(true), multiprocessors);
  auto workspace = [&](void* memory) {
    return WhitenWorkspace::of(shape, plan, false, multiprocessors, memory);
  };
  const auto w = workspace(allocate(workspace(nullptr).bytes));
  Moments mean{};
  mean.mean_high = p.mean;
  mean.mean_low = w.mean_low;
  column_moments(p.features, shape.samples, shape.features(), mean, w.column_sums, multiprocessors,
                 stream);
  const auto features = centred_groups(shape, p.features, p.mean, w.mean_low);
  plan.parts.data = reinterpret_cast<float*>(w.parts);
  centred_moment<Kind, kRowsAreDepth>("zca_whiten_covariance", plan,
                                      {features, features, shape.samples}, stream);
  combine_moments({plan.parts, shape.groups, shape.samples, shape.size, false, p.matrix}, stream);
  launch("zca_whiten_matrix", zca_whiten_matrix_kernel, dim3(unsigned(shape.groups)),
         dim3(kWhitenThreads), EighShared{shape.size}.bytes(kWhitenThreads), stream,
         WhitenMatrixArguments{shape.size, p.eps, p.matrix, p.scale, p.vectors});
  ApplyArguments apply{};
  apply.terms[0] = groups_times(shape, features, p.matrix);
  apply.term_count = 1;
  write_groups<Kind>("zca_whiten_apply", shape, apply, p.whitened, p.features.storage,
                     multiprocessors, stream);
}

// The same for the gradient by the features.
template <typename Kind, typename Allocate>
void zca_whiten_backward(const ZcaWhitenBackward& p, int multiprocessors, Allocate allocate,
                         Stream stream) {
  const WhitenShape& shape = p.shape;
  if (shape.groups == 0) return;
  MomentPlan plan = MomentPlan::of(shape.moment(false), multiprocessors);
  auto workspace = [&](void* memory) {
    return WhitenWorkspace::of(shape, plan, true, multiprocessors, memory);
  };
  const auto w = workspace(allocate(workspace(nullptr).bytes));
  // The gradient of centring, less its own mean, is taken where it costs least: before.
  Moments mean{};
  mean.mean_high = w.mean_high;
  mean.mean_low = w.mean_low;
  column_moments(p.grad_whitened, shape.samples, shape.features(), mean, w.column_sums,
                 multiprocessors, stream);
  const auto grad = centred_groups(shape, p.grad_whitened, w.mean_high, w.mean_low);
  const auto features = centred_groups(shape, p.features, p.mean, nullptr);
  plan.parts.data = reinterpret_cast<float*>(w.parts);
  centred_moment<Kind, kRowsAreDepth>("zca_whiten_grad_matrix", plan,
                                      {features, grad, shape.samples}, stream);
  combine_moments({plan.parts, shape.groups, shape.samples, shape.size, true, w.grad_covariance},
                  stream);
  launch("zca_whiten_gradient", zca_whiten_gradient_kernel, dim3(unsigned(shape.groups)),
         dim3(kWhitenThreads), WhitenGradientShared{shape.size}.bytes(), stream,
         WhitenGradientArguments{shape.size, p.scale, p.vectors, w.grad_covariance});
  ApplyArguments apply{};
  apply.terms[0] = groups_times(shape, grad, p.matrix);
  apply.terms[1] = groups_times(shape, features, w.grad_covariance);
  apply.term_count = 2;
  write_groups<Kind>("zca_whiten_apply_backward", shape, apply, p.grad_features, p.features.storage,
                     multiprocessors, stream);
}

}  // namespace medmoco
