// Fixed-order reductions and elementwise loops over blocks of a row. Include in kernels only.
//
// Element i of a block always goes to accumulator i % kLanes, and the accumulators are added in one
// fixed tree, so that a sum depends on the length of the row alone: not on the instruction set's
// vector width, the threads, or the other rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
#else
constexpr int kWidth = 2;
constexpr int kRegisters = 16;
#endif
typedef double Doubles __attribute__((vector_size(kWidth * 8)));

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

[[gnu::always_inline]] inline Doubles load_doubles(const double* from) {
  Doubles out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

[[gnu::always_inline]] inline Doubles load_doubles(const float* from) {
  // By name: GCC converts a vector in halves.
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  return Doubles{from[0], from[1]};
#endif
}

[[gnu::always_inline]] inline Doubles load_doubles(const BFloat16* from) {
  // A bfloat16 is the upper half of a float.
#if defined(__AVX512F__)
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return (Doubles)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
#elif defined(__AVX2__)
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
  return (Doubles)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
#else
  return Doubles{to_compute(from[0]), to_compute(from[1])};
#endif
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

// The largest power of two that is at most `most` and divides `parts`, itself one.
constexpr int fitting_parts(int parts, int most) {
  while (parts > 1 && parts > most) parts /= 2;
  return parts;
}

// body(k) for k = 0 .. kCount - 1 with k known to the compiler, so that arrays stay in registers.
template <int kCount, typename Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, k>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// sums[l][r][lane] += lefts[l] . rights[r] over one block, for lane = index % kLanes. Every load
// and conversion serves all sums; as many accumulators as there are registers run side by side.
// kSelf: lefts[0] is rights[0].
template <int kLefts, int kRights, bool kSelf, typename L, typename R>
inline void add_dots(const L* const* lefts, const R* const* rights, int count, double* sums) {
  constexpr int kParts = kLanes / kWidth, kSums = kLefts * kRights;
  constexpr int kTogether = fitting_parts(kParts, (kRegisters - 2) / (kSums + kRights));
  const int whole = count / kLanes * kLanes;
  for (int first = 0; first < kParts; first += kTogether) {
    Doubles totals[kSums * kTogether];
    double* const at = sums + first * kWidth;
    unrolled<kSums * kTogether>([&](auto k) __attribute__((always_inline)) {
      totals[k] = load_doubles(at + k / kTogether * kLanes + k % kTogether * kWidth);
    });
    for (int i = first * kWidth; i < whole; i += kLanes) {
      unrolled<kTogether>([&](auto part) __attribute__((always_inline)) {
        Doubles right[kRights];
        unrolled<kRights>([&](auto r) __attribute__((always_inline)) {
          right[r] = load_doubles(rights[r] + i + part * kWidth);
        });
        unrolled<kLefts>([&](auto l) __attribute__((always_inline)) {
          const Doubles left =
              kSelf && l == 0 ? right[0] : load_doubles(lefts[l] + i + part * kWidth);
          unrolled<kRights>([&](auto r) __attribute__((always_inline)) {
            Doubles& total = totals[(l * kRights + r) * kTogether + part];
            total = multiply_add_doubles(left, right[r], total);
          });
        });
      });
    }
    unrolled<kSums * kTogether>([&](auto k) __attribute__((always_inline)) {
      store_doubles(at + k / kTogether * kLanes + k % kTogether * kWidth, totals[k]);
    });
  }
  for (int i = whole; i < count; ++i) {
    for (int k = 0; k < kSums; ++k) {
      double& sum = sums[k * kLanes + i % kLanes];
      sum = multiply_add(static_cast<double>(to_compute(lefts[k / kRights][i])),
                         static_cast<double>(to_compute(rights[k % kRights][i])), sum);
    }
  }
}

// |a|^2 over one block, into kLanes sums.
template <typename T>
inline void add_square(const T* a, int count, double* sums) {
  add_dots<1, 1, true>(&a, &a, count, sums);
}

// The same as add_dots for any number of lefts: sums [lefts][kRights][kLanes].
template <int kRights, bool kSelf, typename L, typename R>
inline void add_all_dots(const L* const* lefts, int count_lefts, const R* const* rights, int count,
                         double* sums) {
  constexpr int kMost = kRights == 1 ? 5 : 4;  // a memory of 5 in one go
  constexpr int kStride = kRights * kLanes;
  const auto add = [&]<int kLefts, bool kFirst>(int from) {
    add_dots<kLefts, kRights, kFirst>(lefts + from, rights, count, sums + from * kStride);
  };
  int done = 0;
  if (kSelf && count_lefts >= kMost) {
    add.template operator()<kMost, true>(0);
    done = kMost;
  } else if (kSelf) {
    add.template operator()<1, true>(0);
    done = 1;
  }
  for (; done + kMost <= count_lefts; done += kMost) add.template operator()<kMost, false>(done);
  for (; done + 2 <= count_lefts; done += 2) add.template operator()<2, false>(done);
  if (done < count_lefts) add.template operator()<1, false>(done);
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
template <typename X, typename S>
inline void add_combination(X* __restrict to, const S* const* sources, const X* weights, int terms,
                            int count) {
  int j = 0;
  for (; j + 4 <= terms; j += 4) {
    const S *a = sources[j], *b = sources[j + 1], *c = sources[j + 2], *d = sources[j + 3];
    const X wa = weights[j], wb = weights[j + 1], wc = weights[j + 2], wd = weights[j + 3];
    for (int i = 0; i < count; ++i) {
      const X first =
          multiply_add<X>(wb, to_compute(b[i]), multiply_add<X>(wa, to_compute(a[i]), to[i]));
      to[i] = multiply_add<X>(wd, to_compute(d[i]), multiply_add<X>(wc, to_compute(c[i]), first));
    }
  }
  for (; j < terms; ++j) {
    const S* a = sources[j];
    const X wa = weights[j];
    for (int i = 0; i < count; ++i) to[i] = multiply_add<X>(wa, to_compute(a[i]), to[i]);
  }
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

// Calls run.operator()<S>() for the type of a history beside an iterate of type X.
template <typename X, typename Run>
void with_history_type(bool narrow, const Run& run) {
  if constexpr (sizeof(X) == sizeof(float)) {
    if (narrow) return run.template operator()<BFloat16>();
  }
  run.template operator()<X>();
}

}  // namespace deqcore::cpu::DEQCORE_ISA
