// Teams of threads that share a row, their reductions, and a row's bookkeeping in shared memory.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/path.h"
#include "ops/rows.h"

namespace deqcore::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kBlockWarps = kBlockThreads / kWarp;

// A warp or a whole block.
struct Team {
  int rank;     // of this thread
  int threads;  // kWarp, or those of the block

  DEQCORE_DEVICE int lane() const { return rank % kWarp; }
  DEQCORE_DEVICE int warp() const { return rank / kWarp; }
  DEQCORE_DEVICE int warps() const { return threads / kWarp; }
  DEQCORE_DEVICE void sync() const {
    if (threads == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

// Every lane gets the same bits: addition commutes, so both partners of an exchange agree.
DEQCORE_DEVICE double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// Writes each warp's sum of `value` to warp_sums[warp * stride + index].
DEQCORE_DEVICE void store_warp_sum(const Team& team, double value, double* warp_sums, int stride,
                                   int index) {
  const double sum = warp_sum(value);
  if (team.lane() == 0) warp_sums[team.warp() * stride + index] = sum;
}

// Sums of kCount values, a power of two, over the warp. A lane gets that of value
// lane / (kWarp / kCount).
template <int kCount>
DEQCORE_DEVICE double joint_warp_sums(int lane, double (&values)[kCount]) {
  constexpr int kLanes = kWarp / kCount;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane & half * kLanes) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double kept = upper ? values[half + i] : values[i];
      const double given = upper ? values[i] : values[half + i];
      values[i] = kept + __shfl_xor_sync(kWholeWarp, given, half * kLanes);
    }
  }
  double total = values[0];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kWholeWarp, total, distance);
  }
  return total;
}

// Adds the warp's sums of the first `count` values to to[0 .. count), or begins them.
template <int kCount>
DEQCORE_DEVICE void keep_warp_sums(int lane, double (&values)[kCount], int count, bool begins,
                                   double* to) {
  const double sum = joint_warp_sums(lane, values);
  constexpr int kLanes = kWarp / kCount;
  const int index = lane / kLanes;
  if (lane % kLanes == 0 && index < count) to[index] = begins ? sum : to[index] + sum;
}

// totals[0 .. width) over the warps, in their order; all threads see them afterwards.
DEQCORE_DEVICE void add_warp_sums(const Team& team, const double* warp_sums, int stride, int width,
                                  double* totals) {
  team.sync();
  for (int i = team.rank; i < width; i += team.threads) {
    double total = 0.0;
    for (int warp = 0; warp < team.warps(); ++warp) total += warp_sums[warp * stride + i];
    totals[i] = total;
  }
  team.sync();
}

// totals[0 .. width) over the chunks of a row: a warp takes a total, its lanes take chunks.
DEQCORE_DEVICE void add_chunk_sums(const Team& team, const double* chunk_sums, int64_t chunks,
                                   int stride, int width, double* totals) {
  for (int i = team.warp(); i < width; i += team.warps()) {
    double part = 0.0;
    for (int64_t chunk = team.lane(); chunk < chunks; chunk += kWarp) {
      part += chunk_sums[chunk * stride + i];
    }
    const double total = warp_sum(part);
    if (team.lane() == 0) totals[i] = total;
  }
  team.sync();
}

// Bookkeeping of one row, apart from the tensors it came from: several blocks may each work out
// the same decision from it, and one of them writes it back.
struct RowState {
  double residuals[kResiduals];
  int32_t counters[kCounters];
  int32_t active;
  int8_t status;
  int8_t padding[3];
};
static_assert(sizeof(RowState) == 64);
constexpr int kRowStateDoubles = (sizeof(RowState) + 7) / 8;

// By one warp; only a lane's own elements until it synchronises.
DEQCORE_DEVICE void read_row(int lane, const Rows& rows, int64_t row, RowState* state) {
  if (lane < kResiduals) state->residuals[lane] = rows.residuals[row * kResiduals + lane];
  if (lane < kCounters) state->counters[lane] = rows.counters[row * kCounters + lane];
  if (lane == 0) {
    state->status = rows.status[row];
    state->active = rows.status[row] == kActive;
  }
}

DEQCORE_DEVICE void copy_row(int lane, const RowState* from, RowState* to) {
  if (lane < kResiduals) to->residuals[lane] = from->residuals[lane];
  if (lane < kCounters) to->counters[lane] = from->counters[lane];
  if (lane == 0) {
    to->status = from->status;
    to->active = from->active;
  }
}

// Writes back an active row; `remaining` only ever falls, so its order does not matter.
DEQCORE_DEVICE void commit_row(int lane, const RowState* state, const Rows& rows, int64_t row) {
  if (lane < kResiduals) rows.residuals[row * kResiduals + lane] = state->residuals[lane];
  if (lane < kCounters) rows.counters[row * kCounters + lane] = state->counters[lane];
  if (lane == 0) {
    rows.status[row] = state->status;
    if (state->status != kActive) atomicSub(rows.remaining, 1);
  }
}

// The state as the one row of a batch, for functions that take rows.
DEQCORE_DEVICE Rows rows_of(RowState* state) {
  return {&state->status, state->counters, state->residuals, nullptr};
}

}  // namespace deqcore::cuda
