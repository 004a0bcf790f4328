// What the binding of anderson_step and its kernel share. No torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/step_chunks.h"
#include "ops/anderson_step.h"

namespace deqcore::cpu {

struct AndersonDecision {
  AndersonPlan plan;
  double alpha[kAndersonMaxMemory];  // mixing weights by age, for AndersonMove::mix
};

// The three parts of a step. Items are chunks of rows, row * step_chunks(dim) + chunk; parts,
// memory + 1 numbers an item, begins with the first item's, and decisions with its row's.
DEQCORE_DECLARE_KERNEL(void anderson_push(const AndersonArgs& args, int64_t first, int64_t last,
                                          double* parts))
DEQCORE_DECLARE_KERNEL(void anderson_decide(const AndersonArgs& args, int64_t row,
                                            const double* parts, AndersonDecision* decision))
DEQCORE_DECLARE_KERNEL(void anderson_move(const AndersonArgs& args, int64_t first, int64_t last,
                                          const AndersonDecision* decisions))

// A whole step, spread over threads; ends with the count of active rows.
void run_anderson_step(const AndersonArgs& args);

}  // namespace deqcore::cpu
