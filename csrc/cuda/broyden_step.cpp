// Binding of broyden_step for CUDA tensors.
#include "cuda/broyden_step.h"

#include "cuda/torch_launch.h"
#include "ops/broyden_step_binding.h"
#include "ops/torch.h"

namespace deqcore::cuda {
namespace {

void broyden_step_op(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& s_ring,
                     const Tensor& gram, const Tensor& best, const Tensor& status,
                     const Tensor& counters, const Tensor& residuals, const Tensor& remaining,
                     const Tensor& x_next, const Tensor& z_next, const Tensor& options) {
  check_device(x, {&x, &f, &damping, &s_ring, &gram, &best, &status, &counters, &residuals,
                   &remaining, &x_next, &z_next});
  check_on_host(options);
  const BroydenArgs args = broyden_args(x, f, damping, s_ring, gram, best, status, counters,
                                        residuals, remaining, x_next, z_next, options);
  const OnDeviceOf device(x);
  const Path path = broyden_path(args);
  const Workspace workspace(x, broyden_workspace_bytes(args, path));
  check_launch("broyden_step", broyden_step(args, path, workspace.get(), device.stream()));
}

}  // namespace

DEQCORE_CUDA_BINDINGS(m) { m.impl("broyden_step", TORCH_BOX(&broyden_step_op)); }

}  // namespace deqcore::cuda
