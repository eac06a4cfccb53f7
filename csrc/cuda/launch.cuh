// The one way to launch a kernel.

#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace medmoco {

using Stream = cudaStream_t;

inline void check_cuda(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: who asks next, such as PyTorch, would take it for its own
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// Lets a kernel have more shared memory than the 48 KiB that it gets without asking.
template <typename Kernel>
void allow_shared_memory(const char* name, Kernel kernel, int bytes) {
  int device = 0, most = 0;
  check_cuda(name, cudaGetDevice(&device));
  check_cuda(name, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (bytes > most) {
    throw std::runtime_error(std::string(name) + ": this size needs " + std::to_string(bytes) +
                             " bytes of shared memory a block, but the GPU has " +
                             std::to_string(most));
  }
  check_cuda(name,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Launches kernel(arguments...) on `stream`, which belongs to the current device.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            int shared_bytes, Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // an empty batch
  if (shared_bytes > 48 * 1024) allow_shared_memory(name, kernel, shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(name, cudaGetLastError());
}

}  // namespace medmoco
