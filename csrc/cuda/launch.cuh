// The one way to launch a kernel.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace medmoco {

using Stream = cudaStream_t;

inline void check_cuda(const char* name, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
}

// Launches kernel(arguments...) on `stream`, which belongs to the current device.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            int shared_bytes, Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // an empty batch
  if (shared_bytes > 48 * 1024) {                         // what a kernel gets without asking
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_cuda(name, cudaFuncSetAttribute(kernel, limit, shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(name, cudaGetLastError());
}

}  // namespace medmoco
