// Tiles of tokens turned round, so that a column of them is contiguous: how the masked matmuls read
// and write matrices. Include in kernels only.
#pragma once

#include <cstdint>
#include <new>

#include "cpu/simd.h"

namespace deqcore::cpu::DEQCORE_ISA {

// Memory for vectors, not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T) + kRegisterBytes, kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// out [columns, W] = source [tokens, stride], columns first to last; missing tokens become zero.
template <typename S, int N, int W>
void transpose_in(const S* source, int64_t stride, int64_t tokens, int64_t columns,
                  Compute<S>* out) {
  typedef Compute<S> T;
  for (int64_t c = 0; c < columns; c += N) {
    const int64_t count = columns - c < N ? columns - c : N;
    for (int64_t t = 0; t < W; t += N) {
      Vector<T, N> rows[N];
      if (count == N && t + N <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = load_as<Compute<S>, N>(source + (t + i) * stride + c);
      } else {
        for (int i = 0; i < N; ++i) {
          rows[i] = t + i < tokens ? load_part<S, N>(source + (t + i) * stride + c, count)
                                   : Vector<T, N>{};
        }
      }
      transpose<T, N>(rows);
      if (count == N) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store<T, N>(out + (c + i) * W + t, rows[i]);
      } else {
        for (int i = 0; i < count; ++i) store<T, N>(out + (c + i) * W + t, rows[i]);
      }
    }
  }
}

// The way back: target [tokens, stride] = sums [columns, W].
template <typename S, int N, int W>
void transpose_out(const Compute<S>* sums, int64_t columns, S* target, int64_t stride,
                   int64_t tokens) {
  typedef Compute<S> T;
  for (int64_t c = 0; c < columns; c += N) {
    const int64_t count = columns - c < N ? columns - c : N;
    for (int64_t t = 0; t < tokens; t += N) {
      Vector<T, N> rows[N];
      for (int i = 0; i < N; ++i) {
        rows[i] = i < count ? load<T, N>(sums + (c + i) * W + t) : Vector<T, N>{};
      }
      transpose<T, N>(rows);
      if (count == N && t + N <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) store_as<S, N>(target + (t + i) * stride + c, rows[i]);
      } else {
        for (int i = 0; i < N && t + i < tokens; ++i) {
          store_part<S, N>(target + (t + i) * stride + c, rows[i], count);
        }
      }
    }
  }
}

}  // namespace deqcore::cpu::DEQCORE_ISA
