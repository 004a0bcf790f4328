// Vectors of N numbers, whatever the instruction set: the arithmetic of the masked matmuls. Include
// in kernels only.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/masked.h"

namespace deqcore::cpu::DEQCORE_ISA::masked {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type in which tensors of type S are summed.
template <typename S>
struct SumOf {
  typedef float type;
};
template <>
struct SumOf<double> {
  typedef double type;
};
template <typename S>
using Sum = typename SumOf<S>::type;

template <typename To, typename From>
[[gnu::always_inline]] inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T, int N>
[[gnu::always_inline]] inline Vector<T, N> load(const T* from) {
  Vector<T, N> out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

template <typename T, int N>
[[gnu::always_inline]] inline void store(T* to, Vector<T, N> value) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename T, int N, int... I>
[[gnu::always_inline]] inline Vector<T, N> broadcast(T value, std::integer_sequence<int, I...>) {
  return Vector<T, N>{(static_cast<void>(I), value)...};
}

template <typename T, int N>
[[gnu::always_inline]] inline Vector<T, N> broadcast(T value) {
  return broadcast<T, N>(value, std::make_integer_sequence<int, N>());
}

// a * b + c, rounded once where the instruction set has it.
template <typename T, int N>
[[gnu::always_inline]] inline Vector<T, N> fma(Vector<T, N> a, Vector<T, N> b, Vector<T, N> c) {
  typedef Vector<T, N> V;
  [[maybe_unused]] constexpr bool kSingle = sizeof(T) == 4;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && kSingle) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  } else
#endif
#if defined(__FMA__)
      if constexpr (sizeof(V) == 32 && kSingle) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  } else if constexpr (sizeof(V) == 16 && kSingle) {
    return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  } else if constexpr (sizeof(V) == 16) {
    return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
  } else
#endif
  {
    V out;
    for (int i = 0; i < N; ++i) out[i] = multiply_add(a[i], b[i], c[i]);
    return out;
  }
}

// N stored numbers as the type they are summed in.
template <typename S, int N>
[[gnu::always_inline]] inline Vector<Sum<S>, N> load_sum(const S* from) {
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    return load<S, N>(from);
  } else {
    const auto bits = load<uint16_t, N>(reinterpret_cast<const uint16_t*>(from));
    if constexpr (__is_same(S, BFloat16)) {
      const auto wide = __builtin_convertvector(bits, Vector<uint32_t, N>) << 16;
      return bit_cast<Vector<float, N>>(wide);
    } else {
#if defined(__AVX512F__)
      if constexpr (N == 16) {
        return (Vector<float, N>)_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits));
      } else
#endif
#if defined(__F16C__)
          if constexpr (N == 8) {
        return (Vector<float, N>)_mm256_cvtph_ps(bit_cast<__m128i>(bits));
      } else
#endif
      {
        Vector<float, N> out;
        for (int i = 0; i < N; ++i) {
          out[i] = static_cast<float>(bit_cast<_Float16>(static_cast<uint16_t>(bits[i])));
        }
        return out;
      }
    }
  }
}

// Rounds to nearest, ties to even, as torch does.
template <typename S, int N>
[[gnu::always_inline]] inline void store_sum(S* to, Vector<Sum<S>, N> value) {
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    store<S, N>(to, value);
  } else if constexpr (__is_same(S, BFloat16)) {
    const auto bits = bit_cast<Vector<uint32_t, N>>(value);
    const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto chosen = nan ? Vector<uint32_t, N>{} + 0x7fc0u : rounded;
    store<uint16_t, N>(reinterpret_cast<uint16_t*>(to),
                       __builtin_convertvector(chosen, Vector<uint16_t, N>));
  } else {
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
      return std::memcpy(bits, &half, sizeof(half)), void();
    } else
#endif
#if defined(__F16C__)
        if constexpr (N == 8) {
      const __m128i half = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
      return std::memcpy(bits, &half, sizeof(half)), void();
    } else
#endif
    {
      for (int i = 0; i < N; ++i) bits[i] = bit_cast<uint16_t>(static_cast<_Float16>(value[i]));
    }
  }
}

template <typename S>
inline Sum<S> to_sum(S value) {
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    return value;
  } else if constexpr (__is_same(S, BFloat16)) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
  } else {
    return static_cast<float>(bit_cast<_Float16>(value.bits));
  }
}

template <typename S>
inline S from_sum(Sum<S> value) {
  if constexpr (sizeof(S) == sizeof(Sum<S>)) {
    return value;
  } else {
    S numbers[4];
    store_sum<S, 4>(numbers, broadcast<float, 4>(value));
    return numbers[0];
  }
}

// The first `count` of N numbers; the others are zero, and are not read.
template <typename S, int N>
inline Vector<Sum<S>, N> load_part(const S* from, int64_t count) {
  S numbers[N] = {};
  std::memcpy(numbers, from, count * sizeof(S));
  return load_sum<S, N>(numbers);
}

template <typename S, int N>
inline void store_part(S* to, Vector<Sum<S>, N> value, int64_t count) {
  S numbers[N];
  store_sum<S, N>(numbers, value);
  std::memcpy(to, numbers, count * sizeof(S));
}

