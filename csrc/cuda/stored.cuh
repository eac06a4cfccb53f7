// Matrices in global memory whose number format is known at run time, and read in float32.

#pragma once

#include "operands.cuh"

namespace medmoco {

enum class Storage : int { kFloat32, kBFloat16, kFloat16 };

__host__ __device__ __forceinline__ int bytes_of(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : 2;
}

// Any strides, counted in elements.
struct Matrix {
  const void* data;
  Storage storage;
  int64_t row_stride, column_stride;
};

// The value whose bits are the low ones of `bits`.
__device__ __forceinline__ float value_of(uint32_t bits, Storage storage) {
  if (storage == Storage::kFloat32) return float_of(bits);
  if (storage == Storage::kBFloat16) return float_of(bits << 16);
  const auto low = static_cast<uint16_t>(bits);
  Half half;
  memcpy(&half, &low, sizeof half);
  return to_float(half);
}

// The bits of element `i`.
__device__ __forceinline__ uint32_t load_bits(const void* data, Storage storage, int64_t i) {
  if (storage == Storage::kFloat32) return static_cast<const uint32_t*>(data)[i];
  return static_cast<const uint16_t*>(data)[i];
}

__device__ __forceinline__ float load(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t i = row * matrix.row_stride + column * matrix.column_stride;
  return value_of(load_bits(matrix.data, matrix.storage, i), matrix.storage);
}

// Element `i` = value, rounded to nearest even.
__device__ __forceinline__ void store(void* data, Storage storage, int64_t i, float value) {
  switch (storage) {
    case Storage::kFloat32: static_cast<float*>(data)[i] = value; return;
    case Storage::kBFloat16: static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(value); return;
    case Storage::kFloat16: static_cast<Half*>(data)[i] = from_float<Half>(value);
  }
}

}  // namespace medmoco
