// Runs the threads of a block as fibers, in a random order, until all have returned, one has gone
// wrong or none can go on.
//
// A thread runs until it has to wait for others. Whoever arrives last at a meeting point does the
// work of a warp's collective for all lanes. Kernels must not spin on memory: nobody else would
// run.

#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "access.h"
#include "copy_queue.h"
#include "cuda_words.h"
#include "fiber.h"
#include "random.h"
#include "shared_memory.h"
#include "waiting.h"

namespace medmoco::emulator {

class Block;
inline constinit thread_local Block* running_block = nullptr;

class Block {
 public:
  static constexpr int kLanes = 32;

  Block(dim3 shape, SharedMemory& memory, Random& random, const std::function<void()>& kernel)
      : threads_(size_t(shape.x) * shape.y * shape.z),
        warps_(threads_.size() / kLanes),
        memory_(memory),
        random_(random),
        kernel_(kernel) {
    for (size_t i = 0; i < threads_.size(); ++i) {
      const auto number = static_cast<unsigned>(i);
      threads_[i].index = {number % shape.x, number / shape.x % shape.y,
                           number / shape.x / shape.y};
      threads_[i].doing.thread = static_cast<uint16_t>(i);
    }
  }

  // Runs block `blockIdx`. Throws what went wrong first.
  void run() {
    memory_.clear();
    std::vector<Stack>& stacks = all_stacks();
    while (stacks.size() < threads_.size()) stacks.emplace_back(stacks.size());
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.doing.operation = Operation::kRunning;
      thread.copies.clear();
      stacks[i].prepare(thread.context, thread_main);
      runnable_.push_back(&thread);
    }
    running_block = this;
    switch_context(host_, next());
    running_block = nullptr;
    if (error_.empty() && returned_ < threads_.size()) error_ = describe_deadlock();
    if (error_.empty()) {
      returned_ = 0;
      return;
    }
    for (size_t i = 0; i < threads_.size(); ++i) stacks[i].forget_frames();
    throw std::runtime_error(error_);
  }

  // Inside a kernel: the block and thread that run.
  static Block& current() {
    if (!running_block) throw std::logic_error("a primitive was called outside of a kernel");
    return *running_block;
  }
  Access access(Operation operation, const std::source_location& where) const {
    return {where, 0, running_->doing.thread, operation};
  }
  SharedMemory& memory() { return memory_; }
  CopyQueue& copies() { return running_->copies; }
  Random& random() { return random_; }

  // All lanes of the warp meet here, with their operands; the last one to come does the work.
  // The lanes must be at the same line: these instructions want the whole warp.
  template <typename Operands, typename Work>
  void meet_warp(Access access, Operands& operands, const Work& work) {
    Thread& self = *running_;
    Warp& warp = warps_[access.thread / kLanes];
    self.doing = access;
    if (warp.arrived == 0) warp.doing = access;
    if (!same_place(warp.doing, access)) {
      suspend();  // for good: once nobody can go on, the lanes that disagree are reported
    }
    warp.operands[access.thread % kLanes] = &operands;
    if (++warp.arrived < kLanes) {
      suspend();
    } else {
      Operands* lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Operands*>(warp.operands[i]);
      work(lanes);
      warp.arrived = 0;
      const size_t first = access.thread / kLanes * kLanes;
      for (size_t i = first; i < first + kLanes; ++i) runnable_.push_back(&threads_[i]);
      suspend();
    }
    self.doing.operation = Operation::kRunning;
  }

  // All threads of the block meet here.
  void meet_block(const Access& access) {
    Thread& self = *running_;
    self.doing = access;
    if (++at_barrier_ == threads_.size()) {
      at_barrier_ = 0;
      memory_.pass_barrier();
      for (Thread& thread : threads_) runnable_.push_back(&thread);
    }
    suspend();
    self.doing.operation = Operation::kRunning;
  }

  // For a crash: who runs.
  int running_thread() const { return running_->doing.thread; }

 private:
  struct Thread {
    Context context;
    uint3 index;
    Access doing;
    CopyQueue copies;
  };
  struct Warp {
    void* operands[kLanes];
    int arrived = 0;
    Access doing;
  };

  // Kept from block to block and from launch to launch.
  static std::vector<Stack>& all_stacks() {
    static thread_local std::vector<Stack> stacks;
    return stacks;
  }

  static bool same_place(const Access& a, const Access& b) {
    return a.operation == b.operation && a.where.line() == b.where.line() &&
           a.where.column() == b.where.column() && a.where.file_name() == b.where.file_name();
  }

  static void thread_main() {
    arrive(nullptr);
    Block& block = *running_block;
    Thread& self = *block.running_;
    try {
      block.kernel_();
    } catch (const std::exception& error) {
      block.error_ = error.what();
    }
    self.doing.operation = Operation::kReturned;
    ++block.returned_;
    switch_context(self.context, block.next(), true);
  }

  // Returns when this thread is drawn again.
  void suspend() {
    Thread& self = *running_;
    self.copies.pass_time(memory_, random_);
    Context& to = next();
    if (&to != &self.context) switch_context(self.context, to);
  }

  // Draws who goes on; the host where nobody can or something has gone wrong.
  Context& next() {
    if (runnable_.empty() || !error_.empty()) return host_;
    Thread*& drawn = runnable_[random_.below(static_cast<uint32_t>(runnable_.size()))];
    running_ = drawn;
    drawn = runnable_.back();
    runnable_.pop_back();
    threadIdx = running_->index;
    return running_->context;
  }

  std::string describe_deadlock() const {
    std::vector<Access> doing;
    for (const Thread& thread : threads_) doing.push_back(thread.doing);
    return describe_waiting(doing);
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  SharedMemory& memory_;
  Random& random_;
  const std::function<void()>& kernel_;

  Context host_;
  std::vector<Thread*> runnable_;
  Thread* running_ = nullptr;
  size_t at_barrier_ = 0, returned_ = 0;
  std::string error_;
};

}  // namespace medmoco::emulator
