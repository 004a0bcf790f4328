// Stacks that run in turns, and what the sanitizers must know of them: the machine below the
// emulation's scheduler, which knows nothing of CUDA.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

// Where something has stopped, to go on later.
struct Context {
  char* stack = nullptr;  // null: that of the process's own thread
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* thread = nullptr;      // ThreadSanitizer's
};

// Stacks for `count` contexts at once, or more: `start` takes them by number.
void make_stacks(int count);
void free_stacks();

// Lets a context begin with `main`, which never returns, when it is switched to. ThreadSanitizer
// takes it for a thread of its own, without any order to others.
void start_context(Context& context, int stack, void (*main)());
void end_context(Context& context);

// What calls `switch_contexts` first is a context, too.
void start_host(Context& context);

// Goes on with `to`. `for_good`: `from` is never resumed.
void switch_contexts(Context& from, Context& to, bool for_good);
// To be called first by what a context begins with.
void finish_switch(Context& context);

// ThreadSanitizer takes a new thread for the dead one whose number it gets, and would see no race
// between them, so threads live as long as their launch, up to the number that it can keep. The
// next launch, which comes after all that they did, takes them again: to make one costs a
// millisecond.
void make_room_for_threads(int count);
void take_threads_again();

// Happens-before, as the kernel's own barriers make it: switching makes none. An object is an
// address.
void arrive_at(void* object);
void leave_from(void* object);

}  // namespace emulation
