// A stack of its own to run a function on, and the way there and back. Assembly on x86-64: a switch is some
// nanoseconds, and a kernel makes millions; ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define OCTOMOE_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define OCTOMOE_FIBER_ASAN 1
#endif
#endif
#if defined(OCTOMOE_FIBER_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace octomoe::emulator {

#if defined(__x86_64__)
// Saves the registers that a call keeps and the stack pointer in *from, and continues where `to` was saved.
extern "C" void octomoe_switch_stack(void** from, void* to);
#endif

// Memory is taken once and used again: what was written stays.
class Stack {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;
  Stack() : memory_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, 4096, PROT_NONE);  // a stack that runs over is a segmentation fault, not a wrong neighbour
  }
  ~Stack() { munmap(memory_, kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* bottom() const { return memory_; }

 private:
  void* memory_;
};

class Fiber {
 public:
  // run() must not return: its last act is leave(true).
  void start(const Stack& stack, void (*run)()) {
    stack_ = &stack;
#if defined(__x86_64__)
    auto* top = reinterpret_cast<std::uintptr_t*>(static_cast<char*>(stack.bottom()) + Stack::kBytes);
    *--top = 0;  // where run() would return to; aligns its frame
    *--top = reinterpret_cast<std::uintptr_t>(run);
    for (int i = 0; i < 6; ++i) *--top = 0;
    here_ = top;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack.bottom();
    here_.uc_stack.ss_size = Stack::kBytes;
    makecontext(&here_, run, 0);
#endif
  }
  void enter() {
#if defined(OCTOMOE_FIBER_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_->bottom(), Stack::kBytes);
#endif
#if defined(__x86_64__)
    octomoe_switch_stack(&outside_, here_);
#else
    swapcontext(&outside_, &here_);
#endif
#if defined(OCTOMOE_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  // First thing in run().
  void entered() {
#if defined(OCTOMOE_FIBER_ASAN)
    __sanitizer_finish_switch_fiber(fake_, &outer_bottom_, &outer_bytes_);
#endif
  }
  void leave([[maybe_unused]] bool for_good = false) {
#if defined(OCTOMOE_FIBER_ASAN)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, outer_bottom_, outer_bytes_);
#endif
#if defined(__x86_64__)
    octomoe_switch_stack(&here_, outside_);
#else
    swapcontext(&here_, &outside_);
#endif
    entered();
  }

 private:
  const Stack* stack_ = nullptr;
#if defined(__x86_64__)
  void *here_ = nullptr, *outside_ = nullptr;
#else
  ucontext_t here_, outside_;
#endif
#if defined(OCTOMOE_FIBER_ASAN)
  void* fake_ = nullptr;
  const void* outer_bottom_ = nullptr;
  std::size_t outer_bytes_ = 0;
#endif
};

}  // namespace octomoe::emulator
