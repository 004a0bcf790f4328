// Binding of anderson_step for CPU tensors, and how its kernel's work is spread over threads.
#include "cpu/anderson_step.h"

#include "cpu/step_work.h"
#include "ops/anderson_step_binding.h"
#include "ops/torch.h"

namespace deqcore::cpu {

void run_anderson_step(const AndersonArgs& args) {
  run_step<AndersonDecision>(
      args.batch, args.dim, args.memory + 1, 2 * args.memory + 4,
      [&](int64_t first, int64_t last, double* parts) {
        DEQCORE_DISPATCH_ISA(anderson_push, args, first, last, parts);
      },
      [&](int64_t row, const double* parts, AndersonDecision* decision) {
        DEQCORE_DISPATCH_ISA(anderson_decide, args, row, parts, decision);
      },
      [&](int64_t first, int64_t last, const AndersonDecision* decisions) {
        DEQCORE_DISPATCH_ISA(anderson_move, args, first, last, decisions);
      });
  count_remaining(args.rows, args.batch);
}

namespace {

void anderson_step(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& g_ring,
                   const Tensor& h_ring, const Tensor& gram, const Tensor& best,
                   const Tensor& status, const Tensor& counters, const Tensor& residuals,
                   const Tensor& remaining, const Tensor& x_next, const Tensor& z_next,
                   const Tensor& options) {
  run_anderson_step(anderson_args(x, f, damping, g_ring, h_ring, gram, best, status, counters,
                                  residuals, remaining, x_next, z_next, options));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) { m.impl("anderson_step", TORCH_BOX(&anderson_step)); }

}  // namespace deqcore::cpu
