// Reading and checking the tensors of broyden_step, on every device.
#pragma once

#include <cstdint>

#include "ops/broyden_step.h"
#include "ops/tensor_checks.h"

namespace deqcore {

inline BroydenArgs broyden_args(const Tensor& x, const Tensor& f, const Tensor& damping,
                                const Tensor& s_ring, const Tensor& gram, const Tensor& best,
                                const Tensor& status, const Tensor& counters,
                                const Tensor& residuals, const Tensor& remaining,
                                const Tensor& x_next, const Tensor& z_next, const Tensor& options) {
  const Dtype type = check_states(x, f);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), dim = x.size(1);
  const auto [limits, numbers] = check_numbers<BroydenNumbers>(options);
  const int64_t memory = numbers.memory;
  DEQCORE_CHECK(1 <= memory && memory <= kBroydenMaxMemory, "memory: expected 1 to ",
                kBroydenMaxMemory, ", got ", memory);
  check_dimensions(s_ring, "s_ring", 3, "(batch, capacity, dim)");
  const int64_t capacity = s_ring.size(1);
  DEQCORE_CHECK(1 <= capacity && capacity <= memory, "s_ring: expected a capacity of 1 to ", memory,
                " steps, got ", capacity);
  const bool narrow = s_ring.scalar_type() == ScalarType::BFloat16;
  DEQCORE_CHECK(!narrow || dtype == ScalarType::Float,
                "s_ring: a bfloat16 history needs a float32 x");
  check(s_ring, "s_ring", narrow ? ScalarType::BFloat16 : dtype, {batch, capacity, dim});
  check(gram, "gram", ScalarType::Double, {batch, capacity, capacity});
  check(best, "best", dtype, {batch, dim});
  check(x_next, "x_next", dtype, {batch, dim});
  return {
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = check_damping(damping),
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
      .limits = limits,
      .type = type,
      .narrow = narrow,
  };
}

}  // namespace deqcore
