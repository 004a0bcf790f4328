// What the binding of broyden_step and its kernel share. No torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/step_chunks.h"
#include "ops/broyden_step.h"

namespace deqcore::cpu {

struct BroydenDecision {
  BroydenPlan plan;
  double weights[kBroydenMaxMemory];  // of the stored steps in the new one
};

// The three parts of a step. Items are chunks of rows, row * step_chunks(dim) + chunk; parts, 2 *
// capacity + 2 numbers an item, begins with the first item's, and decisions with its row's.
DEQCORE_DECLARE_KERNEL(void broyden_push(const BroydenArgs& args, int64_t first, int64_t last,
                                         double* parts))
DEQCORE_DECLARE_KERNEL(void broyden_decide(const BroydenArgs& args, int64_t row,
                                           const double* parts, BroydenDecision* decision))
DEQCORE_DECLARE_KERNEL(void broyden_move(const BroydenArgs& args, int64_t first, int64_t last,
                                         const BroydenDecision* decisions))

// A whole step, spread over threads; ends with the count of active rows. Throws where a row has no
// slot left.
void run_broyden_step(const BroydenArgs& args);

}  // namespace deqcore::cpu
