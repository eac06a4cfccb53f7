// The memory that kernels use to hand things to each other.

#pragma once

#include <cstdint>

namespace medmoco {

// Pieces of one allocation, each aligned to 16 bytes: first counted, then, with memory, handed out.
class WorkspacePieces {
 public:
  explicit WorkspacePieces(void* memory = nullptr) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace medmoco
