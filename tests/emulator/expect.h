// What the tests of the emulator expect. A test goes on after a failure; main returns report().

#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <source_location>
#include <string>

namespace medmoco::test {

inline int failures = 0;

inline void fail(const std::string& what, const std::source_location& where) {
  std::printf("%s:%u: %s\n", where.file_name(), where.line(), what.c_str());
  ++failures;
}

inline void expect(bool condition, const std::string& what,
                   std::source_location where = std::source_location::current()) {
  if (!condition) fail("expected " + what, where);
}

// Equal values; two NaN are equal too.
inline void expect_equal(double actual, double expected, const std::string& what,
                         std::source_location where = std::source_location::current()) {
  if (actual == expected || (std::isnan(actual) && std::isnan(expected))) return;
  fail(what + ": expected " + std::to_string(expected) + ", got " + std::to_string(actual), where);
}

// `call` must throw an error whose message holds all of `parts`.
template <typename Call>
void expect_error(const Call& call, std::initializer_list<std::string> parts,
                  std::source_location where = std::source_location::current()) {
  std::string message = "no error";
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
  }
  for (const std::string& part : parts) {
    if (message.find(part) != std::string::npos) continue;
    fail("expected an error that says: " + part + "\ngot: " + message, where);
  }
}

inline int report() {
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}

}  // namespace medmoco::test
