// Backward of queue_info_nce on CUDA: the forward pass has left the direction, so it only scales.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../checks.h"
#include "device.cuh"

namespace medmoco {
namespace {

constexpr int kThreads = 256;

// grad_query = grad_loss * direction and grad_key = grad_loss * expm1(-loss) / temperature * query,
// each left out when its pointer is null. Outputs are contiguous, inputs have any strides.
template <typename Scalar>
struct BackwardArguments {
  const float *grad_loss, *loss, *direction;
  const Scalar* query;
  int64_t grad_stride, loss_stride, direction_stride[2], query_stride[2];
  int64_t elements, embed_dim;
  float inverse_temperature;
  Scalar *grad_query, *grad_key;
};

template <typename Scalar>
__global__ void backward_kernel(BackwardArguments<Scalar> a) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.elements; i += stride) {
    const int64_t row = i / a.embed_dim, column = i % a.embed_dim;
    const float outer = a.grad_loss[row * a.grad_stride];
    if (a.grad_query) {
      const int64_t offset = row * a.direction_stride[0] + column * a.direction_stride[1];
      a.grad_query[i] = static_cast<Scalar>(outer * a.direction[offset]);
    }
    if (a.grad_key) {
      const float factor = outer * expm1f(-a.loss[row * a.loss_stride]) * a.inverse_temperature;
      const int64_t offset = row * a.query_stride[0] + column * a.query_stride[1];
      a.grad_key[i] = static_cast<Scalar>(factor * static_cast<float>(a.query[offset]));
    }
  }
}

template <typename Scalar>
void backward(const Tensor& grad_loss, const Tensor& query, const Tensor& loss,
              const Tensor& direction, double temperature, Tensor& grad_query, Tensor& grad_key,
              bool compute_grad_query, bool compute_grad_key) {
  BackwardArguments<Scalar> a{};
  a.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  a.loss = static_cast<const float*>(loss.const_data_ptr());
  a.direction = static_cast<const float*>(direction.const_data_ptr());
  a.query = static_cast<const Scalar*>(query.const_data_ptr());
  a.grad_stride = grad_loss.stride(0);
  a.loss_stride = loss.stride(0);
  for (int d = 0; d < 2; ++d) {
    a.direction_stride[d] = direction.stride(d);
    a.query_stride[d] = query.stride(d);
  }
  a.elements = query.numel();
  a.embed_dim = query.size(1);
  a.inverse_temperature = static_cast<float>(1 / temperature);
  if (compute_grad_query) a.grad_query = static_cast<Scalar*>(grad_query.mutable_data_ptr());
  if (compute_grad_key) a.grad_key = static_cast<Scalar*>(grad_key.mutable_data_ptr());

  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t blocks = std::min<int64_t>((a.elements + kThreads - 1) / kThreads, 1 << 16);
  launch("queue_info_nce_backward", backward_kernel<Scalar>, dim3(static_cast<unsigned>(blocks)),
         dim3(kThreads), 0, current_stream(query.get_device_index()), a);
}

std::tuple<Tensor, Tensor> queue_info_nce_backward_cuda(Tensor grad_loss, Tensor query, Tensor loss,
                                                        Tensor direction, double temperature,
                                                        bool compute_grad_query,
                                                        bool compute_grad_key) {
  check_queue_info_nce_backward(grad_loss, query, loss, direction, temperature, compute_grad_query);
  if (query.scalar_type() == ScalarType::Double) {
    fail("queue_info_nce_backward: query must be float32, bfloat16 or float16 on CUDA, got ",
         dtype_text(query));
  }
  const int64_t batch = query.size(0), dim = query.size(1);
  Tensor grad_query = torch::stable::new_empty(query, {compute_grad_query ? batch : 0, dim});
  Tensor grad_key = torch::stable::new_empty(query, {compute_grad_key ? batch : 0, dim});
  auto run = [&](auto kernel) {
    kernel(grad_loss, query, loss, direction, temperature, grad_query, grad_key, compute_grad_query,
           compute_grad_key);
  };
  switch (query.scalar_type()) {
    case ScalarType::BFloat16: run(backward<c10::BFloat16>); break;
    case ScalarType::Half: run(backward<c10::Half>); break;
    default: run(backward<float>);
  }
  return {grad_query, grad_key};
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CUDA, m) {
  if (medmoco::unverified_kernels_enabled()) {
    m.impl("queue_info_nce_backward", TORCH_BOX(&medmoco::queue_info_nce_backward_cuda));
  }
}
