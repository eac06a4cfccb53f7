// The shared memory of a block, and who has touched it.
//
// Kernels hold addresses of a window that faults when it is read or written directly: only the
// primitives reach the bytes behind it, so every access is checked for alignment, bounds and races.
//
// Two accesses to the same bytes by different threads, one of them a write, race if no block
// barrier lies between, whatever order this run took. That holds within a warp too: warps do not
// run in lockstep, and kernels share through block barriers alone. A cp_async is a write that is
// under way until its thread waits for it; until then nobody may touch the bytes.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "access.h"

namespace medmoco::emulator {

class SharedMemory {
 public:
  SharedMemory(int bytes, bool detect_races)
      : bytes_(bytes), granules_(bytes / 2), detect_races_(detect_races) {
    mapped_ = mmap(nullptr, kMapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { munmap(mapped_, kMapped); }

  // For the next block: bytes that are NaN in every format, touched by nobody.
  void clear() {
    std::fill(bytes_.begin(), bytes_.end(), kPoison);
    first_epoch_ = ++epoch_;
  }

  // All threads of the block have come to a barrier.
  void pass_barrier() { ++epoch_; }

  // In the middle, so that accesses before it fault too, and aligned to 16 bytes but not to more.
  unsigned char* window() const { return static_cast<unsigned char*>(mapped_) + kMapped / 2 + 16; }

  void read(const void* from, void* to, int count, int alignment, const Access& access) {
    const size_t first = offset(from, count, alignment, access);
    note<&SharedMemory::note_read>(first, count, access);
    std::memcpy(to, bytes_.data() + first, count);
  }

  void write(void* to, const void* from, int count, int alignment, const Access& access) {
    const size_t first = offset(to, count, alignment, access);
    note<&SharedMemory::note_write>(first, count, access);
    std::memcpy(bytes_.data() + first, from, count);
  }

  // A copy to these bytes is under way. Returns their offset.
  size_t begin_copy(void* to, int count, const Access& access) {
    const size_t first = offset(to, count, count, access);
    note<&SharedMemory::note_copy>(first, count, access);
    std::memset(bytes_.data() + first, kPoison, count);
    return first;
  }

  // The bytes of a copy arrive; `from` null for zeros.
  void deliver(size_t first, const void* from, int count) {
    if (from) {
      std::memcpy(bytes_.data() + first, from, count);
    } else {
      std::memset(bytes_.data() + first, 0, count);
    }
  }

  // Its thread has waited for the copy.
  void end_copy(size_t first, int count) {
    for (size_t i = first / 2; i < (first + count) / 2; ++i) {
      granules_[i].under_way = false;
      granules_[i].write.epoch = epoch_;
    }
  }

 private:
  static constexpr unsigned char kPoison = 0xff;
  static constexpr size_t kMapped = 1 << 20;

  // Two bytes: the smallest element that kernels share.
  struct Granule {
    Access write, read;  // the latest write, and the first read since the last barrier
    bool several_readers = false, under_way = false;
  };

  size_t offset(const void* address, int count, int alignment, const Access& access) const {
    const auto place = reinterpret_cast<intptr_t>(address);
    const auto first = place - reinterpret_cast<intptr_t>(window());
    if (first < -static_cast<intptr_t>(kMapped / 2) || first > static_cast<intptr_t>(kMapped / 2)) {
      throw std::runtime_error(describe(access) + ": the address is not in shared memory");
    }
    if (place % alignment != 0) {
      throw std::runtime_error(describe(access) + ": misaligned: shared byte " +
                               std::to_string(first) + " is not a multiple of " +
                               std::to_string(alignment));
    }
    if (first < 0 || first + count > static_cast<intptr_t>(bytes_.size())) {
      throw std::runtime_error(describe(access) + ": out of bounds: " + range(first, count) +
                               " of " + std::to_string(bytes_.size()));
    }
    return first;
  }

  static std::string range(intptr_t first, int count) {
    return "shared bytes " + std::to_string(first) + " to " + std::to_string(first + count - 1);
  }

  template <auto kNoteGranule>
  void note(size_t first, int count, Access access) {
    access.epoch = epoch_;
    for (size_t i = first / 2; i < (first + count) / 2; ++i) {
      (this->*kNoteGranule)(granules_[i], access);
    }
  }

  void note_read(Granule& granule, const Access& access) {
    check_writer(granule, access);
    if (granule.read.epoch != epoch_) {
      granule.read = access;
      granule.several_readers = false;
    } else if (granule.read.thread != access.thread) {
      granule.several_readers = true;
    }
  }

  void note_write(Granule& granule, const Access& access) {
    check_writer(granule, access);
    if (granule.read.epoch == epoch_ &&
        (granule.read.thread != access.thread || granule.several_readers)) {
      const bool others = granule.read.thread == access.thread;
      race(granule, access,
           (others ? "read by other threads too, besides " : "read by ") + describe(granule.read) +
               kNoBarrier);
    }
    granule.write = access;
    granule.under_way = false;
  }

  void note_copy(Granule& granule, const Access& access) {
    note_write(granule, access);
    granule.under_way = true;
  }

  void check_writer(const Granule& granule, const Access& access) const {
    if (granule.under_way && granule.write.epoch >= first_epoch_) {
      race(granule, access,
           "being written by " + describe(granule.write) + ", not yet waited for by cp_async_wait");
    }
    if (granule.write.epoch == epoch_ && granule.write.thread != access.thread) {
      race(granule, access, "written by " + describe(granule.write) + kNoBarrier);
    }
  }

  void race(const Granule& granule, const Access& access, const std::string& earlier) const {
    if (!detect_races_) return;
    throw std::runtime_error(describe(access) + ": race on " +
                             range((&granule - granules_.data()) * 2, 2) + ", " + earlier);
  }

  static constexpr const char* kNoBarrier = ", with no block_barrier since";

  std::vector<unsigned char> bytes_;
  std::vector<Granule> granules_;
  bool detect_races_;
  void* mapped_;
  // Counts barriers, through all blocks of the launch: what has an older epoch has been settled.
  uint32_t epoch_ = 0, first_epoch_ = 0;
};

}  // namespace medmoco::emulator
