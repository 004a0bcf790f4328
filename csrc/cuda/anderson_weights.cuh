// The mixing weights of anderson_step, worked out by one warp, or where they are few by one thread.
// The problem and its safeguards are those of ops/anderson_step.h; here each lane holds a row of
// the matrix, so that the longest chain of dependent operations grows with the memory and not with
// its cube.
#pragma once

#include "cuda/team.cuh"
#include "ops/anderson_step.h"

namespace deqcore::cuda {

// Differences of consecutive residuals that a lane keeps as a row of registers.
constexpr int kRegisterColumns = 7;

// Inner products of residuals by age, in shared memory.
struct ByAge {
  double* at;
  int stride;

  DEQCORE_DEVICE double& operator()(int i, int j) const { return at[i * stride + j]; }
  // Inner product of differences i and j.
  DEQCORE_DEVICE double of_differences(int i, int j) const {
    return ((*this)(i, j) - (*this)(i + 1, j)) - ((*this)(i, j + 1) - (*this)(i + 1, j + 1));
  }
  // 1 / |difference i|, or 0 where that is rounding.
  DEQCORE_DEVICE double unit(int i) const {
    const double size = of_differences(i, i);
    const double noise = kAndersonNoise * ((*this)(i, i) + (*this)(i + 1, i + 1));
    return size > noise ? rsqrt(size) : 0.0;
  }
  DEQCORE_DEVICE double right(int i) const { return (*this)(0, i) - (*this)(0, i + 1); }
};

// 1 / sqrt of a pivot of the unit-diagonal matrix, or 0 for a column to drop.
DEQCORE_DEVICE double inverse_root(double unit, double pivot) {
  return unit > 0 && pivot > kAndersonPivot ? rsqrt(pivot) : 0.0;
}

// gamma for the newest difference alone.
DEQCORE_DEVICE double newest_gamma(const ByAge& by_age, double ridge) {
  const double unit = by_age.unit(0);
  const double inverse = inverse_root(unit, by_age.of_differences(0, 0) * unit * unit + ridge);
  return by_age.right(0) * unit * inverse * inverse * unit;
}

// Differences that one thread alone takes on, all in registers.
constexpr int kFewColumns = 4;

// gamma by one thread; columns from `count` on drop out.
DEQCORE_DEVICE void least_squares_of_few(const ByAge& by_age, int count, double ridge,
                                         double (&gamma)[kFewColumns]) {
  constexpr int kN = kFewColumns;
  double unit[kN], inverse[kN], factor[kN][kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) unit[i] = i < count ? by_age.unit(i) : 0.0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      factor[i][j] = i < count ? by_age.of_differences(i, j) * unit[i] * unit[j] : 0.0;
    }
    factor[i][i] += ridge;
    gamma[i] = i < count ? by_age.right(i) * unit[i] : 0.0;
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    inverse[j] = inverse_root(unit[j], factor[j][j]);
    gamma[j] *= inverse[j];
#pragma unroll
    for (int i = j + 1; i < kN; ++i) factor[i][j] *= inverse[j];
#pragma unroll
    for (int i = j + 1; i < kN; ++i) {
      gamma[i] -= factor[i][j] * gamma[j];
#pragma unroll
      for (int k = j + 1; k <= i; ++k) factor[i][k] -= factor[i][j] * factor[k][j];
    }
  }
#pragma unroll
  for (int j = kN - 1; j >= 0; --j) {
    gamma[j] *= inverse[j];
#pragma unroll
    for (int i = 0; i < j; ++i) gamma[i] -= factor[j][i] * gamma[j];
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) gamma[i] *= unit[i];
}

// alpha by age; false if a weight is above the cap or not a number.
DEQCORE_DEVICE bool weights_from(const double (&gamma)[kFewColumns], int history, double max_weight,
                                 double (&alpha)[kFewColumns + 1]) {
  bool fine = true;
#pragma unroll
  for (int age = 0; age <= kFewColumns; ++age) {
    const double newer = age == 0 ? 1.0 : gamma[age - 1];
    alpha[age] = newer - (age < kFewColumns ? gamma[age] : 0.0);
    fine = fine && (age >= history || fabs(alpha[age]) <= max_weight);
  }
  return fine;
}

// Mixing weights by age of at most kFewColumns + 1 slots, by one thread.
DEQCORE_DEVICE void weights_of_few(const ByAge& by_age, int history, const AndersonOptions& options,
                                   double (&alpha)[kFewColumns + 1]) {
  double gamma[kFewColumns] = {};
  if (history > 2) {
    least_squares_of_few(by_age, history - 1, options.ridge, gamma);
    if (weights_from(gamma, history, options.max_weight, alpha)) return;
  }
#pragma unroll
  for (int i = 0; i < kFewColumns; ++i) gamma[i] = 0.0;
  if (history > 1) gamma[0] = newest_gamma(by_age, options.ridge);
  if (weights_from(gamma, history, options.max_weight, alpha)) return;
#pragma unroll
  for (int age = 0; age <= kFewColumns; ++age) alpha[age] = age == 0 ? 1.0 : 0.0;
}

