// Checking the tensors of masked_linear, on every device.
#pragma once

#include <cstdint>
#include <optional>

#include "ops/tensor_checks.h"

namespace deqcore {

// x [tokens, columns], values [kept] and bias [rows] of one dtype, which it returns beside the
// entries of the weight, or of its transpose; x and values may have any strides.
struct MaskedLinearOperands {
  Dtype type;
  SparseRows weight;
};

inline MaskedLinearOperands masked_linear_operands(const Tensor& x, const Tensor& values,
                                                   const Tensor& pattern,
                                                   const std::optional<Tensor>& bias, int64_t rows,
                                                   int64_t columns, int64_t block,
                                                   bool transposed) {
  const Dtype type = check_dtype(values, "values");
  check_dimensions(values, "values", 1, "(kept)");
  const SparseRows weight =
      check_pattern(pattern, values.size(0), rows, columns, block, transposed);
  check_matrix(x, "x", values.scalar_type(), weight.width);
  if (bias) {
    check_shape(*bias, "bias", {weight.rows});
    check_dtype(*bias, "bias", values.scalar_type());
  }
  return {type, weight};
}

}  // namespace deqcore
