// Checking the tensors of masked_to_dense, masked_expand and masked_from_dense, on every device.
#pragma once

#include <cstdint>

#include "ops/tensor_checks.h"

namespace deqcore {

struct MaskedDenseOperands {
  Dtype type;
  SparseRows entries;
};

// values [kept], any strides, of a matrix [rows, columns].
inline MaskedDenseOperands masked_to_dense_operands(const Tensor& values, const Tensor& pattern,
                                                    int64_t rows, int64_t columns) {
  const Dtype type = check_dtype(values, "values");
  check_dimensions(values, "values", 1, "(kept)");
  return {type, check_pattern(pattern, values.size(0), rows, columns, 1, false)};
}

// dense [rows, columns], any strides.
inline MaskedDenseOperands masked_from_dense_operands(const Tensor& dense, const Tensor& pattern) {
  const Dtype type = check_dtype(dense, "dense");
  check_dimensions(dense, "dense", 2, "(rows, columns)");
  const int64_t rows = dense.size(0), columns = dense.size(1);
  const int64_t kept = kept_entries(pattern, rows, columns);
  return {type, check_pattern(pattern, kept, rows, columns, 1, false)};
}

}  // namespace deqcore
