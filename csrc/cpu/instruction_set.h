// CPU kernels are compiled once for each instruction set below and chosen when they are called,
// so that one binary is fast on every machine.

#pragma once

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace medmoco {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx2: return "avx2";
    default: return "baseline";
  }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MEDMOCO_X86_KERNELS 1

inline InstructionSet detect_instruction_set() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return InstructionSet::kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
}

inline std::vector<std::string> cpu_features() {
  __builtin_cpu_init();
  std::vector<std::string> features;
  if (__builtin_cpu_supports("avx2")) features.push_back("avx2");
  if (__builtin_cpu_supports("fma")) features.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) features.push_back("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) features.push_back("avx512vl");
  return features;
}

#else
#define MEDMOCO_X86_KERNELS 0

inline InstructionSet detect_instruction_set() { return InstructionSet::kBaseline; }

inline std::vector<std::string> cpu_features() { return {}; }

#endif

// What this machine has, or less where MEDMOCO_CPU_KERNELS=baseline|avx2 asks for it (for tests,
// and to compare machines).
inline InstructionSet chosen_instruction_set() {
  static const InstructionSet chosen = [] {
    const InstructionSet best = detect_instruction_set();
    const char* limit = std::getenv("MEDMOCO_CPU_KERNELS");
    for (InstructionSet set : {InstructionSet::kBaseline, InstructionSet::kAvx2}) {
      if (limit && std::strcmp(limit, name(set)) == 0 && set < best) return set;
    }
    return best;
  }();
  return chosen;
}

}  // namespace medmoco
