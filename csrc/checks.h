// Argument checks, shared by both devices. medmoco/ops/checks.py holds the same checks in Python,
// for tracing and for devices without a kernel; a test keeps the messages equal.
//
// They throw std::runtime_error: STD_TORCH_CHECK would add this file's path to the message.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace medmoco {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As Python prints a tuple: (), (4,), (4, 128).
inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

// As Python prints it, without "torch.".
inline std::string dtype_text(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  std::string text = torch::headeronly::toString(tensor.scalar_type());  // such as Float8_e4m3fn
  for (char& letter : text) letter = char(std::tolower(static_cast<unsigned char>(letter)));
  return text;
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

inline std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return std::isnan(value) ? "nan" : text;
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// What is accumulated in: float64 for float64, float32 for all else.
inline ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_kind(const char* op, const char* name, const Tensor& tensor,
                            const char* other_name, const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    fail(op, ": ", name, " must be ", dtype_text(other), " to match ", other_name, ", got ",
         dtype_text(tensor));
  }
  if (device_text(tensor) != device_text(other)) {
    fail(op, ": ", name, " must be on ", device_text(other), " to match ", other_name, ", got ",
         device_text(tensor));
  }
}

inline void check_temperature(const char* op, double temperature) {
  if (!(temperature > 0 && std::isfinite(temperature))) {
    fail(op, ": temperature must be positive and finite, got ", number_text(temperature));
  }
}

inline void check_ids(const char* op, const char* name, const Tensor& ids, int64_t count,
                      const Tensor& query) {
  if (ids.scalar_type() != ScalarType::Long || ids.dim() != 1 || ids.size(0) != count) {
    fail(op, ": ", name, " must be int64 (", count, ",), got ", dtype_text(ids), " ",
         shape_text(ids));
  }
  if (device_text(ids) != device_text(query)) {
    fail(op, ": ", name, " must be on ", device_text(query), " to match query, got ",
         device_text(ids));
  }
}

inline void check_queue_info_nce(const Tensor& query, const Tensor& key, const Tensor& queue,
                                 double temperature, const std::optional<Tensor>& query_ids,
                                 const std::optional<Tensor>& queue_ids) {
  const char* op = "queue_info_nce";
  if (query.dim() != 2) {
    fail(op, ": query must be (batch, embed_dim), got ", shape_text(query));
  }
  if (!is_floating(query)) {
    fail(op, ": query must be float32, float64, bfloat16 or float16, got ", dtype_text(query));
  }
  if (key.dim() != 2 || key.size(0) != query.size(0) || key.size(1) != query.size(1)) {
    fail(op, ": key must be ", shape_text(query), " to match query, got ", shape_text(key));
  }
  if (queue.dim() != 2 || queue.size(1) != query.size(1)) {
    fail(op, ": queue must be (queue_size, ", query.size(1), ") to match query, got ",
         shape_text(queue));
  }
  check_same_kind(op, "key", key, "query", query);
  check_same_kind(op, "queue", queue, "query", query);
  check_temperature(op, temperature);
  if (query_ids.has_value() != queue_ids.has_value()) {
    fail(op, ": query_ids and queue_ids must be given together, got only ",
         query_ids ? "query_ids" : "queue_ids");
  }
  if (query_ids) {
    check_ids(op, "query_ids", *query_ids, query.size(0), query);
    check_ids(op, "queue_ids", *queue_ids, queue.size(0), query);
  }
}

inline void check_queue_info_nce_backward(const Tensor& grad_loss, const Tensor& query,
                                          const Tensor& loss, const Tensor& direction,
                                          double temperature, bool compute_grad_query) {
  const char* op = "queue_info_nce_backward";
  if (query.dim() != 2 || !is_floating(query)) {
    fail(op, ": query must be a floating (batch, embed_dim), got ", dtype_text(query), " ",
         shape_text(query));
  }
  const bool wide = query.scalar_type() == ScalarType::Double;
  const ScalarType loss_dtype = wide ? ScalarType::Double : ScalarType::Float;
  const char* expected = wide ? "float64 (" : "float32 (";
  auto check_row_values = [&](const char* name, const Tensor& rows) {
    if (rows.scalar_type() != loss_dtype || rows.dim() != 1 || rows.size(0) != query.size(0)) {
      fail(op, ": ", name, " must be ", expected, query.size(0), ",), got ", dtype_text(rows), " ",
           shape_text(rows));
    }
  };
  check_row_values("grad_loss", grad_loss);
  check_row_values("loss", loss);
  if (compute_grad_query &&
      (direction.scalar_type() != loss_dtype || direction.dim() != 2 ||
       direction.size(0) != query.size(0) || direction.size(1) != query.size(1))) {
    fail(op, ": direction must be ", wide ? "float64 " : "float32 ", shape_text(query), ", got ",
         dtype_text(direction), " ", shape_text(direction));
  }
  check_temperature(op, temperature);
}

