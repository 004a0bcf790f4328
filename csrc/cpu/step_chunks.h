// How rows are cut into chunks, in the bindings of the step ops and their kernels.
#pragma once

#include <cstdint>

namespace deqcore::cpu {

// Elements of a row that are summed together. Threads share rows, or, where there are few long
// ones, chunks of rows; the order of a row's sum is the same either way.
constexpr int64_t kStepChunk = 16384;

inline int64_t step_chunks(int64_t dim) {
  return dim > kStepChunk ? (dim + kStepChunk - 1) / kStepChunk : 1;
}

}  // namespace deqcore::cpu