template <typename T, int N, int... I>
[[gnu::always_inline]] inline Vector<T, N> interleave_low(Vector<T, N> a, Vector<T, N> b,
                                                          std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * N + I / 2)...);
}

template <typename T, int N, int... I>
[[gnu::always_inline]] inline Vector<T, N> interleave_high(Vector<T, N> a, Vector<T, N> b,
                                                           std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * N + (N + I) / 2)...);
}

// Transposes N vectors of N. Interleaving row i with row i + N/2, log2(N) times, moves each bit of
// the row number into the column number and back.
template <typename T, int N>
[[gnu::always_inline]] inline void transpose(Vector<T, N> (&rows)[N]) {
  constexpr std::make_integer_sequence<int, N> kIndices;
#pragma GCC unroll 4
  for (int stage = 1; stage < N; stage *= 2) {
    Vector<T, N> next[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleave_low<T, N>(rows[i], rows[i + N / 2], kIndices);
      next[2 * i + 1] = interleave_high<T, N>(rows[i], rows[i + N / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) rows[i] = next[i];
  }
}

template <typename T, int N, int... I>
[[gnu::always_inline]] inline Vector<T, N / 2> add_halves(Vector<T, N> a,
                                                          std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, a, I...) + __builtin_shufflevector(a, a, (I + N / 2)...);
}

template <typename T, int N>
[[gnu::always_inline]] inline void add_quarters(Vector<T, N> a, T* totals) {
  if constexpr (N == 4) {
    store<T, 4>(totals, a);
  } else {
    const auto halved = add_halves<T, N>(a, std::make_integer_sequence<int, N / 2>());
    add_quarters<T, N / 2>(halved, totals);
  }
}

// The sum of the lanes of each of four vectors.
template <typename T, int N>
[[gnu::always_inline]] inline void add_lanes(const Vector<T, N> (&sums)[4], T (&totals)[4]) {
  constexpr std::make_integer_sequence<int, N> kIndices;
  if constexpr (N == 2) {
    for (int i = 0; i < 4; ++i) totals[i] = sums[i][0] + sums[i][1];
  } else {
    // Twice, the halves of two vectors are added and interleaved into one; then lane i belongs to
    // vector i % 4.
    const auto even = interleave_low<T, N>(sums[0], sums[2], kIndices) +
                      interleave_high<T, N>(sums[0], sums[2], kIndices);
    const auto odd = interleave_low<T, N>(sums[1], sums[3], kIndices) +
                     interleave_high<T, N>(sums[1], sums[3], kIndices);
    add_quarters<T, N>(
        interleave_low<T, N>(even, odd, kIndices) + interleave_high<T, N>(even, odd, kIndices),
        totals);
  }
}

// Memory for vectors, not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T) + kVectorBytes, kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// Fetches a matrix into the cache line by line, spread over other work.
class Ahead {
 public:
  Ahead(const void* from, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t calls)
      : line_(static_cast<const char*>(from)),
        skip_(stride_bytes - row_bytes),
        row_bytes_(row_bytes),
        row_end_(line_ + row_bytes),
        end_(rows > 0 ? line_ + (rows - 1) * stride_bytes + row_bytes : line_),
        lines_(calls > 0 ? (rows * (row_bytes / 64 + 1) + calls - 1) / calls : 0) {}

  template <bool kToWrite>
  [[gnu::always_inline]] void fetch() {
    for (int64_t i = 0; i < lines_ && line_ < end_; ++i) {
      __builtin_prefetch(line_, kToWrite);
      line_ += 64;
      if (line_ >= row_end_) {
        line_ = row_end_ + skip_;
        row_end_ = line_ + row_bytes_;
      }
    }
  }

 private:
  const char* line_;
  int64_t skip_, row_bytes_;
  const char *row_end_, *end_;
  int64_t lines_;  // at each call
};

// out [columns, W] = source [tokens, stride], columns first to last; missing tokens become zero.
template <typename S, int N, int W>
void transpose_in(const S* source, int64_t stride, int64_t tokens, int64_t columns, Sum<S>* out) {
  typedef Sum<S> T;
  for (int64_t c = 0; c < columns; c += N) {
    const int64_t count = columns - c < N ? columns - c : N;
    for (int64_t t = 0; t < W; t += N) {
      Vector<T, N> rows[N];
      if (count == N && t + N <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) rows[i] = load_sum<S, N>(source + (t + i) * stride + c);
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
void transpose_out(const Sum<S>* sums, int64_t columns, S* target, int64_t stride, int64_t tokens) {
  typedef Sum<S> T;
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
        for (int i = 0; i < N; ++i) store_sum<S, N>(target + (t + i) * stride + c, rows[i]);
      } else {
        for (int i = 0; i < N && t + i < tokens; ++i) {
          store_part<S, N>(target + (t + i) * stride + c, rows[i], count);
        }
      }
    }
  }
}

// Calls run.operator()<S>() for the type of the tensors.
template <typename Run>
void with_value_type(ValueType type, const Run& run) {
  switch (type) {
    case ValueType::f64:
      return run.template operator()<double>();
    case ValueType::f32:
      return run.template operator()<float>();
    case ValueType::bf16:
      return run.template operator()<BFloat16>();
    case ValueType::f16:
      return run.template operator()<Half>();
  }
}

}  // namespace deqcore::cpu::DEQCORE_ISA::masked
