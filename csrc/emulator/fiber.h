// Stacks to run on, and the switch from one to another.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Other processors have the C library's swapcontext, which makes a system call each time.
#if !defined(__x86_64__) && !defined(MEDMOCO_EMULATOR_UCONTEXT)
#define MEDMOCO_EMULATOR_UCONTEXT
#endif

#if defined(MEDMOCO_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
// Saves the registers that a call keeps and the stack pointer, and takes up those of `to`.
extern "C" void medmoco_switch_stack(void** from, void* to);
asm(R"(
  .pushsection .text.medmoco_switch_stack, "axG", @progbits, medmoco_switch_stack, comdat
  .weak medmoco_switch_stack
  .type medmoco_switch_stack, @function
medmoco_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size medmoco_switch_stack, . - medmoco_switch_stack
  .popsection
)");
#endif

namespace medmoco::emulator {

// A place to switch to: where it stopped and, for AddressSanitizer, the bounds of its stack.
struct Context {
#if defined(MEDMOCO_EMULATOR_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

inline constinit thread_local Context* switched_from = nullptr;

// The first thing to do on a stack that one has switched to.
inline void arrive([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &switched_from->stack_bottom,
                                  &switched_from->stack_bytes);
#endif
}

// Goes on at `to`; returns when somebody switches back to `from`, which `for_good` nobody does.
inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
  switched_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack_bottom,
                                 to.stack_bytes);
#endif
#if defined(MEDMOCO_EMULATOR_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  medmoco_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrive(from.fake_stack);
}

// A stack with a page below it that faults.
class Stack {
 public:
  explicit Stack(size_t number)
      // Tops at the same place of a page would compete for the same lines of the cache.
      : unused_top_(number % 32 * 192) {
    mapped_ = static_cast<char*>(mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped_, kGuard, PROT_NONE);
  }
  Stack(Stack&& other) noexcept : mapped_(other.mapped_), unused_top_(other.unused_top_) {
    other.mapped_ = nullptr;
  }
  ~Stack() {
    if (!mapped_) return;
    forget_frames();
    munmap(mapped_, kGuard + kBytes);
  }

  // The next switch to `context` calls `entry`, which must never return, on this stack.
  void prepare(Context& context, void (*entry)()) {
    char* bottom = mapped_ + kGuard;
    const size_t bytes = kBytes - unused_top_;
    context.stack_bottom = bottom;
    context.stack_bytes = bytes;
    context.fake_stack = nullptr;
#if defined(MEDMOCO_EMULATOR_UCONTEXT)
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = bottom;
    context.registers.uc_stack.ss_size = bytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
#else
    void** top = reinterpret_cast<void**>(bottom + bytes);
    *--top = nullptr;  // where `entry` would return to; ends a backtrace
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
    context.stack_pointer = top;
#endif
  }

  // Functions that were never left must not keep their variables guarded.
  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(mapped_ + kGuard, kBytes);
#endif
  }

 private:
  static constexpr size_t kGuard = 4096, kBytes = 260 * 1024;
  char* mapped_;
  size_t unused_top_;
};

}  // namespace medmoco::emulator
