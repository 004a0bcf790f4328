// Masked matmuls by blocks of 16, 32 or 64 on tensor cores, for bfloat16 and float16.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/masked_layout.h"
#include "cuda/mma.cuh"
#include "cuda/team.cuh"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// A warp's part of the operands of 16 tokens (or other numbers that are summed over), from rows in
// shared memory. kTurned: the rows are those numbers; else they are columns.

// Operand a: 16 of its rows from `first` on, at `k` of the numbers that are summed over.
template <int kRowBytes, bool kTurned>
DEQCORE_DEVICE void load_a(uint32_t (&out)[4], const char* rows, int first, int k, int lane) {
  using Rows = BankedRows<kRowBytes>;
  const int row = kTurned ? k + lane / 16 * 8 + lane % 8 : first + lane % 16;
  const int piece = kTurned ? first / 8 + lane / 8 % 2 : k / 8 + lane / 16;
  load_tiles<kTurned>(out, rows + Rows::place(row, piece));
}

// Operand b: 16 of its columns from `first` on: words 0 and 1 for the first 8, 2 and 3 for the
// others.
template <int kRowBytes, bool kTurned>
DEQCORE_DEVICE void load_b(uint32_t (&out)[4], const char* rows, int first, int k, int lane) {
  using Rows = BankedRows<kRowBytes>;
  const int row = kTurned ? k + lane / 8 % 2 * 8 + lane % 8 : first + lane / 16 * 8 + lane % 8;
  const int piece = kTurned ? first / 8 + lane / 16 : k / 8 + lane / 8 % 2;
  load_tiles<kTurned>(out, rows + Rows::place(row, piece));
}

// A tile [16 kRows x 16 kColumns] that a warp sums up.
template <typename S, int kRows, int kColumns>
struct WarpTile {
  float sums[kRows][2 * kColumns][4];

  DEQCORE_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }

  // Adds the product over 16 numbers from k on.
  template <int kRowBytes, bool kTurnedA, bool kTurnedB>
  DEQCORE_DEVICE void add(const char* a_rows, int a_first, const char* b_rows, int b_first, int k,
                          int lane) {
    uint32_t b[kColumns][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      load_b<kRowBytes, kTurnedB>(b[n], b_rows, b_first + 16 * n, k, lane);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      uint32_t a[4];
      load_a<kRowBytes, kTurnedA>(a, a_rows, a_first + 16 * m, k, lane);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        multiply_tiles<S>(sums[m][2 * n], a, b[n][0], b[n][1]);
        multiply_tiles<S>(sums[m][2 * n + 1], a, b[n][2], b[n][3]);
      }
    }
  }

  // Adds bias[column] to every row.
  DEQCORE_DEVICE void add_to_columns(int lane, const S* bias) {
#pragma unroll
    for (int n = 0; n < 2 * kColumns; ++n) {
      const float pair[2] = {to_compute(bias[8 * n + lane % 4 * 2]),
                             to_compute(bias[8 * n + lane % 4 * 2 + 1])};
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += pair[i % 2];
      }
    }
  }

  // Calls put(row, column, pair of neighbours) for what this lane has.
  template <typename Put>
  DEQCORE_DEVICE void each_pair(int lane, const Put& put) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kColumns; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const pair = &sums[m][n][2 * half];
          put(16 * m + lane / 4 + 8 * half, 8 * n + lane % 4 * 2,
              Pack<S, 2>{{from_compute<S>(pair[0]), from_compute<S>(pair[1])}});
        }
      }
    }
  }
};

}  // namespace deqcore::cuda
