// The backward kernel of queue_info_nce: the forward pass has left the direction, so it only
// scales.

#pragma once

#include "primitives.cuh"

namespace medmoco {

constexpr int kBackwardThreads = 256;

// grad_query = grad_loss * direction and grad_key = grad_loss * expm1(-loss) / temperature * query,
// each left out where its pointer is null. Outputs are contiguous, inputs have any strides.
template <typename Scalar>
struct BackwardArguments {
  const float *grad_loss, *loss, *direction;
  const Scalar* query;
  int64_t grad_stride, loss_stride, direction_stride[2], query_stride[2];
  int64_t batch, embed_dim;
  float inverse_temperature;
  Scalar *grad_query, *grad_key;
};

template <typename Scalar>
__global__ void __launch_bounds__(kBackwardThreads)
    queue_info_nce_backward_kernel(BackwardArguments<Scalar> p) {
  const int64_t elements = p.batch * p.embed_dim, step = int64_t(gridDim.x) * kBackwardThreads;
  for (int64_t i = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x; i < elements; i += step) {
    const int64_t row = i / p.embed_dim, column = i % p.embed_dim;
    const float outer = p.grad_loss[row * p.grad_stride];
    if (p.grad_query) {
      const int64_t offset = row * p.direction_stride[0] + column * p.direction_stride[1];
      p.grad_query[i] = from_float<Scalar>(outer * p.direction[offset]);
    }
    if (p.grad_key) {
      const float factor = outer * expm1f(-p.loss[row * p.loss_stride]) * p.inverse_temperature;
      const int64_t offset = row * p.query_stride[0] + column * p.query_stride[1];
      p.grad_key[i] = from_float<Scalar>(factor * to_float(p.query[offset]));
    }
  }
}

template <typename Scalar>
void queue_info_nce_backward(const BackwardArguments<Scalar>& p, Stream stream) {
  const int64_t blocks = (p.batch * p.embed_dim + kBackwardThreads - 1) / kBackwardThreads;
  launch("queue_info_nce_backward", queue_info_nce_backward_kernel<Scalar>,
         dim3(unsigned(blocks < 65536 ? blocks : 65536)), dim3(kBackwardThreads), 0, stream, p);
}

}  // namespace medmoco