inline void check_dense_match(const Tensor& query_map, const Tensor& key_map) {
  const char* op = "dense_match";
  auto check_map = [&](const char* name, const Tensor& map) {
    if (map.dim() != 3) {
      fail(op, ": ", name, " must be (batch, channels, positions), got ", shape_text(map));
    }
  };
  check_map("query_map", query_map);
  check_map("key_map", key_map);
  if (!is_floating(query_map)) {
    fail(op, ": query_map must be float32, float64, bfloat16 or float16, got ",
         dtype_text(query_map));
  }
  if (query_map.size(1) == 0) {
    fail(op, ": query_map must have at least one channel, got ", shape_text(query_map));
  }
  if (key_map.size(0) != query_map.size(0) || key_map.size(1) != query_map.size(1)) {
    fail(op, ": key_map must be (", query_map.size(0), ", ", query_map.size(1),
         ", ...) to match query_map, got ", shape_text(key_map));
  }
  check_same_kind(op, "key_map", key_map, "query_map", query_map);
  if (key_map.size(2) == 0) {
    fail(op, ": key_map must have at least one position, got ", shape_text(key_map));
  }
}

// (samples, features) of a floating dtype, with enough samples for the statistic.
inline void check_features(const char* op, const Tensor& features, int64_t least_samples) {
  if (features.dim() != 2) {
    fail(op, ": features must be (samples, features), got ", shape_text(features));
  }
  if (!is_floating(features)) {
    fail(op, ": features must be float32, float64, bfloat16 or float16, got ",
         dtype_text(features));
  }
  if (features.size(0) < least_samples) {
    fail(op, ": features must have at least ", least_samples, " sample",
         least_samples > 1 ? "s" : "", ", got ", features.size(0));
  }
}

inline void check_zca_whiten(const Tensor& features, int64_t group_size, double eps) {
  const char* op = "zca_whiten";
  check_features(op, features, 1);
  if (group_size < 1 || features.size(1) % group_size != 0) {
    fail(op, ": group_size must divide the ", features.size(1), " features, got ", group_size);
  }
  if (!(eps > 0 && std::isfinite(eps))) {
    fail(op, ": eps must be positive and finite, got ", number_text(eps));
  }
}

inline void check_zca_whiten_backward(const Tensor& grad_whitened, const Tensor& features,
                                      const Tensor& mean, const Tensor& matrix, const Tensor& scale,
                                      const Tensor& vectors) {
  const char* op = "zca_whiten_backward";
  check_features(op, features, 1);
  if (grad_whitened.scalar_type() != features.scalar_type() || grad_whitened.dim() != 2 ||
      grad_whitened.size(0) != features.size(0) || grad_whitened.size(1) != features.size(1)) {
    fail(op, ": grad_whitened must be ", dtype_text(features), " ", shape_text(features), ", got ",
         dtype_text(grad_whitened), " ", shape_text(grad_whitened));
  }
  const int64_t count = features.size(1);
  const bool wide = features.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const char* kind = wide ? "float64" : "float32";
  if (matrix.scalar_type() != dtype || matrix.dim() != 3 || matrix.size(1) < 1 ||
      matrix.size(1) != matrix.size(2) || matrix.size(0) * matrix.size(1) != count) {
    fail(op, ": matrix must be ", kind, " (groups, group_size, group_size) of ", count,
         " features, got ", dtype_text(matrix), " ", shape_text(matrix));
  }
  const int64_t groups = matrix.size(0), size = matrix.size(1);
  if (mean.scalar_type() != dtype || mean.dim() != 1 || mean.size(0) != count) {
    fail(op, ": mean must be ", kind, " (", count, ",), got ", dtype_text(mean), " ",
         shape_text(mean));
  }
  if (scale.scalar_type() != dtype || scale.dim() != 2 || scale.size(0) != groups ||
      scale.size(1) != size) {
    fail(op, ": scale must be ", kind, " (", groups, ", ", size, "), got ", dtype_text(scale), " ",
         shape_text(scale));
  }
  if (vectors.scalar_type() != dtype || vectors.dim() != 3 || vectors.size(0) != groups ||
      vectors.size(1) != size || vectors.size(2) != size) {
    fail(op, ": vectors must be ", kind, " ", shape_text(matrix), ", got ", dtype_text(vectors),
         " ", shape_text(vectors));
  }
}

inline void check_covariance_loss(const Tensor& features) {
  check_features("covariance_loss", features, 2);
}

inline void check_covariance_loss_backward(const Tensor& grad_loss, const Tensor& features,
                                           const Tensor& mean, const Tensor& matrix) {
  const char* op = "covariance_loss_backward";
  check_features(op, features, 2);
  const ScalarType dtype = wide_dtype(features);
  const char* expected = dtype == ScalarType::Double ? "float64" : "float32";
  if (grad_loss.scalar_type() != dtype || grad_loss.dim() != 0) {
    fail(op, ": grad_loss must be ", expected, " (), got ", dtype_text(grad_loss), " ",
         shape_text(grad_loss));
  }
  const int64_t dims = features.size(1), side = std::min(features.size(0), dims);
  if (mean.scalar_type() != ScalarType::Double || mean.dim() != 1 || mean.size(0) != dims) {
    fail(op, ": mean must be float64 (", dims, ",), got ", dtype_text(mean), " ", shape_text(mean));
  }
  if (matrix.scalar_type() != dtype || matrix.dim() != 2 || matrix.size(0) != side ||
      matrix.size(1) != side) {
    fail(op, ": matrix must be ", expected, " (", side, ", ", side, "), got ", dtype_text(matrix),
         " ", shape_text(matrix));
  }
}

}  // namespace medmoco
