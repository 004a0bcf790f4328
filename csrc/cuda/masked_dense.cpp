// Bindings of masked_to_dense and masked_from_dense for CUDA tensors.
#include "cuda/masked_dense.h"

#include <torch/csrc/stable/library.h>

#include "cuda/launch_binding.h"
#include "ops/masked_binding.h"

namespace deqcore::cuda {
namespace {

Tensor masked_to_dense_op(const Tensor& values, const Tensor& pattern, int64_t rows,
                          int64_t columns) {
  check_device(values, {&values, &pattern});
  const ValueType type = value_type(values, "values");
  STD_TORCH_CHECK(values.dim() == 1, "values: expected one dimension, got ", values.dim());
  const SparseRows entries = read_pattern(pattern, values.size(0), rows, columns, 1, false);
  const OnDeviceOf device(values);
  const Tensor kept = torch::stable::contiguous(values);
  Tensor dense = torch::stable::new_empty(values, {rows, columns});
  check_launch("masked_to_dense", masked_to_dense(entries, kept.const_data_ptr(),
                                                  dense.mutable_data_ptr(), type, device.stream()));
  return dense;
}

Tensor masked_from_dense_op(const Tensor& dense, const Tensor& pattern) {
  check_device(dense, {&dense, &pattern});
  const ValueType type = value_type(dense, "dense");
  STD_TORCH_CHECK(dense.dim() == 2, "dense: expected (rows, columns), got ", dense.dim(),
                  " dimensions");
  const int64_t rows = dense.size(0), columns = dense.size(1);
  const int64_t kept = (pattern.numel() - rows - columns - 2) / 3;
  const SparseRows entries = read_pattern(pattern, kept, rows, columns, 1, false);
  const OnDeviceOf device(dense);
  const Tensor source = torch::stable::contiguous(dense);
  Tensor values = torch::stable::new_empty(dense, {kept});
  check_launch("masked_from_dense",
               masked_from_dense(entries, source.const_data_ptr(), values.mutable_data_ptr(), type,
                                 device.stream()));
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CUDA, m) {
  m.impl("masked_to_dense", TORCH_BOX(&masked_to_dense_op));
  m.impl("masked_from_dense", TORCH_BOX(&masked_from_dense_op));
}

}  // namespace deqcore::cuda
