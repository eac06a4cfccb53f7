// The most similar key position of each query position, on the CPU.
//
// Streams the key map once for each group of query positions, keeping the best so far, so the
// (positions, positions) similarities never exist. Threads share out the groups; what a query
// position finds does not depend on how, so it is the same at any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "aligned.h"
#include "operand.h"

namespace medmoco {
namespace {

// (batch, channels, positions) of any strides.
template <typename Scalar>
struct FeatureMap {
  const Scalar* data;
  int64_t batch_stride, channel_stride, position_stride;

  explicit FeatureMap(const Tensor& tensor)
      : data(static_cast<const Scalar*>(tensor.const_data_ptr())),
        batch_stride(tensor.stride(0)),
        channel_stride(tensor.stride(1)),
        position_stride(tensor.stride(2)) {}
};

// Scalar is what the maps hold, T what is computed with: float, or double for double.
template <typename T, typename Scalar>
struct Problem {
  FeatureMap<Scalar> query, key;
  int64_t channels, queries, keys;
  int64_t panels;       // that the query positions of one map fill
  int64_t groups;       // that they are shared out to
  int64_t most_panels;  // in a group
  int64_t* index;
  T* similarity;
};

}  // namespace
}  // namespace medmoco

#define MEDMOCO_KERNELS "dense_match.inl"
#include "for_each_instruction_set.h"

namespace medmoco {
namespace {

template <typename T, typename Scalar>
struct Choice {
  void (*kernel)(const Problem<T, Scalar>&, int64_t, int64_t);
  int64_t panel_rows, most_panels;
};

template <typename T, typename Scalar>
Choice<T, Scalar> choose_kernel(int64_t channels) {
  switch (chosen_instruction_set()) {
#if MEDMOCO_X86_KERNELS
    case InstructionSet::kAvx512:
      return {avx512::match_kernel<T, Scalar>, avx512::kPanelRows<T>,
              avx512::most_panels<T>(channels)};
    case InstructionSet::kAvx2:
      return {avx2::match_kernel<T, Scalar>, avx2::kPanelRows<T>, avx2::most_panels<T>(channels)};
#endif
    default:
      return {baseline::match_kernel<T, Scalar>, baseline::kPanelRows<T>,
              baseline::most_panels<T>(channels)};
  }
}

template <typename T, typename Scalar>
void match(const Tensor& query_map, const Tensor& key_map, Tensor& index, Tensor& similarity) {
  const int64_t batch = query_map.size(0), channels = query_map.size(1);
  const int64_t queries = query_map.size(2), keys = key_map.size(2);
  const auto [kernel, panel_rows, most_panels] = choose_kernel<T, Scalar>(channels);
  const int64_t panels = (queries + panel_rows - 1) / panel_rows;
  // As large as the cache allows, but no larger than to give every thread its share.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (batch * panels + threads - 1) / threads;
  const int64_t in_group = std::clamp<int64_t>(share, 1, most_panels);
  const int64_t groups = (panels + in_group - 1) / in_group;
  const Problem<T, Scalar> problem{FeatureMap<Scalar>(query_map),
                                   FeatureMap<Scalar>(key_map),
                                   channels,
                                   queries,
                                   keys,
                                   panels,
                                   groups,
                                   in_group,
                                   static_cast<int64_t*>(index.mutable_data_ptr()),
                                   static_cast<T*>(similarity.mutable_data_ptr())};
  torch::stable::parallel_for(
      0, batch * groups, 1,
      [&, kernel = kernel](int64_t first, int64_t last) { kernel(problem, first, last); });
}

std::tuple<Tensor, Tensor> dense_match_cpu(Tensor query_map, Tensor key_map, bool /*allow_tf32*/) {
  check_dense_match(query_map, key_map);
  const int64_t batch = query_map.size(0), queries = query_map.size(2);
  Tensor index = torch::stable::new_empty(query_map, {batch, queries}, ScalarType::Long);
  Tensor similarity = torch::stable::new_empty(query_map, {batch, queries}, wide_dtype(query_map));
  with_dtype(query_map.scalar_type(), [&]<typename T, typename Scalar>() {
    match<T, Scalar>(query_map, key_map, index, similarity);
  });
  return {index, similarity};
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CPU, m) {
  m.impl("dense_match", TORCH_BOX(&medmoco::dense_match_cpu));
}
