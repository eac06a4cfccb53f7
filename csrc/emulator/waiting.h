// Says why a block cannot go on: who waits where.

#pragma once

#include <string>
#include <vector>

#include "access.h"

namespace medmoco::emulator {

inline std::string describe_state(const Access& doing) {
  if (doing.operation == Operation::kReturned) return "returned";
  return std::string("at ") + name_of(doing.operation) + " (" + place_of(doing.where) + ")";
}

// The states of threads `first` to `last` - 1, one line for each run of equal ones.
inline std::string describe_states(const std::vector<Access>& doing, size_t first, size_t last,
                                   const char* noun) {
  std::string text;
  for (size_t begin = first, end; begin < last; begin = end) {
    const std::string state = describe_state(doing[begin]);
    for (end = begin + 1; end < last && describe_state(doing[end]) == state;) ++end;
    text += std::string("\n  ") + noun + " " + std::to_string(begin - first);
    if (end - begin > 1) text += " to " + std::to_string(end - first - 1);
    text += ": " + state;
  }
  return text;
}

// `doing`: what each thread of a block waits for, when none can go on.
inline std::string describe_waiting(const std::vector<Access>& doing) {
  for (size_t first = 0; first < doing.size(); first += 32) {
    bool diverged = false, in_collective = false;
    for (size_t i = first; i < first + 32; ++i) {
      diverged |= describe_state(doing[i]) != describe_state(doing[first]);
      in_collective |=
          doing[i].operation != Operation::kReturned && doing[i].operation != Operation::kBarrier;
    }
    if (diverged && in_collective) {
      return "the lanes of warp " + std::to_string(first / 32) +
             " have diverged at a collective, which all must call together:" +
             describe_states(doing, first, first + 32, "lane");
    }
  }
  return "some threads never reach block_barrier:" +
         describe_states(doing, 0, doing.size(), "thread");
}

}  // namespace medmoco::emulator
