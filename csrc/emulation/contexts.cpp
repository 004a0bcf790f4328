#include "emulation/contexts.h"

#include <pthread.h>
#include <sys/mman.h>

#include <vector>

#if defined(EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATION_TSAN)
// This file is compiled without -fsanitize=thread: its own bookkeeping is no part of the kernel.
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMostThreads = 8000;  // that ThreadSanitizer can keep

char* stacks = nullptr;
int stack_count = 0;
std::vector<void*> old_threads, free_threads;  // ThreadSanitizer's

#if defined(__x86_64__)
// Saves the registers that a call preserves, and goes on where `to` stopped.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

}  // namespace

void make_stacks(int count) {
  if (stack_count >= count) return;
  free_stacks();
  stack_count = count;
  stacks = static_cast<char*>(mmap(nullptr, stack_count * kStackBytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

void free_stacks() {
  if (stacks != nullptr) munmap(stacks, stack_count * kStackBytes);
  stacks = nullptr;
  stack_count = 0;
}

void start_context(Context& context, int stack, void (*main)()) {
  context.stack = stacks + stack * kStackBytes;
#if defined(EMULATION_ASAN)
  // The context before left this stack for good, with frames that never returned.
  __asan_unpoison_memory_region(context.stack, kStackBytes);
#endif
  context.fake_stack = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(context.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(main);  // where switch_stack returns to
  context.stack_pointer = top - 6;       // below it, six registers of no meaning
#else
  getcontext(&context.registers);
  context.registers.uc_stack = {context.stack, 0, kStackBytes};
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, main, 0);
#endif
#if defined(EMULATION_TSAN)
  if (free_threads.empty()) {
    context.thread = __tsan_create_fiber(0);
  } else {
    context.thread = free_threads.back();
    free_threads.pop_back();
  }
#endif
}

void end_context([[maybe_unused]] Context& context) {
#if defined(EMULATION_TSAN)
  old_threads.push_back(context.thread);
#endif
}

void start_host([[maybe_unused]] Context& context) {
#if defined(EMULATION_TSAN)
  context.thread = __tsan_get_current_fiber();
#endif
}

void finish_switch([[maybe_unused]] Context& context) {
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(context.fake_stack, nullptr, nullptr);
#endif
}

void switch_contexts(Context& from, Context& to, [[maybe_unused]] bool for_good) {
#if defined(EMULATION_ASAN)
  static const void* host_bottom = nullptr;
  static size_t host_size = 0;
  if (from.stack == nullptr && host_bottom == nullptr) {
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &host_size);
    pthread_attr_destroy(&attributes);
    host_bottom = bottom;
  }
  const bool to_host = to.stack == nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack,
                                 to_host ? host_bottom : to.stack,
                                 to_host ? host_size : kStackBytes);
#endif
#if defined(EMULATION_TSAN)
  __tsan_switch_to_fiber(to.thread, /*no synchronisation=*/1);
#endif
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  finish_switch(from);
}

void make_room_for_threads([[maybe_unused]] int count) {
#if defined(EMULATION_TSAN)
  if (old_threads.size() + count <= kMostThreads) return;
  for (void* const thread : old_threads) __tsan_destroy_fiber(thread);
  old_threads.clear();
#endif
}

void take_threads_again() {
  free_threads.insert(free_threads.end(), old_threads.begin(), old_threads.end());
  old_threads.clear();
}

void arrive_at([[maybe_unused]] void* object) {
#if defined(EMULATION_TSAN)
  __tsan_release(object);
#endif
}

void leave_from([[maybe_unused]] void* object) {
#if defined(EMULATION_TSAN)
  __tsan_acquire(object);
#endif
}

}  // namespace emulation
