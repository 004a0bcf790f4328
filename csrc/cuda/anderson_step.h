// The launcher of anderson_step's CUDA kernels; no torch.
#pragma once

#include <cstdint>

#include "cuda/path.h"
#include "ops/anderson_step.h"

namespace deqcore::cuda {

Path anderson_path(const AndersonArgs& args);

// Bytes of scratch memory, aligned to 16, that a step needs on the device; 0 but for `split`.
int64_t anderson_workspace_bytes(const AndersonArgs& args, Path path);

// Queues one step on `stream` (a cudaStream_t). x_next may be x. Null, or what went wrong.
const char* anderson_step(const AndersonArgs& args, Path path, void* workspace, void* stream);

// The same on Path::cluster.
const char* anderson_step_by_clusters(const AndersonArgs& args, void* stream);

}  // namespace deqcore::cuda
