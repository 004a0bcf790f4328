// What the bindings of the step ops share on every device: reading and checking tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "ops/anderson_step.h"
#include "ops/broyden_step.h"
#include "ops/state_type.h"

namespace deqcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline std::string shape_text(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return shape_text(sizes);
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype number ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_text(shape), ", got ", shape_text(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// Checks x [B, D] and f [B, D], and returns their types.
inline StateType check_states(const Tensor& x, const Tensor& f) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected (batch, dim), got ", shape_text(x));
  const bool wide = x.scalar_type() == ScalarType::Double;
  check(x, "x", wide ? ScalarType::Double : ScalarType::Float, {x.size(0), x.size(1)});
  check(f, "f", f.scalar_type(), {x.size(0), x.size(1)});
  const ScalarType type = f.scalar_type();
  if (wide) {
    STD_TORCH_CHECK(type == ScalarType::Double, "f: expected float64 like x");
    return StateType::f64;
  }
  if (type == ScalarType::BFloat16) return StateType::bf16;
  if (type == ScalarType::Half) return StateType::f16;
  STD_TORCH_CHECK(type == ScalarType::Float, "f: expected float32, bfloat16 or float16");
  return StateType::f32;
}

// z_next, [B, D] in f's dtype, or null where it has no columns because f's dtype is x's.
inline void* check_z_next(const Tensor& z_next, const Tensor& f, StateType type) {
  if (type == StateType::f64 || type == StateType::f32) return nullptr;
  check(z_next, "z_next", f.scalar_type(), {f.size(0), f.size(1)});
  return z_next.mutable_data_ptr();
}

// Whether a history beside an iterate of that dtype is in bfloat16 instead.
inline bool check_history(const Tensor& ring, const char* name, ScalarType dtype,
                          std::initializer_list<int64_t> shape) {
  const bool narrow = ring.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!narrow || dtype == ScalarType::Float, name,
                  ": a bfloat16 history needs a float32 x");
  check(ring, name, narrow ? ScalarType::BFloat16 : dtype, shape);
  return narrow;
}

inline Rows check_rows(const Tensor& status, const Tensor& counters, const Tensor& residuals,
                       const Tensor& remaining, int64_t batch) {
  check(status, "status", ScalarType::Char, {batch});
  check(counters, "counters", ScalarType::Int, {batch, kCounters});
  check(residuals, "residuals", ScalarType::Double, {batch, kResiduals});
  check(remaining, "remaining", ScalarType::Int, {1});
  return {static_cast<int8_t*>(status.mutable_data_ptr()),
          static_cast<int32_t*>(counters.mutable_data_ptr()),
          static_cast<double*>(residuals.mutable_data_ptr()),
          static_cast<int32_t*>(remaining.mutable_data_ptr())};
}

inline void check_damping(const Tensor& damping) {
  check(damping, "damping", ScalarType::Double, {damping.size(0)});
  STD_TORCH_CHECK(damping.size(0) > 0, "damping: expected at least one entry");
}

// The op's numbers: one float64 tensor on the CPU whatever the device, because a tensor crosses the
// dispatcher in less time than a number does, and nine of them are most of a small step.
inline const double* check_options(const Tensor& options, int64_t count) {
  STD_TORCH_CHECK(options.is_cpu(), "options: expected a tensor on the CPU");
  check(options, "options", ScalarType::Double, {count});
  return static_cast<const double*>(options.const_data_ptr());
}

inline RowLimits row_limits(const double* options) {
  return {options[0], options[1], static_cast<int64_t>(options[2]),
          static_cast<int64_t>(options[3])};
}

inline AndersonArgs anderson_args(const Tensor& x, const Tensor& f, const Tensor& damping,
                                  const Tensor& g_ring, const Tensor& h_ring, const Tensor& gram,
                                  const Tensor& best, const Rows& rows, const Tensor& x_next,
                                  const Tensor& z_next, const Tensor& options) {
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
  check_damping(damping);
  const bool keeps_best = best.dim() == 2 && best.size(1) > 0;
  check(best, "best", dtype, {batch, keeps_best ? dim : 0});
  const double* numbers = check_options(options, 9);
  return {
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = static_cast<const double*>(damping.const_data_ptr()),
      .g_ring = g_ring.mutable_data_ptr(),
      .h_ring = h_ring.mutable_data_ptr(),
      .gram = static_cast<double*>(gram.mutable_data_ptr()),
      .best = keeps_best ? best.mutable_data_ptr() : nullptr,
      .x_next = x_next.mutable_data_ptr(),
      .z_next = check_z_next(z_next, f, type),
      .rows = rows,
      .batch = batch,
      .dim = dim,
      .memory = memory,
      .damping_length = damping.size(0),
      .limits = row_limits(numbers),
      .options = {numbers[4], static_cast<int64_t>(numbers[5]), static_cast<int64_t>(numbers[6]),
                  numbers[7], numbers[8]},
  };
}

inline BroydenArgs broyden_args(const Tensor& x, const Tensor& f, const Tensor& damping,
                                const Tensor& s_ring, const Tensor& gram, const Tensor& best,
                                const Rows& rows, const Tensor& x_next, const Tensor& z_next,
                                const Tensor& options) {
  const StateType type = check_states(x, f);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), dim = x.size(1);
  const double* numbers = check_options(options, 5);
  const int64_t memory = static_cast<int64_t>(numbers[4]);
  STD_TORCH_CHECK(1 <= memory && memory <= kBroydenMaxMemory, "memory: expected 1 to 64, got ",
                  memory);
  STD_TORCH_CHECK(s_ring.dim() == 3, "s_ring: expected (batch, capacity, dim), got ",
                  shape_text(s_ring));
  const int64_t capacity = s_ring.size(1);
  STD_TORCH_CHECK(1 <= capacity && capacity <= memory, "s_ring: expected a capacity of 1 to ",
                  memory, " steps, got ", capacity);
  const bool narrow = check_history(s_ring, "s_ring", dtype, {batch, capacity, dim});
  check(gram, "gram", ScalarType::Double, {batch, memory, memory});
  check(best, "best", dtype, {batch, dim});
  check(x_next, "x_next", dtype, {batch, dim});
  check_damping(damping);
  return {
      .x = x.const_data_ptr(),
      .f = f.const_data_ptr(),
      .damping = static_cast<const double*>(damping.const_data_ptr()),
      .s_ring = s_ring.mutable_data_ptr(),
      .gram = static_cast<double*>(gram.mutable_data_ptr()),
      .best = best.mutable_data_ptr(),
      .x_next = x_next.mutable_data_ptr(),
      .z_next = check_z_next(z_next, f, type),
      .rows = rows,
      .batch = batch,
      .dim = dim,
      .capacity = capacity,
      .memory = memory,
      .damping_length = damping.size(0),
      .limits = row_limits(numbers),
      .narrow = narrow,
  };
}

}  // namespace deqcore
