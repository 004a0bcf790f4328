// Arguments and small algebra of anderson_step, for host and device. Oracle, sources and meaning:
// deqcore/ops/anderson_step.py.
#pragma once

#include <cstdint>
#include <tuple>

#include "ops/dtype.h"
#include "ops/numbers.h"
#include "ops/rows.h"

namespace deqcore {

constexpr int kAndersonMaxMemory = 64;
// A squared difference below this share of the two squared residuals is rounding.
constexpr double kAndersonNoise = 1e-14;
constexpr double kAndersonPivot = 1e-14;

#define DEQCORE_ANDERSON_OPTIONS(number)                                                          \
  number(double, ridge) number(int64_t, start) number(int64_t, restart) number(double, safeguard) \
      number(double, max_weight)
DEQCORE_NUMBERS(AndersonOptions, DEQCORE_ANDERSON_OPTIONS)
using AndersonNumbers = std::tuple<RowLimits, AndersonOptions>;

// All contiguous. f and z_next are of `type` ("F"), other state-sized tensors of what it is
// computed as
// ("X": float or double).
struct AndersonArgs {
  const void* x;          // X [B, D]
  const void* f;          // F [B, D]
  const double* damping;  // [damping_length]
  void* g_ring;           // X [B, M, D]
  void* h_ring;           // X [B, M, D]
  double* gram;           // [B, M, M]
  void* best;             // X [B, D], or null while no best iterate can leave the ring
  void* x_next;           // X [B, D]
  void* z_next;           // F [B, D], or null where F is X
  Rows rows;
  int64_t batch, dim, memory, damping_length;
  RowLimits limits;
  AndersonOptions options;
  Dtype type;  // F; X is Compute<F>
};

// What to write into x_next of one row.
enum class AndersonMove {
  copy_x,         // the row converged, ended on its best iterate, or is frozen
  best_in_ring,   // h - damping * g of slot `slot`
  best_kept,      // the copy that left the ring
  plain_in_ring,  // h of slot `slot`
  mix,            // sum_i alpha_i h_i
};

struct AndersonPlan {
  AndersonMove move;
  int32_t slot;
  double damping;  // of that slot
};

// How many of the newest slots a step may mix: this one included, 1 for a fresh start.
DEQCORE_HD int64_t anderson_history(const AndersonArgs& args, int64_t row) {
  const int32_t* counters = args.rows.counters + row * kCounters;
  const int64_t step = counters[kSteps] + 1;
  const AndersonOptions& options = args.options;
  if (step <= options.start || row_rests(counters)) return 1;
  if (options.restart > 0 && (step - 1) % options.restart == 0) return 1;
  const int64_t history = counters[kHistory] + 1;
  return history < args.memory ? history : args.memory;
}

// Whether the slot that the row's coming step overwrites holds its best iterate.
DEQCORE_HD bool anderson_evicts_best(const AndersonArgs& args, int64_t row) {
  const int32_t* counters = args.rows.counters + row * kCounters;
  const int64_t step = counters[kSteps] + 1;
  return args.best != nullptr && step > args.memory && counters[kBestStep] == step - args.memory;
}

// Solves (A + ridge I) gamma = b for the newest `count` differences of consecutive residuals,
// scaled to unit norm; by_age(i, j) is the inner product of the residuals of ages i and j.
// Dependent columns get gamma 0. kSize bounds count.
template <int kSize, typename ByAge>
DEQCORE_HD void anderson_least_squares(const ByAge& by_age, int count, double ridge,
                                       double (&gamma)[kSize]) {
  double unit[kSize];
  double factor[kSize][kSize];
  double inverse[kSize];
  for (int i = 0; i < count; ++i) {
    const double size = by_age(i, i) - by_age(i, i + 1) - by_age(i + 1, i) + by_age(i + 1, i + 1);
    const double noise = kAndersonNoise * (by_age(i, i) + by_age(i + 1, i + 1));
    unit[i] = size > noise ? 1 / sqrt(size) : 0.0;
  }
  // Row i of the Cholesky factor, then its forward substitution.
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = (by_age(i, j) - by_age(i, j + 1) - by_age(i + 1, j) + by_age(i + 1, j + 1)) *
                   unit[i] * unit[j];
      if (i == j) sum += ridge;
      for (int k = 0; k < j; ++k) sum -= factor[i][k] * factor[j][k];
      if (j < i) {
        factor[i][j] = sum * inverse[j];
      } else {
        inverse[i] = unit[i] > 0 && sum > kAndersonPivot ? 1 / sqrt(sum) : 0.0;
      }
    }
    double right = (by_age(0, i) - by_age(0, i + 1)) * unit[i];
    for (int k = 0; k < i; ++k) right -= factor[i][k] * gamma[k];
    gamma[i] = right * inverse[i];
  }
  for (int i = count - 1; i >= 0; --i) {
    for (int k = i + 1; k < count; ++k) gamma[i] -= factor[k][i] * gamma[k];
    gamma[i] *= inverse[i];
  }
  for (int i = 0; i < count; ++i) gamma[i] *= unit[i];
}