// Cholesky of the first `count` <= kRegisterColumns differences; lane i holds row i.
DEQCORE_DEVICE void least_squares_in_registers(int lane, const ByAge& by_age, int count,
                                               double ridge, double* gamma) {
  constexpr int kN = kRegisterColumns;
  const bool mine = lane < count;
  const double unit = mine ? by_age.unit(lane) : 0.0;
  double right = mine ? by_age.right(lane) * unit : 0.0;
  double row[kN];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const double unit_j = __shfl_sync(kWholeWarp, unit, j);
    const bool inside = mine && j < count;
    row[j] = inside ? by_age.of_differences(lane, j) * unit * unit_j : 0.0;
    if (lane == j) row[j] += ridge;
  }
  double inverse = 0.0, y = 0.0;  // of this lane's own column
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if (j >= count) break;
    const double pivot = __shfl_sync(kWholeWarp, row[j], j);
    const double inverse_j = inverse_root(__shfl_sync(kWholeWarp, unit, j), pivot);
    const double y_j = __shfl_sync(kWholeWarp, right, j) * inverse_j;
    if (lane == j) {
      inverse = inverse_j;
      y = y_j;
    }
    const double column = lane > j ? row[j] * inverse_j : 0.0;
    right -= column * y_j;
#pragma unroll
    for (int k = j + 1; k < kN; ++k) row[k] -= column * __shfl_sync(kWholeWarp, column, k);
    row[j] = column;  // below the diagonal, the factor
  }
  double solved = 0.0;
#pragma unroll
  for (int j = kN - 1; j >= 0; --j) {
    if (j >= count) continue;
    double tail = row[j] * solved;  // row[j] is 0 in lanes up to j and beyond count
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
      tail += __shfl_xor_sync(kWholeWarp, tail, distance);
    }
    if (lane == j) solved = (y - tail) * inverse;
  }
  if (mine) gamma[lane] = solved * unit;
  __syncwarp();
}

// The same for any count; overwrites by_age. unit and inverse are scratch.
DEQCORE_DEVICE void least_squares_in_shared(int lane, const ByAge& by_age, int count, double ridge,
                                            double* gamma, double* unit, double* inverse) {
  for (int i = lane; i < count; i += kWarp) {
    unit[i] = by_age.unit(i);
    gamma[i] = by_age.right(i) * unit[i];
  }
  __syncwarp();
  for (int j = lane; j <= count; j += kWarp) {
    for (int i = 0; i < count; ++i) by_age(i, j) -= by_age(i + 1, j);
  }
  __syncwarp();
  for (int i = lane; i < count; i += kWarp) {
    for (int j = 0; j < count; ++j) {
      by_age(i, j) = (by_age(i, j) - by_age(i, j + 1)) * unit[i] * unit[j];
    }
    by_age(i, i) += ridge;
  }
  __syncwarp();
  for (int j = 0; j < count; ++j) {
    const double inverse_j = inverse_root(unit[j], by_age(j, j));
    const double y_j = gamma[j] * inverse_j;
    __syncwarp();
    for (int i = lane; i < count; i += kWarp) {
      if (i == j) {
        gamma[j] = y_j;
        inverse[j] = inverse_j;
      } else if (i > j) {
        by_age(i, j) *= inverse_j;
        gamma[i] -= by_age(i, j) * y_j;
      }
    }
    __syncwarp();
    for (int i = lane; i < count; i += kWarp) {
      for (int k = j + 1; k <= i; ++k) by_age(i, k) -= by_age(i, j) * by_age(k, j);
    }
    __syncwarp();
  }
  for (int j = count - 1; j >= 0; --j) {
    const double solved = gamma[j] * inverse[j];
    __syncwarp();
    if (lane == 0) gamma[j] = solved;
    for (int i = lane; i < j; i += kWarp) gamma[i] -= by_age(j, i) * solved;
    __syncwarp();
  }
  for (int i = lane; i < count; i += kWarp) gamma[i] *= unit[i];
  __syncwarp();
}

// alpha by age from the first `used` gamma; false if a weight is above the cap or not a number.
DEQCORE_DEVICE bool to_weights(int lane, const double* gamma, int history, int used,
                               double max_weight, double* alpha) {
  bool fine = true;
  for (int age = lane; age < history; age += kWarp) {
    const double newer = age == 0 ? 1.0 : (age - 1 < used ? gamma[age - 1] : 0.0);
    alpha[age] = newer - (age < used ? gamma[age] : 0.0);
    fine = fine && fabs(alpha[age]) <= max_weight;
  }
  __syncwarp();
  return __all_sync(kWholeWarp, fine);
}

// Mixing weights by age, alpha[0 .. history); overwrites by_age.
DEQCORE_DEVICE void weights_by_warp(int lane, const ByAge& by_age, int history,
                                    const AndersonOptions& options, double* gamma, double* alpha,
                                    double* unit, double* inverse) {
  const int count = history - 1;
  const double secant = count > 0 ? newest_gamma(by_age, options.ridge) : 0.0;
  if (count > 1) {
    if (count <= kRegisterColumns) {
      least_squares_in_registers(lane, by_age, count, options.ridge, gamma);
    } else {
      __syncwarp();
      least_squares_in_shared(lane, by_age, count, options.ridge, gamma, unit, inverse);
    }
    if (to_weights(lane, gamma, history, count, options.max_weight, alpha)) return;
  }
  if (count > 0) {
    if (lane == 0) gamma[0] = secant;
    __syncwarp();
    if (to_weights(lane, gamma, history, 1, options.max_weight, alpha)) return;
  }
  for (int age = lane; age < history; age += kWarp) alpha[age] = age == 0 ? 1.0 : 0.0;
  __syncwarp();
}

}  // namespace deqcore::cuda
