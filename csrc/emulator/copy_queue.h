// The cp.async copies of one thread that are under way.

#pragma once

#include <cstddef>
#include <vector>

#include "random.h"
#include "shared_memory.h"

namespace medmoco::emulator {

class CopyQueue {
 public:
  // Half of the copies arrive no sooner than they are waited for.
  void issue(const void* source, size_t first, int bytes, Random& random) {
    copies_.push_back({source, first, bytes, groups_, random.below(2) == 0, false});
  }

  void commit() { ++groups_; }

  // All groups but the `pending` latest have arrived, and belong to the thread. What it never waits
  // for may arrive never.
  void wait(int pending, SharedMemory& memory) {
    size_t done = 0;
    while (done < copies_.size() && copies_[done].group + pending < groups_) {
      Copy& copy = copies_[done++];
      deliver(copy, memory);
      memory.end_copy(copy.first, copy.bytes);
    }
    copies_.erase(copies_.begin(), copies_.begin() + done);
  }

  // Time passes: some copy may arrive, of any group. Only now is its source read.
  void pass_time(SharedMemory& memory, Random& random) {
    if (copies_.empty() || random.below(4) != 0) return;
    Copy& copy = copies_[random.below(copies_.size())];
    if (!copy.late) deliver(copy, memory);
  }

  void clear() {
    copies_.clear();
    groups_ = 0;
  }

 private:
  struct Copy {
    const void* source;  // null for zeros
    size_t first;        // the offset in shared memory
    int bytes, group;
    bool late, arrived;
  };

  static void deliver(Copy& copy, SharedMemory& memory) {
    if (!copy.arrived) memory.deliver(copy.first, copy.source, copy.bytes);
    copy.arrived = true;
  }

  std::vector<Copy> copies_;  // in the order of issue
  int groups_ = 0;            // committed so far
};

}  // namespace medmoco::emulator
