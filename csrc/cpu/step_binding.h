// What the bindings of the step ops share: reading and checking tensors, spreading work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/step.h"
#include "ops/rows.h"

namespace deqcore::cpu {

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

// Runs a step's three parts: push(first, last, parts) and move(first, last, decisions) on items
// (chunks of rows), decide(row, parts, decision) in between. `parts` points at the sums of the
// first item, `width` numbers each, and `decisions` at the decision of the first item's row. With
// enough rows, each thread takes whole rows, so that a row stays in its cache from part to part;
// else all threads share every row.
template <typename Decision, typename Push, typename Decide, typename Move>
void run_step(int64_t batch, int64_t dim, int64_t width, int64_t touched, const Push& push,
              const Decide& decide, const Move& move) {
  constexpr int64_t kGrain = 1 << 17;  // elements for which a thread is worth waking
  const int64_t chunks = step_chunks(dim);
  const int64_t chunk_cost = touched * (dim < kStepChunk ? dim : kStepChunk) + 1;
  if (chunks == 1 || batch >= 16) {
    const int64_t grain = kGrain / (chunk_cost * chunks) + 1;
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> parts(chunks * width);
      Decision decision;
      for (int64_t row = begin; row < end; ++row) {
        push(row * chunks, (row + 1) * chunks, parts.data());
        decide(row, parts.data(), &decision);
        move(row * chunks, (row + 1) * chunks, &decision);
      }
    });
    return;
  }
  const int64_t grain = kGrain / chunk_cost + 1;
  std::vector<double> parts(batch * chunks * width);
  std::vector<Decision> decisions(batch);
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    push(first, last, parts.data() + first * width);
  });
  for (int64_t row = 0; row < batch; ++row) {
    decide(row, parts.data() + row * chunks * width, &decisions[row]);
  }
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    move(first, last, &decisions[first / chunks]);
  });
}

}  // namespace deqcore::cpu
