// Work shared out among threads, one task at a time, so that a slow thread holds up no other.
// Which thread takes a task must not change its result.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace medmoco {

class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  // The next task's number in `task`, or false when none is left.
  bool take(int64_t& task) {
    task = taken_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  std::atomic<int64_t> taken_{0};
  const int64_t count_;
};

// Calls work(tasks) on as many threads as there are, or as tasks if fewer; each takes until none is
// left.
template <typename Work>
void share_out(int64_t count, const Work& work) {
  Tasks tasks(count);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(tasks); });
}

}  // namespace medmoco
