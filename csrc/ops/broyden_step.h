// Arguments and small algebra of broyden_step, for host and device. Oracle, sources and meaning:
// deqcore/ops/broyden_step.py.
#pragma once

#include <cstdint>
#include <tuple>

#include "ops/dtype.h"
#include "ops/numbers.h"
#include "ops/rows.h"

namespace deqcore {

constexpr int kBroydenMaxMemory = 64;
// A rank-one update that would stretch the step by more than this is singular: restart.
constexpr double kBroydenMaxGrowth = 1e4;

#define DEQCORE_BROYDEN_OPTIONS(number) number(int64_t, memory)
DEQCORE_NUMBERS(BroydenOptions, DEQCORE_BROYDEN_OPTIONS)
using BroydenNumbers = std::tuple<RowLimits, BroydenOptions>;

// All contiguous. f and z_next are of `type` ("F"), other state-sized tensors of what it is
// computed as
// ("X": float or double); the steps of a float state may be bfloat16 ("S").
struct BroydenArgs {
  const void* x;          // X [B, D]
  const void* f;          // F [B, D]
  const double* damping;  // [damping_length]
  void* s_ring;           // S [B, C, D] steps, oldest first
  double* gram;           // [B, C, C]
  void* best;             // X [B, D]
  void* x_next;           // X [B, D]
  void* z_next;           // F [B, D], or null where F is X
  Rows rows;
  int64_t batch, dim, capacity, memory, damping_length;
  RowLimits limits;
  Dtype type;   // F; X is Compute<F>
  bool narrow;  // S is bfloat16, else X
};

// What to write into x_next of one row.
enum class BroydenMove {
  copy_x,     // the row converged, ended on its best iterate, or is frozen
  copy_best,  // it ended elsewhere, or retreats
  step,       // x + step, rounded to S; the step is stored
};

struct BroydenPlan {
  BroydenMove move;
  bool improved;    // x becomes the best iterate
  int32_t count;    // stored steps that the new one combines; its own slot
  double g_weight;  // of g in the new step
};

// Stored steps that the coming step may use: none once the history is full, or for a plain step.
DEQCORE_HD int64_t broyden_history(const BroydenArgs& args, int64_t row) {
  const int32_t* counters = args.rows.counters + row * kCounters;
  const int64_t count = counters[kHistory];
  return count < args.memory && !row_rests(counters) ? count : 0;
}

// -H g = g_weight * g + sum_j weights[j] s_j from dots[j] = s_j . g and the Gram matrix of the
// `count` steps. Returns false where the newest rank-one update is singular.
// `step` is the evaluation that g belongs to.
DEQCORE_HD bool broyden_inverse(const BroydenArgs& args, const double* gram, const double* dots,
                                int count, int64_t step, double* weights, double* g_weight) {
  const int64_t stride = args.capacity;
  for (int j = 0; j < count; ++j) weights[j] = 0.0;
  double w = 0.0;
  for (int j = 0; j < count; ++j) {
    const double size = gram[j * stride + j];
    double product = dots[j];  // s_j . z_j, with z_j = g + sum_i weights_i s_i so far
    for (int i = 0; i <= j; ++i) product += weights[i] * gram[j * stride + i];
    w = size > 0 ? product / size : 0.0;
    if (j + 1 == count) break;
    const double beta = damping_at(args.damping, args.damping_length, step - count + j);
    const double next = damping_at(args.damping, args.damping_length, step - count + j + 1);
    weights[j] += (beta - 1) * w;
    weights[j + 1] += beta / next * w;
  }
  *g_weight = 1.0;
  if (count == 0) return true;
  const double beta = damping_at(args.damping, args.damping_length, step - 1);
  const double left = 1 - beta * w;
  if (!(fabs(left) * kBroydenMaxGrowth >= 1)) return false;
  *g_weight = 1 / left;
  for (int j = 0; j < count; ++j) weights[j] /= left;
  weights[count - 1] += (beta - 1) * w / left;
  return true;
}

// Counts the evaluation and decides the row's move; a `step` is then completed by broyden_finish.
DEQCORE_HD BroydenPlan broyden_begin(const BroydenArgs& args, int64_t row, double sum_g2,
                                     double sum_f2) {
  int32_t* counters = args.rows.counters + row * kCounters;
  const bool was_mixed = counters[kMixed] > 0;
  const RowOutcome outcome =
      advance_row(args.rows, row, sum_g2, sum_f2, args.dim, args.limits, was_mixed);
  counters[kMixed] = 0;
  if (outcome.retreats) {
    counters[kHistory] = 0;
    return {BroydenMove::copy_best, false, 0, 0.0};
  }
  if (outcome.going_on) return {BroydenMove::step, outcome.improved, 0, 1.0};
  const bool elsewhere = outcome.ended && !outcome.improved && counters[kBestStep] > 0;
  return {elsewhere ? BroydenMove::copy_best : BroydenMove::copy_x, false, 0, 0.0};
}

// Writes down that the new step combines `count` stored ones, and is stored after them.
DEQCORE_HD void broyden_finish(const BroydenArgs& args, int64_t row, int count) {
  int32_t* counters = args.rows.counters + row * kCounters;
  counters[kMixed] = count;
  counters[kHistory] = count + 1;
}

// Both, with the Gram matrix brought up to date; weights[0 .. count).
// sums: |g|^2, |f|^2, then for each of the `count` stored steps s_j . g and s_j . s_newest.
DEQCORE_HD BroydenPlan broyden_plan(const BroydenArgs& args, int64_t row, int count,
                                    const double* sums, double* dots, double* weights) {
  BroydenPlan plan = broyden_begin(args, row, sums[0], sums[1]);
  if (plan.move != BroydenMove::step) return plan;
  double* gram = args.gram + row * args.capacity * args.capacity;
  for (int j = 0; j < count; ++j) {
    dots[j] = sums[2 + 2 * j];
    gram[(count - 1) * args.capacity + j] = gram[j * args.capacity + count - 1] = sums[3 + 2 * j];
  }
  const int64_t step = args.rows.counters[row * kCounters + kSteps];
  if (!broyden_inverse(args, gram, dots, count, step, weights, &plan.g_weight)) {
    count = 0;
    plan.g_weight = 1.0;
  }
  const double beta = damping_at(args.damping, args.damping_length, step);
  for (int j = 0; j < count; ++j) weights[j] *= beta;
  plan.count = count;
  plan.g_weight *= beta;
  broyden_finish(args, row, count);
  return plan;
}

}  // namespace deqcore
