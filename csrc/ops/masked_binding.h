// What the bindings of the masked matmuls share on every device: reading and checking tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "ops/masked.h"

namespace deqcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ValueType value_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ValueType::f64;
    case ScalarType::Float:
      return ValueType::f32;
    case ScalarType::BFloat16:
      return ValueType::bf16;
    case ScalarType::Half:
      return ValueType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
  }
}

// A pattern is one int32 tensor: offsets of the rows, columns of the entries, offsets of the
// columns, rows of the entries taken by column, and where in row order each of these is.
inline SparseRows read_pattern(const Tensor& pattern, int64_t kept, int64_t rows, int64_t columns,
                               int64_t block, bool transposed) {
  const int64_t expected = rows + columns + 2 + 3 * kept;
  STD_TORCH_CHECK(pattern.scalar_type() == ScalarType::Int && pattern.is_contiguous() &&
                      pattern.dim() == 1 && pattern.numel() == expected,
                  "pattern: expected a contiguous int32 tensor of ", expected, " entries, for ",
                  kept, " values of a ", rows, " x ", columns, " weight; got ", pattern.numel(),
                  "; use SparsityPattern");
  STD_TORCH_CHECK(block == 1 || block == 16 || block == 32 || block == 64,
                  "block: expected 1, 16, 32 or 64, got ", block);
  STD_TORCH_CHECK(rows % block == 0 && columns % block == 0, "block: ", block,
                  " does not divide a ", rows, " x ", columns, " weight");
  const int32_t* by_row = pattern.const_data_ptr<int32_t>();
  const int32_t* by_column = by_row + rows + 1 + kept;
  if (!transposed) return {by_row, by_row + rows + 1, nullptr, rows, columns, kept, block};
  return {by_column, by_column + columns + 1, by_column + columns + 1 + kept, columns, rows, kept,
          block};
}

inline void check_matrix(const Tensor& tensor, const char* name, ScalarType dtype,
                         int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == columns, name, ": expected (tokens, ",
                  columns, "), got ", tensor.dim(), " dimensions, the last of ",
                  tensor.dim() ? tensor.size(-1) : 0);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected the values' dtype");
}

}  // namespace deqcore
