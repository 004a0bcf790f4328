// Which sectors of global memory a kernel's warps touch, and how much of them they use: what a
// GPU's counters say, without one. Built only where EMULATION_SECTORS is defined.
//
// The kernels are compiled as for ThreadSanitizer, and without optimisation, so that the compiler
// announces each access as the source has it; sectors.cpp takes the place of ThreadSanitizer.
// Nothing is written into kernels. What one thread does for the i-th time at one place of the
// program (a chain of calls) between two meetings with its warp, the warp does in one request.
// A compiler for a GPU may still take apart what is one access here: tools/cuda_build.py says.
#pragma once

#include <cstdint>

namespace emulation {

// Accesses to these bytes count, from now until sectors_forget: a tensor or a workspace. Ranges are
// numbered from 0 on.
void sectors_watch(const void* from, int64_t bytes);
void sectors_forget();

// The emulation tells: a copy to shared memory has been asked for, the block's threads have begun,
// all have ended, and how often the running thread has met others.
void sectors_copy(const void* from, int bytes);
void sectors_begin_block(int threads);
void sectors_end_block();
unsigned meetings();

}  // namespace emulation
