// Reading and checking the tensors of anderson_step, on every device.
#pragma once

#include <cstdint>

#include "ops/anderson_step.h"
#include "ops/tensor_checks.h"

namespace deqcore {

inline AndersonArgs anderson_args(const Tensor& x, const Tensor& f, const Tensor& damping,
                                  const Tensor& g_ring, const Tensor& h_ring, const Tensor& gram,
                                  const Tensor& best, const Tensor& status, const Tensor& counters,
                                  const Tensor& residuals, const Tensor& remaining,
                                  const Tensor& x_next, const Tensor& z_next,
                                  const Tensor& options) {
  const Dtype type = check_states(x, f);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), dim = x.size(1);
  check_dimensions(g_ring, "g_ring", 3, "(batch, memory, dim)");
  const int64_t memory = g_ring.size(1);
  DEQCORE_CHECK(1 <= memory && memory <= kAndersonMaxMemory, "g_ring: expected a memory of 1 to ",
                kAndersonMaxMemory, ", got ", memory);
  check(g_ring, "g_ring", dtype, {batch, memory, dim});
  check(h_ring, "h_ring", dtype, {batch, memory, dim});
  check(gram, "gram", ScalarType::Double, {batch, memory, memory});
  check(x_next, "x_next", dtype, {batch, dim});
  const bool keeps_best = best.dim() == 2 && best.size(1) > 0;
  check(best, "best", dtype, {batch, keeps_best ? dim : 0});
  const auto [limits, numbers] = check_numbers<AndersonNumbers>(options);
  return {
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = check_damping(damping),
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
      .limits = limits,
      .options = numbers,
      .type = type,
  };
}

}  // namespace deqcore
