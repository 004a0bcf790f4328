// Kept values into a dense matrix and back on a GPU: a warp takes a row. They move numbers and
// compute nothing, so types of one size share a kernel. No torch.
#include "cuda/masked_dense.h"

#include "cuda/device.cuh"
#include "cuda/masked_layout.h"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kWarps = 8;

template <typename Bits>
__global__ void __launch_bounds__(kWarps* kWarp)
    spread_values(const SparseRows entries, const Bits* values, Bits* dense) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= entries.rows) return;  // the whole warp leaves
  Bits* const to = dense + row * entries.width;
  for (int64_t column = lane; column < entries.width; column += kWarp) {
    count_write(sizeof(Bits));
    to[column] = 0;
  }
  __syncwarp();
  for (int i = entries.offsets[row] + lane; i < entries.offsets[row + 1]; i += kWarp) {
    count_write(sizeof(Bits));
    to[entries.columns[i]] = values[i];
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kWarps* kWarp)
    collect_values(const SparseRows entries, const Bits* dense, Bits* values) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= entries.rows) return;
  const Bits* const from = dense + row * entries.width;
  for (int i = entries.offsets[row] + lane; i < entries.offsets[row + 1]; i += kWarp) {
    count_write(sizeof(Bits));
    values[i] = from[entries.columns[i]];
  }
}

// Calls run.operator()<Bits>() with an unsigned integer of the type's size.
template <typename Run>
const char* with_bits(Dtype type, const Run& run) {
  if (type == Dtype::f64) return run.template operator()<uint64_t>();
  if (type == Dtype::f32) return run.template operator()<uint32_t>();
  return run.template operator()<uint16_t>();
}

}  // namespace

const char* masked_to_dense(const SparseRows& entries, const void* values, void* dense, Dtype type,
                            void* stream) {
  if (entries.rows == 0 || entries.width == 0) return nullptr;
  return with_bits(type, [&]<typename Bits>() {
    return launch(spread_values<Bits>, blocks_for(entries.rows, kWarps), kWarps * kWarp, 0,
                  static_cast<Stream>(stream), entries, static_cast<const Bits*>(values),
                  static_cast<Bits*>(dense));
  });
}

const char* masked_from_dense(const SparseRows& entries, const void* dense, void* values,
                              Dtype type, void* stream) {
  if (entries.kept == 0) return nullptr;
  return with_bits(type, [&]<typename Bits>() {
    return launch(collect_values<Bits>, blocks_for(entries.rows, kWarps), kWarps * kWarp, 0,
                  static_cast<Stream>(stream), entries, static_cast<const Bits*>(dense),
                  static_cast<Bits*>(values));
  });
}

}  // namespace deqcore::cuda
