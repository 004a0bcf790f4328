// Binding of masked_outer for CUDA tensors.
#include "cuda/masked_outer.h"

#include "cuda/torch_launch.h"
#include "ops/masked_outer_binding.h"
#include "ops/torch.h"

namespace deqcore::cuda {
namespace {

Tensor masked_outer_op(const Tensor& left, const Tensor& right, const Tensor& pattern, int64_t rows,
                       int64_t columns, int64_t block) {
  check_device(left, {&left, &right, &pattern});
  const auto [type, entries] = masked_outer_operands(left, right, pattern, rows, columns, block);
  const OnDeviceOf device(left);
  const Tensor lefts = contiguous_and_aligned(left), rights = contiguous_and_aligned(right);
  Tensor values = new_beside(left, {entries.kept});
  const MaskedOuterArgs args{
      .left = lefts.const_data_ptr(),
      .right = rights.const_data_ptr(),
      .values = values.mutable_data_ptr(),
      .entries = entries,
      .tokens = left.size(0),
  };
  const OuterPath path = masked_outer_path(args, type);
  const Workspace workspace(left, masked_outer_workspace_bytes(args, type, path));
  check_launch("masked_outer", masked_outer(args, type, path, workspace.get(), device.stream()));
  return values;
}

}  // namespace

DEQCORE_CUDA_BINDINGS(m) { m.impl("masked_outer", TORCH_BOX(&masked_outer_op)); }

}  // namespace deqcore::cuda
