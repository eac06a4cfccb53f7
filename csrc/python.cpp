// The module medmoco._C. Importing it registers the operators; besides, it tells how it was built.
// CMake leaves this file out: C++ programs load the operators without Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/version.h>

#include <string>
#include <vector>

#include "cpu/instruction_set.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string torch_target() {
  return std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = MEDMOCO_VERSION;
  info["torch_target"] = torch_target();
#ifdef MEDMOCO_CUDA_VERSION
  info["cuda_version"] = MEDMOCO_CUDA_VERSION;
  info["cuda_architectures"] = MEDMOCO_CUDA_ARCHITECTURES;
#else
  info["cuda_version"] = pybind11::none();
  info["cuda_architectures"] = pybind11::none();
#endif
  info["compiler"] = compiler();
  info["cpu_features"] = medmoco::cpu_features();
  info["cpu_kernels"] = medmoco::name(medmoco::chosen_instruction_set());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators torch.ops.medmoco.*";
  m.def("build_info", &build_info,
        "How the extension was built, and what it finds on this machine: version, torch_target "
        "(the oldest torch it runs with), cuda_version and cuda_architectures (None for a CPU "
        "build), compiler, cpu_features, cpu_kernels (the instruction set in use).");
}
