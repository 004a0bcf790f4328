// Binding of broyden_step for CPU tensors.
#include "cpu/broyden_step.h"

#include <torch/csrc/stable/library.h>

#include "cpu/step_binding.h"

namespace deqcore::cpu {
namespace {

void broyden_step(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& s_ring,
                  const Tensor& gram, const Tensor& best, const Tensor& status,
                  const Tensor& counters, const Tensor& residuals, const Tensor& remaining,
                  const Tensor& x_next, const Tensor& z_next, double rtol, double atol,
                  int64_t patience, int64_t max_steps, int64_t memory) {
  const StateType type = check_states(x, f);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), dim = x.size(1);
  STD_TORCH_CHECK(1 <= memory && memory <= kBroydenMaxMemory, "memory: expected 1 to 64, got ",
                  memory);
  STD_TORCH_CHECK(s_ring.dim() == 3, "s_ring: expected (batch, capacity, dim), got ",
                  shape_text(s_ring));
  const int64_t capacity = s_ring.size(1);
  STD_TORCH_CHECK(1 <= capacity && capacity <= memory, "s_ring: expected a capacity of 1 to ",
                  memory, " steps, got ", capacity);
  check(s_ring, "s_ring", dtype, {batch, capacity, dim});
  check(gram, "gram", ScalarType::Double, {batch, memory, memory});
  check(best, "best", dtype, {batch, dim});
  check(x_next, "x_next", dtype, {batch, dim});
  check(damping, "damping", ScalarType::Double, {damping.size(0)});
  STD_TORCH_CHECK(damping.size(0) > 0, "damping: expected at least one entry");

  const BroydenArgs args{
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = static_cast<const double*>(damping.const_data_ptr()),
      .s_ring = s_ring.mutable_data_ptr(),
      .gram = static_cast<double*>(gram.mutable_data_ptr()),
      .best = best.mutable_data_ptr(),
      .x_next = x_next.mutable_data_ptr(),
      .z_next = check_z_next(z_next, f, type),
      .rows = check_rows(status, counters, residuals, remaining, batch),
      .batch = batch,
      .dim = dim,
      .capacity = capacity,
      .memory = memory,
      .damping_length = damping.size(0),
      .limits = {rtol, atol, patience, max_steps},
  };
  int64_t stored = 0;
  for (int64_t row = 0; row < batch; ++row) {
    if (args.rows.status[row] != kActive) continue;
    const int64_t history = broyden_history(args, row);
    stored = history > stored ? history : stored;
  }
  STD_TORCH_CHECK(stored < capacity, "s_ring: a row has stored ", stored,
                  " steps and needs room for one more, got a capacity of ", capacity);
  run_step<BroydenDecision>(
      batch, dim, 2 * capacity + 2, 2 * stored + 8,
      [&](int64_t first, int64_t last, double* parts) {
        DEQCORE_DISPATCH_ISA(broyden_push, args, type, first, last, parts);
      },
      [&](int64_t row, const double* parts, BroydenDecision* decision) {
        DEQCORE_DISPATCH_ISA(broyden_decide, args, row, parts, decision);
      },
      [&](int64_t first, int64_t last, const BroydenDecision* decisions) {
        DEQCORE_DISPATCH_ISA(broyden_move, args, type, first, last, decisions);
      });
  count_remaining(args.rows, batch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) { m.impl("broyden_step", TORCH_BOX(&broyden_step)); }

}  // namespace deqcore::cpu
