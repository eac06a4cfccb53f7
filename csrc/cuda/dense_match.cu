// dense_match on CUDA: tensors to and from the kernels.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "dense_match.cuh"
#include "tensors.cuh"

namespace medmoco {
namespace {

template <typename Element>
FeatureMap<Element> map_of(const Tensor& tensor) {
  return {static_cast<const Element*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2), tensor.size(2)};
}

template <typename Kind>
void match(const Tensor& query_map, const Tensor& key_map, Tensor& index, Tensor& similarity) {
  DenseMatch<typename Kind::Element> p{};
  p.query = map_of<typename Kind::Element>(query_map);
  p.key = map_of<typename Kind::Element>(key_map);
  p.batch = query_map.size(0);
  p.channels = query_map.size(1);
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());

  run_on_device_of(query_map, [&](auto... where) { dense_match_forward<Kind>(p, where...); });
}

std::tuple<Tensor, Tensor> dense_match_cuda(Tensor query_map, Tensor key_map, bool allow_tf32) {
  check_dense_match(query_map, key_map);
  refuse_float64("dense_match", "query_map", query_map);
  const int64_t batch = query_map.size(0), queries = query_map.size(2);
  Tensor index = torch::stable::new_empty(query_map, {batch, queries}, ScalarType::Long);
  Tensor similarity = torch::stable::new_empty(query_map, {batch, queries}, ScalarType::Float);
  auto run = [&](auto kernel) { kernel(query_map, key_map, index, similarity); };
  switch (query_map.scalar_type()) {
    case ScalarType::BFloat16: run(match<SixteenBit<BFloat16>>); break;
    case ScalarType::Half: run(match<SixteenBit<Half>>); break;
    default: run(allow_tf32 ? match<Tf32> : match<Tf32x3>);
  }
  return {index, similarity};
}

}  // namespace
}  // namespace medmoco

STABLE_TORCH_LIBRARY_IMPL(medmoco, CUDA, m) {
  if (medmoco::unverified_kernels_enabled()) {
    m.impl("dense_match", TORCH_BOX(&medmoco::dense_match_cuda));
  }
}
