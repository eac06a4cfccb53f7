// A small generator (xorshift64*), so that a seed gives the same run everywhere.

#pragma once

#include <cstdint>

namespace medmoco::emulator {

class Random {
 public:
  // Neighbouring seeds are spread by an odd constant; the state must not be 0.
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1u << 31) {
    for (int i = 0; i < 8; ++i) below(2);
  }

  uint32_t below(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    const uint64_t bits = state_ * 0x2545f4914f6cdd1du >> 32;
    return static_cast<uint32_t>(bits * bound >> 32);
  }

 private:
  uint64_t state_;
};

}  // namespace medmoco::emulator
