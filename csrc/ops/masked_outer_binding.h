// Checking the tensors of masked_outer, on every device.
#pragma once

#include <cstdint>

#include "ops/tensor_checks.h"

namespace deqcore {

// left [tokens, rows] and right [tokens, columns] of one dtype, which it returns beside the entries
// to compute; both may have any strides.
struct MaskedOuterOperands {
  Dtype type;
  SparseRows entries;
};

inline MaskedOuterOperands masked_outer_operands(const Tensor& left, const Tensor& right,
                                                 const Tensor& pattern, int64_t rows,
                                                 int64_t columns, int64_t block) {
  const Dtype type = check_dtype(left, "left");
  const int64_t kept = kept_entries(pattern, rows, columns);
  const SparseRows entries = check_pattern(pattern, kept, rows, columns, block, false);
  check_matrix(left, "left", left.scalar_type(), rows);
  check_matrix(right, "right", left.scalar_type(), columns);
  DEQCORE_CHECK(right.size(0) == left.size(0), "right: expected ", left.size(0),
                " tokens like left, got ", right.size(0));
  return {type, entries};
}

}  // namespace deqcore
