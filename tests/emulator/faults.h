// Runs kernels that are wrong, and expects to be told so.

#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <source_location>
#include <string>

#include "cuda/primitives.cuh"
#include "expect.h"

namespace medmoco::test {

constexpr int kSharedBytes = 4096;

// The kernel, on a block of 64 threads, must fail with a message that holds all of `parts`, in
// whatever order the threads run.
template <typename... Parameters, typename... Arguments>
void expect_fault(void (*kernel)(Parameters...), std::initializer_list<std::string> parts,
                  std::source_location where, Arguments... arguments) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    EmulatedDevice device{.seed = seed};
    const auto run = [&] { launch("faulty", kernel, 1, 64, kSharedBytes, &device, arguments...); };
    expect_error(run, parts, where);
  }
}

inline void expect_fault(void (*kernel)(), std::initializer_list<std::string> parts,
                         std::source_location where = std::source_location::current()) {
  expect_fault<>(kernel, parts, where);
}

// What `call` prints to stderr in a process of its own, which must die of it.
template <typename Call>
std::string output_of_crash(const Call& call) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    call();
    _exit(0);
  }
  close(ends[1]);
  std::string output;
  std::array<char, 4096> chunk;
  for (ssize_t count; (count = read(ends[0], chunk.data(), chunk.size())) > 0;) {
    output.append(chunk.data(), static_cast<size_t>(count));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? "no crash" : output;
}

}  // namespace medmoco::test
