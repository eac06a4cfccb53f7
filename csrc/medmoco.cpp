// The schema of every operator. Kernels are registered beside their code, in cpu/ and cuda/;
// the Python side (fake, autograd, autocast) is in medmoco/ops/.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(medmoco, m) {
  m.def(
      "queue_info_nce(Tensor query, Tensor key, Tensor queue, float temperature=0.2, "
      "Tensor? query_ids=None, Tensor? queue_ids=None, bool compute_direction=True, "
      "bool allow_tf32=False) -> (Tensor loss, Tensor rank, Tensor direction)");
  m.def(
      "queue_info_nce_backward(Tensor grad_loss, Tensor query, Tensor loss, Tensor direction, "
      "float temperature, bool compute_grad_query, bool compute_grad_key) "
      "-> (Tensor grad_query, Tensor grad_key)");
  m.def(
      "dense_match(Tensor query_map, Tensor key_map, bool allow_tf32=False) "
      "-> (Tensor index, Tensor similarity)");
  m.def(
      "zca_whiten(Tensor features, int group_size, float eps, bool allow_tf32=False) "
      "-> (Tensor whitened, Tensor mean, Tensor matrix, Tensor scale, Tensor vectors)");
  m.def(
      "zca_whiten_backward(Tensor grad_whitened, Tensor features, Tensor mean, Tensor matrix, "
      "Tensor scale, Tensor vectors, bool allow_tf32=False) -> Tensor grad_features");
  m.def(
      "covariance_loss(Tensor features, bool allow_tf32=False) "
      "-> (Tensor loss, Tensor mean, Tensor matrix)");
  m.def(
      "covariance_loss_backward(Tensor grad_loss, Tensor features, Tensor mean, Tensor matrix, "
      "bool allow_tf32=False) -> Tensor grad_features");
}
