// InfoNCE of each query against its key and a queue of negatives, on the CPU.
//
// Streams the queue once for each group of queries, keeping running sums, so the
// (batch, queue_size) logits never exist. Threads share out the groups, and where these are few,
// segments of the queue; the result is the same bits at any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "operand.h"
#include "tasks.h"

namespace medmoco {
namespace {

// Scalar is what the operands hold, T what is computed with: float, or double for double.
template <typename T, typename Scalar>
struct Problem {
  Matrix<T, Scalar> query, key, queue;
  int64_t batch, queue_size, embed_dim;
  int64_t tile_keys;  // keys of the queue that are worked on at a time
  double temperature;
  T scale;  // log2(e) / temperature: weights are taken in powers of 2
  const int64_t* query_ids = nullptr;
  const int64_t* queue_ids = nullptr;
  int64_t query_ids_stride = 0, queue_ids_stride = 0;
  T* loss = nullptr;
  int32_t* rank = nullptr;
  T* direction = nullptr;  // null when not asked for
};

}  // namespace
}  // namespace medmoco

#define MEDMOCO_KERNELS "queue_info_nce.inl"
#include "for_each_instruction_set.h"

namespace medmoco {
namespace {

template <typename T, typename Scalar>
using ForwardKernel = void (*)(const Problem<T, Scalar>&);

template <typename T, typename Scalar>
ForwardKernel<T, Scalar> choose_kernel() {
  switch (chosen_instruction_set()) {
#if MEDMOCO_X86_KERNELS
    case InstructionSet::kAvx512: return avx512::forward_kernel<T, Scalar>;
    case InstructionSet::kAvx2: return avx2::forward_kernel<T, Scalar>;
#endif
    default: return baseline::forward_kernel<T, Scalar>;
  }
}

// As many keys as keep a tile of the queue within the second-level cache.
template <typename T>
int64_t choose_tile_keys(int64_t embed_dim) {
  const int64_t bytes = 128 * 1024;
  const int64_t fitting = bytes / (std::max<int64_t>(embed_dim, 1) * int64_t(sizeof(T)));
  return std::clamp<int64_t>(fitting / 12 * 12, 24, 240);  // 12: whole register blocks
}

template <typename T, typename Scalar>
void forward(const Tensor& query, const Tensor& key, const Tensor& queue, double temperature,
             const std::optional<Tensor>& query_ids, const std::optional<Tensor>& queue_ids,
             Tensor& loss, Tensor& rank, Tensor& direction, bool compute_direction) {
  using Operand = Matrix<T, Scalar>;
  Problem<T, Scalar> problem{Operand(query),
                             Operand(key),
                             Operand(queue),
                             query.size(0),
                             queue.size(0),
                             query.size(1),
                             choose_tile_keys<T>(query.size(1)),
                             temperature,
                             T(1.44269504088896340736 / temperature)};
  if (query_ids) {
    problem.query_ids = static_cast<const int64_t*>(query_ids->const_data_ptr());
    problem.query_ids_stride = query_ids->stride(0);
    problem.queue_ids = static_cast<const int64_t*>(queue_ids->const_data_ptr());
    problem.queue_ids_stride = queue_ids->stride(0);
  }
  problem.loss = static_cast<T*>(loss.mutable_data_ptr());
  problem.rank = static_cast<int32_t*>(rank.mutable_data_ptr());
  if (compute_direction) problem.direction = static_cast<T*>(direction.mutable_data_ptr());

  choose_kernel<T, Scalar>()(problem);
}

std::tuple<Tensor, Tensor, Tensor> queue_info_nce_cpu(Tensor query, Tensor key, Tensor queue,
                                                      double temperature,
                                                      std::optional<Tensor> query_ids,
                                                      std::optional<Tensor> queue_ids,
                                                      bool compute_direction, bool /*allow_tf32*/) {
  check_queue_info_nce(query, key, queue, temperature, query_ids, queue_ids);
  const int64_t batch = query.size(0);
  const ScalarType dtype = wide_dtype(query);
  Tensor loss = torch::stable::new_empty(query, {batch}, dtype);
  Tensor rank = torch::stable::new_empty(query, {batch}, ScalarType::Int);
  Tensor direction =
      torch::stable::new_empty(query, {compute_direction ? batch : 0, query.size(1)}, dtype);
  with_dtype(query.scalar_type(), [&]<typename T, typename Scalar>() {
    forward<T, Scalar>(query, key, queue, temperature, query_ids, queue_ids, loss, rank, direction,
                       compute_direction);
  });
  return {loss, rank, direction};
}

template <typename T, typename Scalar>
void backward(const Tensor& grad_loss, const Tensor& query, const Tensor& loss,
              const Tensor& direction, double temperature, Tensor& grad_query, Tensor& grad_key,
              bool compute_grad_query, bool compute_grad_key) {
  const int64_t dim = query.size(1);
  const Matrix<T, Scalar> queries(query);
  const Matrix<T, T> directions(direction);
  const T* grad = static_cast<const T*>(grad_loss.const_data_ptr());
  const T* losses = static_cast<const T*>(loss.const_data_ptr());
  const int64_t grad_stride = grad_loss.stride(0), loss_stride = loss.stride(0);
  Scalar* to_query = static_cast<Scalar*>(grad_query.mutable_data_ptr());
  Scalar* to_key = static_cast<Scalar*>(grad_key.mutable_data_ptr());
  auto run = [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T outer = grad[row * grad_stride];
      if (compute_grad_query) {
        for (int64_t c = 0; c < dim; ++c) {
          to_query[row * dim + c] = static_cast<Scalar>(outer * directions.at(row, c));
        }
      }
      if (compute_grad_key) {
        const T factor = outer * T(std::expm1(-double(losses[row * loss_stride])) / temperature);
        for (int64_t c = 0; c < dim; ++c) {
          to_key[row * dim + c] = static_cast<Scalar>(factor * queries.at(row, c));
        }
      }
    }
  };
  // 32768 elements are worth a thread.
  torch::stable::parallel_for(0, query.size(0), 1 + 32768 / (dim + 1), run);
}

std::tuple<Tensor, Tensor> queue_info_nce_backward_cpu(Tensor grad_loss, Tensor query, Tensor loss,
                                                       Tensor direction, double temperature,
                                                       bool compute_grad_query,
                                                       bool compute_grad_key) {
  check_queue_info_nce_backward(grad_loss, query, loss, direction, temperature, compute_grad_query);
  const int64_t batch = query.size(0), dim = query.size(1);
  Tensor grad_query = torch::stable::new_empty(query, {compute_grad_query ? batch : 0, dim});
  Tensor grad_key = torch::stable::new_empty(query, {compute_grad_key ? batch : 0, dim});
  with_dtype(query.scalar_type(), [&]<typename T, typename Scalar>() {
    backward<T, Scalar>(grad_loss, query, loss, direction, temperature, grad_query, grad_key,
                        compute_grad_query, compute_grad_key);
  });
  return {grad_query, grad_key};
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CPU, m) {
  m.impl("queue_info_nce", TORCH_BOX(&medmoco::queue_info_nce_cpu));
  m.impl("queue_info_nce_backward", TORCH_BOX(&medmoco::queue_info_nce_backward_cpu));
}
