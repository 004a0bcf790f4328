// How the masked matmuls are laid out on the device, for host and device; no torch.
#pragma once

#include <cstdint>

#include "ops/rows.h"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// A block multiplies a tile of tokens with a tile of rows, some columns of the tokens at a time:
// while one chunk is multiplied in shared memory, the next is fetched beside it.
constexpr int64_t kChunkBytes = 48 * 1024;

// How many blocks that take `of_a_block` each it takes for `work`.
DEQCORE_HD int64_t blocks_for(int64_t work, int64_t of_a_block) {
  return (work + of_a_block - 1) / of_a_block;
}

// A whole number of tiles, at least one.
DEQCORE_HD int64_t padded_tokens(int64_t tokens, int64_t width) {
  return tokens > 0 ? blocks_for(tokens, width) * width : width;
}

// Scratch memory handed out piece by piece, each at the beginning of a line of the GPU's caches.
class Pieces {
 public:
  explicit Pieces(void* from) : from_(reinterpret_cast<uintptr_t>(from)) {}
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t at = from_ + static_cast<uintptr_t>(used_);  // without memory: only counts
    used_ += blocks_for(count * static_cast<int64_t>(sizeof(T)), kLine) * kLine;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kLine = 128;  // bytes
  uintptr_t from_;
  int64_t used_ = 0;
};

}  // namespace deqcore::cuda
