// Binding of broyden_step for CPU tensors, and how its kernel's work is spread over threads.
#include "cpu/broyden_step.h"

#include "cpu/step_work.h"
#include "ops/broyden_step_binding.h"
#include "ops/torch.h"

namespace deqcore::cpu {

void run_broyden_step(const BroydenArgs& args) {
  int64_t stored = 0;
  for (int64_t row = 0; row < args.batch; ++row) {
    if (args.rows.status[row] != kActive) continue;
    const int64_t history = broyden_history(args, row);
    stored = history > stored ? history : stored;
  }
  DEQCORE_CHECK(stored < args.capacity, "s_ring: a row has stored ", stored,
                " steps and needs room for one more, got a capacity of ", args.capacity);
  run_step<BroydenDecision>(
      args.batch, args.dim, 2 * args.capacity + 2, 2 * stored + 8,
      [&](int64_t first, int64_t last, double* parts) {
        DEQCORE_DISPATCH_ISA(broyden_push, args, first, last, parts);
      },
      [&](int64_t row, const double* parts, BroydenDecision* decision) {
        DEQCORE_DISPATCH_ISA(broyden_decide, args, row, parts, decision);
      },
      [&](int64_t first, int64_t last, const BroydenDecision* decisions) {
        DEQCORE_DISPATCH_ISA(broyden_move, args, first, last, decisions);
      });
  count_remaining(args.rows, args.batch);
}

namespace {

void broyden_step(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& s_ring,
                  const Tensor& gram, const Tensor& best, const Tensor& status,
                  const Tensor& counters, const Tensor& residuals, const Tensor& remaining,
                  const Tensor& x_next, const Tensor& z_next, const Tensor& options) {
  run_broyden_step(broyden_args(x, f, damping, s_ring, gram, best, status, counters, residuals,
                                remaining, x_next, z_next, options));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) { m.impl("broyden_step", TORCH_BOX(&broyden_step)); }

}  // namespace deqcore::cpu
