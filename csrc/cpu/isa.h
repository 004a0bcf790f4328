// Run-time choice of the instruction set, and the macros with which a kernel is compiled for
// several of them.
//
// Every csrc/cpu/*_kernel.cpp is compiled once per instruction set, with DEQCORE_ISA defined as
// its name, and puts its functions into namespace deqcore::cpu::DEQCORE_ISA. The binding declares
// them with DEQCORE_DECLARE_KERNEL and calls them through DEQCORE_DISPATCH_ISA.
//
// A function in a header that a kernel includes must be a template of, or live in, that namespace
// too, or be static: otherwise the linker keeps one copy for all instruction sets (the portable
// one: right, but slow where it is not inlined).
#pragma once

namespace deqcore::cpu {

enum class Isa { portable, avx2, avx512 };

// The widest set that this processor has, or the one named by DEQCORE_CPU_ISA. Chosen once.
// Throws std::runtime_error if that name is unknown or the processor lacks it.
Isa chosen_isa();

const char* isa_name(Isa isa);

}  // namespace deqcore::cpu

#if defined(__x86_64__)

// Declares one function for each instruction set; use inside namespace deqcore::cpu.
#define DEQCORE_DECLARE_KERNEL(...) \
  namespace portable {              \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx2 {                  \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx512 {                \
  __VA_ARGS__;                      \
  }

// Calls the function compiled for the chosen instruction set: DEQCORE_DISPATCH_ISA(axpy, n, x, y).
#define DEQCORE_DISPATCH_ISA(function, ...)                    \
  (::deqcore::cpu::chosen_isa() == ::deqcore::cpu::Isa::avx512 \
       ? ::deqcore::cpu::avx512::function(__VA_ARGS__)         \
   : ::deqcore::cpu::chosen_isa() == ::deqcore::cpu::Isa::avx2 \
       ? ::deqcore::cpu::avx2::function(__VA_ARGS__)           \
       : ::deqcore::cpu::portable::function(__VA_ARGS__))

#else

#define DEQCORE_DECLARE_KERNEL(...) \
  namespace portable {              \
  __VA_ARGS__;                      \
  }

#define DEQCORE_DISPATCH_ISA(function, ...) ::deqcore::cpu::portable::function(__VA_ARGS__)

#endif
