// The per-row state machine of a solve, for host and device; deqcore/ops/_rows.py is its oracle.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/host_device.h"
#include "ops/numbers.h"

namespace deqcore {

enum Status : int8_t {
  kActive = -1,
  kConverged = 0,
  kMaxSteps = 1,
  kStalled = 2,
  kDiverged = 3,
  kNonfinite = 4,
};

// Columns of counters, int32 [B, kCounters], and of residuals, double [B, kResiduals].
enum Counter {
  kSteps,
  kHistory,
  kBestStep,
  kFallbackStep,
  kMixed,
  kLastMixed,    // the newest step that mixed; 0: none since the last retreat
  kRetreatStep,  // the last retreat
  kRest,         // how many steps after it are plain at least
  kCounters
};
enum Residual { kLatest, kBest, kFirst, kResiduals };

constexpr double kDivergence = 1e8;  // a residual this many times the first one ends the row
// A retreat is followed by this many plain steps for each evaluation that it has lost, and by this
// many times the last rest where mixing has gained less than that since.
constexpr int64_t kRestFactor = 4;
constexpr int64_t kLongestRest = int64_t{1} << 30;

#define DEQCORE_ROW_LIMITS(number) \
  number(double, rtol) number(double, atol) number(int64_t, patience) number(int64_t, max_steps)
DEQCORE_NUMBERS(RowLimits, DEQCORE_ROW_LIMITS)

// Status and counters of all rows.
struct Rows {
  int8_t* status;
  int32_t* counters;
  double* residuals;
  int32_t* remaining;  // rows still active
};

// What one evaluation means for a row that was active.
struct RowOutcome {
  int32_t step;   // evaluations so far, this one included
  bool going_on;  // it takes another step
  bool improved;  // its residual is the best so far
  bool ended;     // it ended now, without converging: it returns its best iterate
  bool retreats;  // it goes on from its best iterate, with nothing stored
};

DEQCORE_HD double row_rms(double sum_of_squares, int64_t dim) {
  return sqrt(sum_of_squares / static_cast<double>(dim > 0 ? dim : 1));
}

// Whether an active row's coming step has to be plain.
DEQCORE_HD bool row_rests(const int32_t* counters) {
  return counters[kSteps] < int64_t{counters[kRetreatStep]} + counters[kRest] ||
         counters[kRetreatStep] > counters[kBestStep];
}

// Writes down that the evaluation just counted sends the row back to its best iterate.
DEQCORE_HD void retreat_row(int32_t* counters) {
  const int64_t best_step = counters[kBestStep], last_rest = counters[kRest];
  const int64_t gained = best_step - (counters[kRetreatStep] + last_rest);
  int64_t rest = kRestFactor * (counters[kSteps] - best_step);
  if (gained < rest && rest < kRestFactor * last_rest) rest = kRestFactor * last_rest;
  counters[kRest] = static_cast<int32_t>(rest < kLongestRest ? rest : kLongestRest);
  counters[kRetreatStep] = counters[kSteps];
  counters[kLastMixed] = 0;
}

// Counts one evaluation of an active row, from the squared norms of f(z) - z and of f(z); `mixed`:
// whether the step to z was other than plain.
DEQCORE_HD RowOutcome advance_row(const Rows& rows, int64_t row, double sum_g2, double sum_f2,
                                  int64_t dim, const RowLimits& limits, bool mixed) {
  int32_t* counters = rows.counters + row * kCounters;
  double* residuals = rows.residuals + row * kResiduals;
  const double residual = row_rms(sum_g2, dim);
  const double scale = row_rms(sum_f2, dim);
  const bool finite = std::isfinite(residual) && std::isfinite(scale);

  const int32_t step = ++counters[kSteps];
  residuals[kLatest] = residual;
  if (step == 1) residuals[kFirst] = residual;
  const bool converged = finite && residual <= limits.atol + limits.rtol * scale;
  const bool improved = converged || (finite && residual < residuals[kBest]);
  if (improved) counters[kBestStep] = step;
  if (improved || counters[kBestStep] == 0) residuals[kBest] = residual;

  if (mixed) counters[kLastMixed] = step - 1;
  const int32_t best_step = counters[kBestStep], retreat = counters[kRetreatStep];
  int8_t failure = kActive;
  if (!finite) {
    failure = kNonfinite;
  } else if (residual > kDivergence * residuals[kFirst]) {
    failure = kDiverged;
  } else if (step - (best_step > retreat ? best_step : retreat) >= limits.patience) {
    failure = kStalled;
  }
  // Only plain steps can fail: what mixing has led to since the best iterate is taken back.
  const bool can_retreat = counters[kLastMixed] > 0 && counters[kLastMixed] >= best_step;
  int8_t status = kActive;
  if (converged) {
    status = kConverged;
  } else if (failure != kActive && !can_retreat) {
    status = failure;
  } else if (step >= limits.max_steps) {
    status = kMaxSteps;
  }
  rows.status[row] = status;
  const bool retreats = status == kActive && failure != kActive;
  if (retreats) retreat_row(counters);
  return {step, status == kActive, improved, status != kActive && !converged, retreats};
}

// The damping of a step (1, 2, ...); the table's last entry holds for all later steps.
DEQCORE_HD double damping_at(const double* table, int64_t length, int64_t step) {
  const int64_t index = step - 1 < length ? step - 1 : length - 1;
  return table[index > 0 ? index : 0];
}

}  // namespace deqcore
