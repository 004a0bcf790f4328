// The launchers of masked_linear's CUDA kernels; no torch.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// y [tokens, weight.rows] = x [tokens, weight.width] weight^T + bias; all of one type.
struct MaskedLinearArgs {
  const void* x;
  const void* values;  // [weight.kept]
  const void* bias;    // [weight.rows], or null
  void* y;
  SparseRows weight;
  int64_t tokens;
};

// How a product is laid out: entries in strips of rows (large, medium) or in tiles, where the
// tokens are many; few; or gathered. The bits of all but gather are the same, since each entry of y
// is summed by one thread in the order of the columns. Blocks of bfloat16 and float16 go to tensor
// cores, in groups of rows on Hopper; of other types they are entries. Strips, gather and groups
// are on trial (device.cuh).
enum class LinearPath {
  large,
  medium,
  few,
  blocks,
  few_blocks,
  groups,
  gather,
  tiles,
  small_tiles,
};

LinearPath masked_linear_path(const MaskedLinearArgs& args, Dtype type);

// Bytes of scratch memory, aligned to 16, that the product needs on the device.
int64_t masked_linear_workspace_bytes(const MaskedLinearArgs& args, Dtype type, LinearPath path);

// Queues the product on `stream` (a cudaStream_t). Null, or what went wrong.
const char* masked_linear(const MaskedLinearArgs& args, Dtype type, LinearPath path,
                          void* workspace, void* stream);

// The path for a token or a few: whether there are so few, and the launcher.
bool masked_linear_can_gather(const MaskedLinearArgs& args, Dtype type);
const char* masked_linear_gather(const MaskedLinearArgs& args, Dtype type, void* stream);

// What the paths large and medium are, but for float64.
int64_t masked_linear_strips_bytes(const MaskedLinearArgs& args, Dtype type, bool large);
const char* masked_linear_strips(const MaskedLinearArgs& args, Dtype type, bool large,
                                 void* workspace, void* stream);

// The blocks' paths, which masked_linear takes when told to: whether these arguments allow it, and
// the launcher.
bool masked_linear_has_blocks(const MaskedLinearArgs& args, Dtype type);

// The same for blocks of 64 on Hopper, given that they are blocks.
bool masked_linear_has_groups(const MaskedLinearArgs& args);
int64_t masked_linear_groups_bytes(const MaskedLinearArgs& args);
const char* masked_linear_groups(const MaskedLinearArgs& args, Dtype type, void* workspace,
                                 void* stream);
const char* masked_linear_blocks(const MaskedLinearArgs& args, Dtype type, bool few_tokens,
                                 void* stream);

}  // namespace deqcore::cuda
