// The launchers of masked_to_dense's and masked_from_dense's CUDA kernels; no torch.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// Between values [entries.kept] and dense [entries.rows, entries.width], which to_dense writes in
// full. Null, or what went wrong.
const char* masked_to_dense(const SparseRows& entries, const void* values, void* dense, Dtype type,
                            void* stream);
const char* masked_from_dense(const SparseRows& entries, const void* dense, void* values,
                              Dtype type, void* stream);

}  // namespace deqcore::cuda
