// Bindings of masked_to_dense and masked_from_dense for CUDA tensors.
#include "cuda/masked_dense.h"

#include "cuda/torch_launch.h"
#include "ops/masked_dense_binding.h"
#include "ops/torch.h"

namespace deqcore::cuda {
namespace {

Tensor masked_to_dense_op(const Tensor& values, const Tensor& pattern, int64_t rows,
                          int64_t columns) {
  check_device(values, {&values, &pattern});
  const auto [type, entries] = masked_to_dense_operands(values, pattern, rows, columns);
  const OnDeviceOf device(values);
  const Tensor kept = torch::stable::contiguous(values);
  Tensor dense = new_beside(values, {rows, columns});
  check_launch("masked_to_dense", masked_to_dense(entries, kept.const_data_ptr(),
                                                  dense.mutable_data_ptr(), type, device.stream()));
  return dense;
}

Tensor masked_from_dense_op(const Tensor& dense, const Tensor& pattern) {
  check_device(dense, {&dense, &pattern});
  const auto [type, entries] = masked_from_dense_operands(dense, pattern);
  const OnDeviceOf device(dense);
  const Tensor source = torch::stable::contiguous(dense);
  Tensor values = new_beside(dense, {entries.kept});
  check_launch("masked_from_dense",
               masked_from_dense(entries, source.const_data_ptr(), values.mutable_data_ptr(), type,
                                 device.stream()));
  return values;
}

}  // namespace

DEQCORE_CUDA_BINDINGS(m) {
  m.impl("masked_to_dense", TORCH_BOX(&masked_to_dense_op));
  m.impl("masked_from_dense", TORCH_BOX(&masked_from_dense_op));
}

}  // namespace deqcore::cuda
