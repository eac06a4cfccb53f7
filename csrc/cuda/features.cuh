// Features (samples, features) of any dtype that the kernels take, from PyTorch's tensors.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../checks.h"
#include "device.cuh"
#include "stored.cuh"

namespace medmoco {

inline Matrix matrix_of(const Tensor& tensor) {
  Storage storage = Storage::kFloat32;
  if (tensor.scalar_type() == ScalarType::BFloat16) storage = Storage::kBFloat16;
  if (tensor.scalar_type() == ScalarType::Half) storage = Storage::kFloat16;
  return {tensor.const_data_ptr(), storage, tensor.stride(0), tensor.stride(1)};
}

inline void refuse_float64(const char* op, const Tensor& features) {
  if (features.scalar_type() == ScalarType::Double) {
    fail(op, ": features must be float32, bfloat16 or float16 on CUDA, got ", dtype_text(features));
  }
}

inline void check_beside_features(const char* op, const char* name, const Tensor& tensor,
                                  const Tensor& features) {
  if (device_text(tensor) != device_text(features)) {
    fail(op, ": ", name, " must be on ", device_text(features), " to match features, got ",
         device_text(tensor));
  }
}

// Calls run(multiprocessors, allocate, stream) for the device of `features`.
template <typename Run>
void run_on_device_of(const Tensor& features, Run run) {
  const int32_t device = features.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  // Freed when this returns, though the kernels may still have to run: what is given this memory
  // next on the same stream runs after them.
  Tensor workspace;
  auto allocate = [&](int64_t bytes) {
    workspace = torch::stable::new_empty(features, {bytes}, ScalarType::Byte);
    return workspace.mutable_data_ptr();
  };
  run(multiprocessors(device), allocate, current_stream(device));
}

}  // namespace medmoco