// alpha by age from gamma; false if a weight is above the cap or not a number.
template <int kSize>
DEQCORE_HD bool anderson_to_weights(const double (&gamma)[kSize], int history, int used,
                                    double max_weight, double* alpha) {
  bool fine = true;
  for (int i = 0; i < history; ++i) {
    const double newer = i == 0 ? 1.0 : (i - 1 < used ? gamma[i - 1] : 0.0);
    alpha[i] = newer - (i < used ? gamma[i] : 0.0);
    fine = fine && fabs(alpha[i]) <= max_weight;
  }
  return fine;
}

// Mixing weights by age, alpha[0 .. history); they sum to one.
template <int kSize, typename ByAge>
DEQCORE_HD void anderson_weights(const ByAge& by_age, int history, double ridge, double max_weight,
                                 double* alpha) {
  double gamma[kSize];
  for (int used = history - 1; used > 0; used = used > 1 ? 1 : 0) {
    anderson_least_squares<kSize>(by_age, used, ridge, gamma);
    if (anderson_to_weights(gamma, history, used, max_weight, alpha)) return;
  }
  for (int i = 0; i < history; ++i) alpha[i] = i == 0 ? 1.0 : 0.0;
}

// Counts the evaluation and decides the row's move; for `mix` the weights follow.
DEQCORE_HD AndersonPlan anderson_plan(const AndersonArgs& args, int64_t row, int64_t history,
                                      double sum_g2, double sum_f2) {
  int32_t* counters = args.rows.counters + row * kCounters;
  const bool was_mixed = counters[kMixed] >= 2;
  const RowOutcome outcome =
      advance_row(args.rows, row, sum_g2, sum_f2, args.dim, args.limits, was_mixed);
  const int32_t best_step = counters[kBestStep];
  const int64_t best_index = best_step > 0 ? best_step - 1 : 0;
  const int32_t best_slot = static_cast<int32_t>(best_index % args.memory);
  const bool kept_in_ring = outcome.step - best_step < args.memory || args.best == nullptr;
  const double best_damping = damping_at(args.damping, args.damping_length, best_step);

  counters[kHistory] = 0;
  counters[kMixed] = 0;
  if (!outcome.going_on) {
    if (!outcome.ended || outcome.improved || best_step == 0) {
      return {AndersonMove::copy_x, 0, 0.0};
    }
    const AndersonMove move = kept_in_ring ? AndersonMove::best_in_ring : AndersonMove::best_kept;
    return {move, best_slot, best_damping};
  }
  const double* residuals = args.rows.residuals + row * kResiduals;
  const bool worse = residuals[kLatest] > args.options.safeguard * residuals[kBest];
  const bool rejected = was_mixed && worse && counters[kFallbackStep] != best_step;
  if (rejected) counters[kFallbackStep] = best_step;
  if (rejected || outcome.retreats) {
    const AndersonMove move = kept_in_ring ? AndersonMove::plain_in_ring : AndersonMove::best_kept;
    return {move, best_slot, best_damping};
  }
  counters[kHistory] = static_cast<int32_t>(history);
  return {AndersonMove::mix, 0, 0.0};
}

}  // namespace deqcore
