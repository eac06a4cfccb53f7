// queue_info_nce on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "queue_info_nce.cuh"
#include "queue_info_nce_backward.cuh"
#include "tensors.cuh"

namespace medmoco {
namespace {

template <typename Element>
Rows<Element> rows_of(const Tensor& tensor) {
  return {static_cast<const Element*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0), tensor.stride(1)};
}

template <typename Kind>
void forward(const Tensor& query, const Tensor& key, const Tensor& queue, double temperature,
             const std::optional<Tensor>& query_ids, const std::optional<Tensor>& queue_ids,
             Tensor& loss, Tensor& rank, Tensor& direction, bool compute_direction) {
  QueueInfoNce<typename Kind::Element> p{};
  p.query = rows_of<typename Kind::Element>(query);
  p.key = rows_of<typename Kind::Element>(key);
  p.queue = rows_of<typename Kind::Element>(queue);
  p.temperature = temperature;
  if (query_ids) {
    p.query_ids = static_cast<const int64_t*>(query_ids->const_data_ptr());
    p.query_ids_stride = query_ids->stride(0);
    p.queue_ids = static_cast<const int64_t*>(queue_ids->const_data_ptr());
    p.queue_ids_stride = queue_ids->stride(0);
  }
  p.loss = static_cast<float*>(loss.mutable_data_ptr());
  p.rank = static_cast<int32_t*>(rank.mutable_data_ptr());
  if (compute_direction) p.direction = static_cast<float*>(direction.mutable_data_ptr());

  run_on_device_of(query, [&](auto... where) { queue_info_nce_forward<Kind>(p, where...); });
}

std::tuple<Tensor, Tensor, Tensor> queue_info_nce_cuda(Tensor query, Tensor key, Tensor queue,
                                                       double temperature,
                                                       std::optional<Tensor> query_ids,
                                                       std::optional<Tensor> queue_ids,
                                                       bool compute_direction, bool allow_tf32) {
  check_queue_info_nce(query, key, queue, temperature, query_ids, queue_ids);
  refuse_float64("queue_info_nce", "query", query);
  if (query.size(1) > kMostEmbedDim) {
    fail("queue_info_nce: query must be (batch, at most ", kMostEmbedDim, ") on CUDA, got ",
         shape_text(query));
  }
  const int64_t batch = query.size(0);
  Tensor loss = torch::stable::new_empty(query, {batch}, ScalarType::Float);
  Tensor rank = torch::stable::new_empty(query, {batch}, ScalarType::Int);
  Tensor direction = torch::stable::new_empty(query, {compute_direction ? batch : 0, query.size(1)},
                                              ScalarType::Float);
  auto run = [&](auto kernel) {
    kernel(query, key, queue, temperature, query_ids, queue_ids, loss, rank, direction,
           compute_direction);
  };
  switch (query.scalar_type()) {
    case ScalarType::BFloat16: run(forward<SixteenBit<BFloat16>>); break;
    case ScalarType::Half: run(forward<SixteenBit<Half>>); break;
    default: run(allow_tf32 ? forward<Tf32> : forward<Tf32x3>);
  }
  return {loss, rank, direction};
}

template <typename Scalar>
void backward(const Tensor& grad_loss, const Tensor& query, const Tensor& loss,
              const Tensor& direction, double temperature, Tensor& grad_query, Tensor& grad_key,
              bool compute_grad_query, bool compute_grad_key) {
  BackwardArguments<Scalar> p{};
  p.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  p.loss = static_cast<const float*>(loss.const_data_ptr());
  p.direction = static_cast<const float*>(direction.const_data_ptr());
  p.query = static_cast<const Scalar*>(query.const_data_ptr());
  p.grad_stride = grad_loss.stride(0);
  p.loss_stride = loss.stride(0);
  for (int d = 0; d < 2; ++d) {
    p.direction_stride[d] = direction.stride(d);
    p.query_stride[d] = query.stride(d);
  }
  p.batch = query.size(0);
  p.embed_dim = query.size(1);
  p.inverse_temperature = static_cast<float>(1 / temperature);
  if (compute_grad_query) p.grad_query = static_cast<Scalar*>(grad_query.mutable_data_ptr());
  if (compute_grad_key) p.grad_key = static_cast<Scalar*>(grad_key.mutable_data_ptr());

  run_on_device_of(query, [&](int, auto&, Stream stream) { queue_info_nce_backward(p, stream); });
}

std::tuple<Tensor, Tensor> queue_info_nce_backward_cuda(Tensor grad_loss, Tensor query, Tensor loss,
                                                        Tensor direction, double temperature,
                                                        bool compute_grad_query,
                                                        bool compute_grad_key) {
  check_queue_info_nce_backward(grad_loss, query, loss, direction, temperature, compute_grad_query);
  refuse_float64("queue_info_nce_backward", "query", query);
  const int64_t batch = query.size(0), dim = query.size(1);
  Tensor grad_query = torch::stable::new_empty(query, {compute_grad_query ? batch : 0, dim});
  Tensor grad_key = torch::stable::new_empty(query, {compute_grad_key ? batch : 0, dim});
  auto run = [&](auto kernel) {
    kernel(grad_loss, query, loss, direction, temperature, grad_query, grad_key, compute_grad_query,
           compute_grad_key);
  };
  switch (query.scalar_type()) {
    case ScalarType::BFloat16: run(backward<BFloat16>); break;
    case ScalarType::Half: run(backward<Half>); break;
    default: run(backward<float>);
  }
  return {grad_query, grad_key};
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CUDA, m) {
  if (medmoco::unverified_kernels_enabled()) {
    m.impl("queue_info_nce", TORCH_BOX(&medmoco::queue_info_nce_cuda));
    m.impl("queue_info_nce_backward", TORCH_BOX(&medmoco::queue_info_nce_backward_cuda));
  }
}
