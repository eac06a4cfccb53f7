// Includes the file MEDMOCO_KERNELS once for each instruction set, in namespaces medmoco::baseline,
// medmoco::avx2 and medmoco::avx512, with kVectorBytes and kVectorRegisters set. All of it is local
// to the source file, so that two operators may use one name.
//
// That file may include .inl files of this folder and nothing else: a standard header compiled here
// would give its inline functions instructions that other machines lack, and the linker keeps one
// copy for all.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "instruction_set.h"

#if MEDMOCO_X86_KERNELS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace medmoco::avx2 {
namespace {
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#include MEDMOCO_KERNELS
}  // namespace
}  // namespace medmoco::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace medmoco::avx512 {
namespace {
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#include MEDMOCO_KERNELS
}  // namespace
}  // namespace medmoco::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // MEDMOCO_X86_KERNELS

namespace medmoco::baseline {
namespace {
#if defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif
#include MEDMOCO_KERNELS
}  // namespace
}  // namespace medmoco::baseline
