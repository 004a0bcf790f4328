// The launchers of masked_outer's CUDA kernels; no torch.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// values [kept] = sum over tokens of left [tokens, rows] times right [tokens, width], at the kept
// entries alone; all of one type.
struct MaskedOuterArgs {
  const void* left;
  const void* right;
  void* values;
  SparseRows entries;
  int64_t tokens;
};

// How many tokens a lane takes at a time, which the order of a sum depends on: strips of rows
// (many) and tiles, or few. Blocks of bfloat16 and float16 go to tensor cores (segments, on
// Hopper); of other types they are entries. Strips and segments are on trial (device.cuh).
enum class OuterPath { many, few, blocks, segments, tiles };

// By the number of tokens, the type, the block and the alignment.
OuterPath masked_outer_path(const MaskedOuterArgs& args, Dtype type);

// Bytes of scratch memory, aligned to 16, that it needs on the device.
int64_t masked_outer_workspace_bytes(const MaskedOuterArgs& args, Dtype type, OuterPath path);

// Queues it on `stream` (a cudaStream_t). Null, or what went wrong.
const char* masked_outer(const MaskedOuterArgs& args, Dtype type, OuterPath path, void* workspace,
                         void* stream);

// What the path `many` is, but for float64.
int64_t masked_outer_strips_bytes(const MaskedOuterArgs& args, Dtype type);
const char* masked_outer_strips(const MaskedOuterArgs& args, Dtype type, void* workspace,
                                void* stream);

// The blocks' path, which masked_outer takes when told to: whether these arguments allow it, and
// the launcher.
bool masked_outer_has_blocks(const MaskedOuterArgs& args, Dtype type);
const char* masked_outer_blocks(const MaskedOuterArgs& args, Dtype type, void* stream);

// The same for blocks of 64 on Hopper, given that they are blocks.
bool masked_outer_has_segments(const MaskedOuterArgs& args);
const char* masked_outer_segments(const MaskedOuterArgs& args, Dtype type, void* stream);

}  // namespace deqcore::cuda
