// What the bindings of the step ops share: reading and checking tensors, spreading work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "cpu/step.h"
#include "ops/rows.h"

namespace deqcore::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype number ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(tensor.scalar_type()));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t i = 0;
  for (const int64_t size : shape) {
    same = same && tensor.size(i++) == size;
    expected += (i > 1 ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, name, ": expected shape (", expected, "), got ", shape_text(tensor));
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

inline void count_remaining(const Rows& rows, int64_t batch) {
  int32_t active = 0;
  for (int64_t row = 0; row < batch; ++row) active += rows.status[row] == kActive;
  *rows.remaining = active;
}

// Runs a step as push (chunks), decide (rows), move (chunks). With enough rows, each thread takes
// whole rows, so that a row stays in its cache; else all threads share every row.
template <typename Push, typename Decide, typename Move>
void run_step(int64_t batch, int64_t dim, int64_t elements_per_chunk, const Push& push,
              const Decide& decide, const Move& move) {
  constexpr int64_t kGrain = 1 << 17;  // elements below which a thread is not worth waking
  const int64_t chunks = step_chunks(dim);
  if (chunks == 1 || batch >= 16) {
    const int64_t grain = kGrain / (elements_per_chunk * chunks) + 1;
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        push(row * chunks, (row + 1) * chunks);
        decide(row);
        move(row * chunks, (row + 1) * chunks);
      }
    });
    return;
  }
  const int64_t grain = kGrain / elements_per_chunk + 1;
  torch::stable::parallel_for(0, batch * chunks, grain, push);
  for (int64_t row = 0; row < batch; ++row) decide(row);
  torch::stable::parallel_for(0, batch * chunks, grain, move);
}

}  // namespace deqcore::cpu
