// One row of broyden_step: its tensors, and the new step from its inner products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/team.cuh"
#include "ops/broyden_step.h"

namespace deqcore::cuda {

DEQCORE_DEVICE BroydenArgs row_args(const BroydenArgs& args, RowState* state) {
  BroydenArgs out = args;
  out.rows = rows_of(state);
  return out;
}

// Stored steps to use. The caller keeps a free slot; without one the row restarts, in bounds.
DEQCORE_DEVICE int history_of(const BroydenArgs& args, RowState* state) {
  const int64_t history = broyden_history(row_args(args, state), 0);
  return history < args.capacity ? static_cast<int>(history) : 0;
}

template <typename X, typename F, typename S>
struct BroydenRow {
  const X* x;
  const F* f;
  S* s_ring;
  X* best;
  X* x_next;
  F* z_next;

  DEQCORE_DEVICE BroydenRow(const BroydenArgs& args, int64_t row) {
    const int64_t at = row * args.dim;
    x = static_cast<const X*>(args.x) + at;
    f = static_cast<const F*>(args.f) + at;
    s_ring = static_cast<S*>(args.s_ring) + at * args.capacity;
    best = static_cast<X*>(args.best) + at;
    x_next = static_cast<X*>(args.x_next) + at;
    z_next = args.z_next == nullptr ? nullptr : static_cast<F*>(args.z_next) + at;
  }
};

// broyden_inverse of ops/broyden_step.h by one warp: the lanes keep the products s_i . z, so that
// each update is one broadcast and one multiply-add instead of a sum over the earlier steps.
// The new step is *g_weight * g + sum_j weights[j] s_j; false where the last update is singular.
// `scratch`: sums, gram (`stride` apart), inverse_size, lift, ratio and weights, in shared memory.
template <typename Scratch>
DEQCORE_DEVICE bool inverse_by_warp(int lane, const BroydenArgs& args, int history, int64_t step,
                                    const Scratch& scratch, double* g_weight) {
  using X = std::remove_reference_t<decltype(*scratch.weights)>;
  constexpr int kParts = kBroydenMaxMemory / kWarp;
  const double* const gram = scratch.gram;
  const int stride = scratch.stride;
  const auto beta_at = [&](int64_t at) {
    return damping_at(args.damping, args.damping_length, at);
  };
  double product[kParts], weight[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = lane + part * kWarp;
    product[part] = weight[part] = 0.0;
    if (j >= history) continue;
    product[part] = scratch.sums[2 + 2 * j];
    const double size = gram[j * stride + j];
    const double beta = beta_at(step - history + j);
    scratch.inverse_size[j] = size > 0 ? 1 / size : 0.0;
    scratch.lift[j] = beta - 1;
    scratch.ratio[j] = beta / beta_at(step - history + j + 1);
  }
  __syncwarp();
  double w = 0.0;  // s_j . z_j / |s_j|^2
  for (int j = 0; j < history; ++j) {
    w = __shfl_sync(kWholeWarp, j < kWarp ? product[0] : product[kParts - 1], j % kWarp) *
        scratch.inverse_size[j];
    if (j + 1 == history) break;
    const double own = scratch.lift[j] * w, next = scratch.ratio[j] * w;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int i = lane + part * kWarp;
      if (i == j) weight[part] += own;
      if (i == j + 1) weight[part] += next;
      if (i > j && i < history) {
        product[part] += own * gram[i * stride + j] + next * gram[i * stride + j + 1];
      }
    }
  }
  double left = 1.0;
  if (history > 0) left = 1 - beta_at(step - 1) * w;
  if (!(fabs(left) * kBroydenMaxGrowth >= 1)) return false;
  const double beta = beta_at(step);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = lane + part * kWarp;
    if (j >= history) continue;
    const double last = j + 1 == history ? scratch.lift[j] * w : 0.0;
    scratch.weights[j] = static_cast<X>(beta * (weight[part] + last) / left);
  }
  *g_weight = beta / left;
  return true;
}

}  // namespace deqcore::cuda
