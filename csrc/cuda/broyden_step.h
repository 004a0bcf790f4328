// The launcher of broyden_step's CUDA kernels; no torch.
#pragma once

#include <cstdint>

#include "cuda/path.h"
#include "ops/broyden_step.h"

namespace deqcore::cuda {

Path broyden_path(const BroydenArgs& args);

// Bytes of scratch memory, aligned to 16, that a step needs on the device; 0 but for `split`.
int64_t broyden_workspace_bytes(const BroydenArgs& args, Path path);

// Queues one step on `stream` (a cudaStream_t). x_next may be x. Null, or what went wrong.
const char* broyden_step(const BroydenArgs& args, Path path, void* workspace, void* stream);

// The same on Path::cluster.
const char* broyden_step_by_clusters(const BroydenArgs& args, void* stream);

}  // namespace deqcore::cuda
