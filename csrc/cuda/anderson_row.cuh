// One row of anderson_step: its tensors, what a step knows of it beforehand, its new slot.
#pragma once

#include <cstdint>

#include "cuda/pack.cuh"
#include "cuda/team.cuh"
#include "ops/anderson_step.h"

namespace deqcore::cuda {

// The row as its own little batch: the bookkeeping of `state`, the tensors of `args`.
DEQCORE_DEVICE AndersonArgs row_args(const AndersonArgs& args, RowState* state) {
  AndersonArgs out = args;
  out.rows = rows_of(state);
  return out;
}

template <typename X, typename F>
struct AndersonRow {
  const X* x;
  const F* f;
  X* g_ring;
  X* h_ring;
  X* best;
  X* x_next;
  F* z_next;

  DEQCORE_DEVICE AndersonRow(const AndersonArgs& args, int64_t row) {
    const int64_t at = row * args.dim;
    x = static_cast<const X*>(args.x) + at;
    f = static_cast<const F*>(args.f) + at;
    g_ring = static_cast<X*>(args.g_ring) + at * args.memory;
    h_ring = static_cast<X*>(args.h_ring) + at * args.memory;
    best = args.best == nullptr ? nullptr : static_cast<X*>(args.best) + at;
    x_next = static_cast<X*>(args.x_next) + at;
    z_next = args.z_next == nullptr ? nullptr : static_cast<F*>(args.z_next) + at;
  }
};

// What push knows of its row.
template <typename X>
struct PushPlan {
  int history;    // slots, this step's included, whose inner products are wanted
  int slot;       // of this step
  bool evicts;    // the slot holds the best iterate: save it
  X damping;      // of this step
  X old_damping;  // of the slot's previous use

  DEQCORE_DEVICE PushPlan(const AndersonArgs& args, RowState* state) {
    const AndersonArgs one = row_args(args, state);
    const int64_t step = state->counters[kSteps] + 1;
    history = static_cast<int>(anderson_history(one, 0));
    slot = static_cast<int>((step - 1) % args.memory);
    evicts = anderson_evicts_best(one, 0);
    damping = static_cast<X>(damping_at(args.damping, args.damping_length, step));
    old_damping = static_cast<X>(damping_at(args.damping, args.damping_length, step - args.memory));
  }
};

// Writes one pack of the step's slot; returns the damped iterate that is there now.
template <bool kAligned, typename X, typename F, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> store_slot(const AndersonRow<X, F>& row, const PushPlan<X>& plan,
                                          int64_t at, int64_t left, int64_t slot_at,
                                          const Pack<X, kWidth>& x, const Pack<X, kWidth>& g) {
  if (plan.evicts) {
    const auto old_g = load<kAligned, kWidth>(row.g_ring + slot_at, left);
    const auto old_h = load<kAligned, kWidth>(row.h_ring + slot_at, left);
    store<kAligned, kWidth>(row.best + at, rebuilt(old_h, plan.old_damping, old_g), left);
  }
  Pack<X, kWidth> h = x;
  add_scaled(h, plan.damping, g);
  store<kAligned, kWidth>(row.g_ring + slot_at, g, left);
  store<kAligned, kWidth>(row.h_ring + slot_at, h, left);
  return h;
}

}  // namespace deqcore::cuda
