// Kernel of masked_expand: kept values to their places in a dense matrix, by a bit for each entry.
#pragma once

#include "cpu/isa.h"
#include "ops/dtype.h"

namespace deqcore::cpu {

constexpr int64_t kExpandCells = 64;  // ranges of entries begin at a multiple of it

struct MaskedExpandArgs {
  const void* values;    // [kept]
  const uint8_t* words;  // a bit for each entry, the lowest of a byte first
  void* dense;           // [cells]
  int64_t kept, cells;
};

// Entries begin to end of the matrix, of which `at` are kept before `begin`. False, with nothing
// done, where the instruction set has no expansion.
DEQCORE_DECLARE_KERNEL(bool masked_expand(const MaskedExpandArgs& args, Dtype type, int64_t at,
                                          int64_t begin, int64_t end))

}  // namespace deqcore::cpu
