// Vectors of N numbers, whatever the instruction set: what the kernels compute with. Include in
// kernels only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "ops/dtype.h"

namespace deqcore::cpu::DEQCORE_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

// Numbers of type T in a register.
template <typename T>
constexpr int kLanes = kRegisterBytes / sizeof(T);

// body(k) for k = 0 .. kCount - 1 with k known to the compiler, so that arrays stay in registers.
template <int kCount, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, k>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

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

// a * b + c, rounded once where the instruction set has a fused multiply-add. The compiler fuses
// nothing of its own accord (-ffp-contract=off), so that a sum does not depend on its taste.
template <typename T>
[[gnu::always_inline]] inline T multiply_add(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

template <typename T, int N>
[[gnu::always_inline]] inline Vector<T, N> multiply_add(Vector<T, N> a, Vector<T, N> b,
                                                        Vector<T, N> c) {
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

// By name: GCC converts a vector in halves. (Intrinsics with a mask of ones, here and below,
// because GCC warns of the others: they begin with a register that has no value.)
template <int N>
[[gnu::always_inline]] inline Vector<double, N> to_doubles(Vector<float, N> value) {
#if defined(__AVX512F__)
  if constexpr (N == 8) {
    return (Vector<double, N>)_mm512_maskz_cvtps_pd(0xff, (__m256)value);
  } else
#endif
#if defined(__AVX2__)
      if constexpr (N == 4) {
    return (Vector<double, N>)_mm256_cvtps_pd((__m128)value);
  } else
#endif
  {
    return __builtin_convertvector(value, Vector<double, N>);
  }
}

template <int N>
[[gnu::always_inline]] inline Vector<float, N> to_floats(Vector<uint16_t, N> bits, BFloat16) {
  return bit_cast<Vector<float, N>>(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
}

template <int N>
[[gnu::always_inline]] inline Vector<float, N> to_floats(Vector<uint16_t, N> bits, Half) {
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
    for (int i = 0; i < N; ++i) out[i] = to_compute(Half{static_cast<uint16_t>(bits[i])});
    return out;
  }
}

// N numbers stored as S, as T: what they are computed as, or double.
template <typename T, int N, typename S>
[[gnu::always_inline]] inline Vector<T, N> load_as(const S* from) {
  if constexpr (__is_same(S, T)) {
    return load<T, N>(from);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    return to_doubles<N>(load_as<float, N>(from));
  } else {
    return to_floats<N>(load<uint16_t, N>(reinterpret_cast<const uint16_t*>(from)), S{});
  }
}

template <int N>
[[gnu::always_inline]] inline Vector<uint16_t, N> rounded_bits(Vector<float, N> value, BFloat16) {
  const auto bits = bit_cast<Vector<uint32_t, N>>(value);
  const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto chosen = nan ? Vector<uint32_t, N>{} + 0x7fc0u : rounded;
  return __builtin_convertvector(chosen, Vector<uint16_t, N>);
}

template <int N>
[[gnu::always_inline]] inline Vector<uint16_t, N> rounded_bits(Vector<float, N> value, Half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto half = _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
    return bit_cast<Vector<uint16_t, N>>(half);
  } else
#endif
#if defined(__F16C__)
      if constexpr (N == 8) {
    const auto half = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    return bit_cast<Vector<uint16_t, N>>(half);
  } else
#endif
  {
    Vector<uint16_t, N> out;
    for (int i = 0; i < N; ++i) out[i] = from_compute<Half>(value[i]).bits;
    return out;
  }
}

// Rounds to nearest, ties to even, as torch does.
template <typename S, int N>
[[gnu::always_inline]] inline void store_as(S* to, Vector<Compute<S>, N> value) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    store<S, N>(to, value);
  } else {
    store<uint16_t, N>(reinterpret_cast<uint16_t*>(to), rounded_bits<N>(value, S{}));
  }
}

// The first `count` of N numbers; the others are zero, and are not read.
template <typename S, int N>
inline Vector<Compute<S>, N> load_part(const S* from, int64_t count) {
  S numbers[N] = {};
  std::memcpy(numbers, from, count * sizeof(S));
  return load_as<Compute<S>, N>(numbers);
}

template <typename S, int N>
inline void store_part(S* to, Vector<Compute<S>, N> value, int64_t count) {
  S numbers[N];
  store_as<S, N>(numbers, value);
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

}  // namespace deqcore::cpu::DEQCORE_ISA
