# The headers and CPU libraries of torch, as the target TorchCPU::TorchCPU.
#
# find_package(Torch) of a CUDA build of torch stops where no CUDA toolkit is installed, also for a
# program that only runs on the CPU. This module looks in the same places, CMAKE_PREFIX_PATH and
# Torch_DIR, and asks for nothing but torch. Both may be used in one program.

find_file(
  TorchCPU_VERSION_FILE TorchConfigVersion.cmake
  HINTS ${Torch_DIR}
  PATH_SUFFIXES Torch share/cmake/Torch)
if(TorchCPU_VERSION_FILE)
  file(STRINGS ${TorchCPU_VERSION_FILE} version_line REGEX "^set\\(PACKAGE_VERSION ")
  string(REGEX MATCH "[0-9]+\\.[0-9.]*[0-9]" TorchCPU_VERSION "${version_line}")
  cmake_path(SET torch_root NORMALIZE ${TorchCPU_VERSION_FILE}/../../../..)
endif()
find_library(TorchCPU_LIBRARY torch_cpu PATHS ${torch_root}/lib NO_DEFAULT_PATH)
find_library(TorchCPU_C10_LIBRARY c10 PATHS ${torch_root}/lib NO_DEFAULT_PATH)
mark_as_advanced(TorchCPU_VERSION_FILE TorchCPU_LIBRARY TorchCPU_C10_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchCPU
  REQUIRED_VARS TorchCPU_LIBRARY TorchCPU_C10_LIBRARY TorchCPU_VERSION_FILE
  VERSION_VAR TorchCPU_VERSION
  REASON_FAILURE_MESSAGE
    "CMAKE_PREFIX_PATH has to name the folder that Python's torch.utils.cmake_prefix_path holds."
)

if(TorchCPU_FOUND AND NOT TARGET TorchCPU::TorchCPU)
  add_library(TorchCPU::TorchCPU INTERFACE IMPORTED)
  target_include_directories(
    TorchCPU::TorchCPU INTERFACE ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
  target_link_libraries(TorchCPU::TorchCPU INTERFACE ${TorchCPU_LIBRARY} ${TorchCPU_C10_LIBRARY})
  target_compile_features(TorchCPU::TorchCPU INTERFACE cxx_std_20)
endif()
