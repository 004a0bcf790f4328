// Fixed-order reductions and elementwise loops over blocks of a row. Include in kernels only.
//
// Element i of a block always goes to accumulator i % kLanes, and the accumulators are added in one
// fixed tree, so that a sum depends on the length of the row alone: not on the instruction set's
// vector width, the threads, or the other rows.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/step.h"

namespace deqcore::cpu::DEQCORE_ISA {

constexpr int kLanes = 32;               // accumulators of one sum
constexpr int64_t kCacheable = 1 << 19;  // bytes that a core's own cache can hold for a while
constexpr int kBlock = 512;  // elements that stay in the first-level cache between loops

#if defined(__AVX512F__)
constexpr int kWidth = 8;  // doubles in a register
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
typedef double Doubles __attribute__((vector_size(kWidth * 8)));
typedef float Floats __attribute__((vector_size(kWidth * 4)));

[[gnu::always_inline]] inline Doubles load_doubles(const double* from) {
  Doubles out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

[[gnu::always_inline]] inline Doubles load_doubles(const float* from) {
  Floats narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Doubles);
}

[[gnu::always_inline]] inline void store_doubles(double* to, Doubles value) {
  std::memcpy(to, &value, sizeof(value));
}

[[gnu::always_inline]] inline Doubles multiply_add_doubles(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// sums[lane] += a . b over one block, for lane = index % kLanes.
template <typename T>
[[gnu::always_inline]] inline void add_dot(const T* a, const double* b, int count, double* sums) {
  constexpr int kParts = kLanes / kWidth;
  Doubles parts[kParts];
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) parts[p] = load_doubles(sums + p * kWidth);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
      parts[p] = multiply_add_doubles(load_doubles(a + i + p * kWidth),
                                      load_doubles(b + i + p * kWidth), parts[p]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p) store_doubles(sums + p * kWidth, parts[p]);
  for (; i < count; ++i) {
    sums[i % kLanes] = multiply_add(static_cast<double>(a[i]), b[i], sums[i % kLanes]);
  }
}

inline double sum_lanes(double* sums) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// Adds up a row's sums chunk by chunk, whoever computed them: [chunks, stride].
inline void add_chunks(const double* parts, int64_t chunks, int64_t stride, int64_t width,
                       double* sums) {
  for (int64_t i = 0; i < width; ++i) sums[i] = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < width; ++i) sums[i] += parts[chunk * stride + i];
  }
}

// Asks for memory that will be read soon, by the line of 64 bytes.
template <typename T>
inline void fetch_ahead(const T* from, int count) {
  for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(T)))
    __builtin_prefetch(from + i, 0, 2);
}

// to[i] += sum_j weights[j] * sources[j][i], in the order of j.
template <typename X>
inline void add_combination(X* __restrict to, const X* const* sources, const X* weights, int terms,
                            int count) {
  int j = 0;
  for (; j + 4 <= terms; j += 4) {
    const X *a = sources[j], *b = sources[j + 1], *c = sources[j + 2], *d = sources[j + 3];
    const X wa = weights[j], wb = weights[j + 1], wc = weights[j + 2], wd = weights[j + 3];
    for (int i = 0; i < count; ++i) {
      const X first = multiply_add(wb, b[i], multiply_add(wa, a[i], to[i]));
      to[i] = multiply_add(wd, d[i], multiply_add(wc, c[i], first));
    }
  }
  for (; j < terms; ++j) {
    const X* a = sources[j];
    const X wa = weights[j];
    for (int i = 0; i < count; ++i) to[i] = multiply_add(wa, a[i], to[i]);
  }
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};

[[gnu::always_inline]] inline float to_compute(float value) { return value; }
[[gnu::always_inline]] inline double to_compute(double value) { return value; }
[[gnu::always_inline]] inline float to_compute(Half value) {
  return static_cast<float>(value.value);
}
[[gnu::always_inline]] inline float to_compute(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

template <typename F, typename X>
[[gnu::always_inline]] inline F to_state(X value) {
  if constexpr (sizeof(F) != 2) {
    return value;
  } else if constexpr (__is_same(F, Half)) {
    return Half{static_cast<_Float16>(value)};
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
  }
}

// Calls run.operator()<X, F>() for the types of the iterate and of f.
template <typename Run>
void with_state_type(StateType type, const Run& run) {
  switch (type) {
    case StateType::f64:
      return run.template operator()<double, double>();
    case StateType::f32:
      return run.template operator()<float, float>();
    case StateType::bf16:
      return run.template operator()<float, BFloat16>();
    case StateType::f16:
      return run.template operator()<float, Half>();
  }
}

}  // namespace deqcore::cpu::DEQCORE_ISA
