// Binding of anderson_step for CUDA tensors.
#include "cuda/anderson_step.h"

#include "cuda/torch_launch.h"
#include "ops/anderson_step_binding.h"
#include "ops/torch.h"

namespace deqcore::cuda {
namespace {

void anderson_step_op(const Tensor& x, const Tensor& f, const Tensor& damping, const Tensor& g_ring,
                      const Tensor& h_ring, const Tensor& gram, const Tensor& best,
                      const Tensor& status, const Tensor& counters, const Tensor& residuals,
                      const Tensor& remaining, const Tensor& x_next, const Tensor& z_next,
                      const Tensor& options) {
  check_device(x, {&x, &f, &damping, &g_ring, &h_ring, &gram, &best, &status, &counters, &residuals,
                   &remaining, &x_next, &z_next});
  check_on_host(options);
  const AndersonArgs args = anderson_args(x, f, damping, g_ring, h_ring, gram, best, status,
                                          counters, residuals, remaining, x_next, z_next, options);
  const OnDeviceOf device(x);
  const Path path = anderson_path(args);
  const Workspace workspace(x, anderson_workspace_bytes(args, path));
  check_launch("anderson_step", anderson_step(args, path, workspace.get(), device.stream()));
}

}  // namespace

DEQCORE_CUDA_BINDINGS(m) { m.impl("anderson_step", TORCH_BOX(&anderson_step_op)); }

}  // namespace deqcore::cuda
