// Binding of anderson_step for CPU tensors.
#include "cpu/anderson_step.h"

#include <torch/csrc/stable/library.h>

#include "cpu/step_binding.h"

namespace deqcore::cpu {
namespace {

void anderson_step(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& g_ring,
                   const Tensor& h_ring, const Tensor& gram, const Tensor& best,
                   const Tensor& status, const Tensor& counters, const Tensor& residuals,
                   const Tensor& remaining, const Tensor& x_next, const Tensor& z_next, double rtol,
                   double atol, int64_t patience, int64_t max_steps, double ridge, int64_t start,
                   int64_t restart, double safeguard, double max_weight) {
  const StateType type = check_states(x, f);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), dim = x.size(1);
  STD_TORCH_CHECK(g_ring.dim() == 3, "g_ring: expected (batch, memory, dim), got ",
                  shape_text(g_ring));
  const int64_t memory = g_ring.size(1);
  STD_TORCH_CHECK(1 <= memory && memory <= kAndersonMaxMemory,
                  "g_ring: expected a memory of 1 to 64, got ", memory);
  check(g_ring, "g_ring", dtype, {batch, memory, dim});
  check(h_ring, "h_ring", dtype, {batch, memory, dim});
  check(gram, "gram", ScalarType::Double, {batch, memory, memory});
  check(x_next, "x_next", dtype, {batch, dim});
  check(damping, "damping", ScalarType::Double, {damping.size(0)});
  STD_TORCH_CHECK(damping.size(0) > 0, "damping: expected at least one entry");
  const bool keeps_best = best.dim() == 2 && best.size(1) > 0;
  check(best, "best", dtype, {batch, keeps_best ? dim : 0});

  const AndersonArgs args{
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = static_cast<const double*>(damping.const_data_ptr()),
      .g_ring = g_ring.mutable_data_ptr(),
      .h_ring = h_ring.mutable_data_ptr(),
      .gram = static_cast<double*>(gram.mutable_data_ptr()),
      .best = keeps_best ? best.mutable_data_ptr() : nullptr,
      .x_next = x_next.mutable_data_ptr(),
      .z_next = check_z_next(z_next, f, type),
      .rows = check_rows(status, counters, residuals, remaining, batch),
      .batch = batch,
      .dim = dim,
      .memory = memory,
      .damping_length = damping.size(0),
      .limits = {rtol, atol, patience, max_steps},
      .options = {ridge, start, restart, safeguard, max_weight},
  };
  run_step<AndersonDecision>(
      batch, dim, memory + 1, 2 * memory + 4,
      [&](int64_t first, int64_t last, double* parts) {
        DEQCORE_DISPATCH_ISA(anderson_push, args, type, first, last, parts);
      },
      [&](int64_t row, const double* parts, AndersonDecision* decision) {
        DEQCORE_DISPATCH_ISA(anderson_decide, args, row, parts, decision);
      },
      [&](int64_t first, int64_t last, const AndersonDecision* decisions) {
        DEQCORE_DISPATCH_ISA(anderson_move, args, type, first, last, decisions);
      });
  count_remaining(args.rows, batch);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) { m.impl("anderson_step", TORCH_BOX(&anderson_step)); }

}  // namespace deqcore::cpu
