// What every launch needs: the device guard, the caller's stream, a check, and the switch for
// kernels that no GPU has run yet.

#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace medmoco {

// Kernels that have never run on a GPU are registered only with MEDMOCO_UNVERIFIED=1.
inline bool unverified_kernels_enabled() {
  const char* value = std::getenv("MEDMOCO_UNVERIFIED");
  return value && std::strcmp(value, "1") == 0;
}

// The stream that PyTorch works on. The stable ABI exports it from libtorch_cuda alone; linking
// that would keep the extension from loading into a torch without CUDA, so it is looked up in the
// library that is already loaded.
inline cudaStream_t current_stream(int32_t device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (!get_stream || get_stream(device_index, &stream) != 0) {
    throw std::runtime_error("medmoco: PyTorch's current CUDA stream cannot be found");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

// Launches kernel(arguments...) on the current stream of the device that `guard` has made current.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // an empty batch
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_launch(name);
}

}  // namespace medmoco
