// The GPU and the stream that PyTorch works on, and the switch for kernels that no GPU has run yet.

#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "launch.cuh"

namespace medmoco {

// Kernels that have never run on a GPU are registered only with MEDMOCO_UNVERIFIED=1.
inline bool unverified_kernels_enabled() {
  const char* value = std::getenv("MEDMOCO_UNVERIFIED");
  return value && std::strcmp(value, "1") == 0;
}

// The stream that PyTorch works on. The stable ABI exports it from libtorch_cuda alone; linking
// that would keep the extension from loading into a torch without CUDA, so it is looked up in the
// library that is already loaded.
inline Stream current_stream(int32_t device_index) {
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
  return static_cast<Stream>(stream);
}

inline int multiprocessors(int32_t device_index) {
  int count = 0;
  check_cuda("medmoco",
             cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index));
  return count;
}

}  // namespace medmoco
