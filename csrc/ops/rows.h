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
enum Counter { kSteps, kHistory, kBestStep, kFallbackStep, kMixed, kCounters };
enum Residual { kLatest, kBest, kFirst, kResiduals };

constexpr double kDivergence = 1e8;  // a residual this many times the first one ends the row

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
};

DEQCORE_HD double row_rms(double sum_of_squares, int64_t dim) {
  return sqrt(sum_of_squares / static_cast<double>(dim > 0 ? dim : 1));
}

// Counts one evaluation of an active row, from the squared norms of f(z) - z and of f(z).
DEQCORE_HD RowOutcome advance_row(const Rows& rows, int64_t row, double sum_g2, double sum_f2,
                                  int64_t dim, const RowLimits& limits) {
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

  int8_t status = kActive;
  if (converged) {
    status = kConverged;
  } else if (!finite) {
    status = kNonfinite;
  } else if (residual > kDivergence * residuals[kFirst]) {
    status = kDiverged;
  } else if (step - counters[kBestStep] >= limits.patience) {
    status = kStalled;
  } else if (step >= limits.max_steps) {
    status = kMaxSteps;
  }
  rows.status[row] = status;
  return {step, status == kActive, improved, status != kActive && !converged};
}

// The damping of a step (1, 2, ...); the table's last entry holds for all later steps.
DEQCORE_HD double damping_at(const double* table, int64_t length, int64_t step) {
  const int64_t index = step - 1 < length ? step - 1 : length - 1;
  return table[index > 0 ? index : 0];
}

}  // namespace deqcore
