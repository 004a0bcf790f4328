// Binding of masked_linear for CUDA tensors.
#include "cuda/masked_linear.h"

#include <optional>

#include "cuda/torch_launch.h"
#include "ops/masked_linear_binding.h"
#include "ops/torch.h"

namespace deqcore::cuda {
namespace {

Tensor masked_linear_op(const Tensor& x, const Tensor& values, const Tensor& pattern,
                        std::optional<Tensor> bias, int64_t rows, int64_t columns, int64_t block,
                        bool transposed, bool /*dense_outer: of the derivative*/) {
  check_device(x, {&x, &values, &pattern});
  if (bias) check_device(x, {&*bias});
  const auto [type, weight] =
      masked_linear_operands(x, values, pattern, bias, rows, columns, block, transposed);
  const OnDeviceOf device(x);
  const Tensor inputs = contiguous_and_aligned(x), kept = contiguous_and_aligned(values);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor y = new_beside(x, {x.size(0), weight.rows});
  const MaskedLinearArgs args{
      .x = inputs.const_data_ptr(),
      .values = kept.const_data_ptr(),
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .weight = weight,
      .tokens = x.size(0),
  };
  const LinearPath path = masked_linear_path(args, type);
  const Workspace workspace(x, masked_linear_workspace_bytes(args, type, path));
  check_launch("masked_linear", masked_linear(args, type, path, workspace.get(), device.stream()));
  return y;
}

}  // namespace

DEQCORE_CUDA_BINDINGS(m) { m.impl("masked_linear", TORCH_BOX(&masked_linear_op)); }

}  // namespace deqcore::cuda
