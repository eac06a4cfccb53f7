// How CPU kernels read their operands: any dtype, any strides.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../checks.h"

namespace medmoco {

// A matrix of any strides, read as T.
template <typename T, typename Scalar>
struct Matrix {
  const Scalar* data;
  int64_t row_stride, column_stride;

  explicit Matrix(const Tensor& tensor)
      : data(static_cast<const Scalar*>(tensor.const_data_ptr())),
        row_stride(tensor.stride(0)),
        column_stride(tensor.stride(1)) {}

  T at(int64_t row, int64_t column) const {
    return static_cast<T>(data[row * row_stride + column * column_stride]);
  }
};

// Calls function<T, Scalar>(): Scalar is what a tensor of `dtype` holds, T what is computed with,
// float, or double for double.
template <typename Function>
void with_dtype(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double: function.template operator()<double, double>(); break;
    case ScalarType::BFloat16: function.template operator()<float, c10::BFloat16>(); break;
    case ScalarType::Half: function.template operator()<float, c10::Half>(); break;
    default: function.template operator()<float, float>();
  }
}

}  // namespace medmoco
