// What kernels are written in: one thin function for each instruction of the GPU that C++ has no
// word for. csrc/emulator has functions of the same names for the CPU, so g++ compiles the kernels
// too, and tests run them on machines without a GPU.
//
// Kernels keep to three rules. They touch shared memory through shared_load, shared_store, ldmatrix
// and cp_async alone, so that the emulator sees every access. They launch through launch().
// Whatever is named after a warp is called by all 32 lanes of it together.

#pragma once

#if defined(__CUDACC__)
#include "launch.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "warp.cuh"
#else
#include "../emulator/primitives.h"
#endif
