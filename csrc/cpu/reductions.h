// Fixed-order reductions and elementwise loops over blocks of a row. Include in kernels only.
//
// Element i of a block always goes to accumulator i % kAccumulators, and the accumulators are added
// in one fixed tree, so that a sum depends on the length of the row alone: not on the instruction
// set's vector width, the threads, or the other rows.
#pragma once

#include <cstdint>

#include "cpu/prefetch.h"
#include "cpu/simd.h"

namespace deqcore::cpu::DEQCORE_ISA {

constexpr int kAccumulators = 32;  // of one sum
constexpr int kBlock = 512;        // elements that stay in the first-level cache between loops
constexpr int kWide = kLanes<double>;
using Doubles = Vector<double, kWide>;

// The largest power of two that is at most `most` and divides `parts`, itself one.
constexpr int fitting_parts(int parts, int most) {
  while (parts > 1 && parts > most) parts /= 2;
  return parts;
}

// sums[l][r][lane] += lefts[l] . rights[r] over one block, for lane = index % kAccumulators. Every
// load and conversion serves all sums; as many accumulators as there are registers run side by
// side. kSelf: lefts[0] is rights[0]. kAhead: what follows the block in each left is asked for
// meanwhile.
template <int kLefts, int kRights, bool kSelf, bool kAhead = false, typename L, typename R>
inline void add_dots(const L* const* lefts, const R* const* rights, int count, double* sums) {
  constexpr int kParts = kAccumulators / kWide, kSums = kLefts * kRights;
  constexpr int kTogether = fitting_parts(kParts, (kRegisters - 2) / (kSums + kRights));
  const int whole = count / kAccumulators * kAccumulators;
  for (int first = 0; first < kParts; first += kTogether) {
    Doubles totals[kSums * kTogether];
    double* const at = sums + first * kWide;
    unrolled<kSums * kTogether>([&](auto k) __attribute__((always_inline)) {
      totals[k] =
          load_as<double, kWide>(at + k / kTogether * kAccumulators + k % kTogether * kWide);
    });
    for (int i = first * kWide; i < whole; i += kAccumulators) {
      if constexpr (kAhead) {
        if (first == 0) {
          unrolled<kLefts>([&](auto l) __attribute__((always_inline)) {
            fetch_ahead(lefts[l] + kBlock + i, kAccumulators);
          });
        }
      }
      unrolled<kTogether>([&](auto part) __attribute__((always_inline)) {
        Doubles right[kRights];
        unrolled<kRights>([&](auto r) __attribute__((always_inline)) {
          right[r] = load_as<double, kWide>(rights[r] + i + part * kWide);
        });
        unrolled<kLefts>([&](auto l) __attribute__((always_inline)) {
          const Doubles left =
              kSelf && l == 0 ? right[0] : load_as<double, kWide>(lefts[l] + i + part * kWide);
          unrolled<kRights>([&](auto r) __attribute__((always_inline)) {
            Doubles& total = totals[(l * kRights + r) * kTogether + part];
            total = multiply_add<double, kWide>(left, right[r], total);
          });
        });
      });
    }
    unrolled<kSums * kTogether>([&](auto k) __attribute__((always_inline)) {
      store<double, kWide>(at + k / kTogether * kAccumulators + k % kTogether * kWide, totals[k]);
    });
  }
  for (int i = whole; i < count; ++i) {
    for (int k = 0; k < kSums; ++k) {
      double& sum = sums[k * kAccumulators + i % kAccumulators];
      sum = multiply_add(static_cast<double>(to_compute(lefts[k / kRights][i])),
                         static_cast<double>(to_compute(rights[k % kRights][i])), sum);
    }
  }
}

// |a|^2 over one block, into kAccumulators sums.
template <typename T>
inline void add_square(const T* a, int count, double* sums) {
  add_dots<1, 1, true>(&a, &a, count, sums);
}

// The same as add_dots for any number of lefts: sums [lefts][kRights][kAccumulators].
template <int kRights, bool kSelf, bool kAhead = false, typename L, typename R>
inline void add_all_dots(const L* const* lefts, int count_lefts, const R* const* rights, int count,
                         double* sums) {
  constexpr int kMost = kRights == 1 ? 5 : 4;  // a memory of 5 in one go
  constexpr int kStride = kRights * kAccumulators;
  const auto add = [&]<int kLefts, bool kFirst>(int from) {
    add_dots<kLefts, kRights, kFirst, kAhead>(lefts + from, rights, count, sums + from * kStride);
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
  for (int half = kAccumulators / 2; half > 0; half /= 2) {
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

// to[i] += sum_j weights[j] * sources[j][i], in the order of j. kAhead: as for add_dots.
template <bool kAhead = false, typename X, typename S>
inline void add_combination(X* __restrict to, const S* const* sources, const X* weights, int terms,
                            int count) {
  if constexpr (kAhead) {
    // A line of each source at a time, so that the loads that are asked for never queue up.
    constexpr int kLine = 64 / sizeof(S);
    for (int j = 0; j < terms; j += 4) {
      const int some = terms - j < 4 ? terms - j : 4;
      int i = 0;
      for (; i + kLine <= count; i += kLine) {
        const S* from[4];
        for (int k = 0; k < some; ++k) {
          from[k] = sources[j + k] + i;
          __builtin_prefetch(from[k] + kBlock, 0, 2);
        }
        add_combination<false>(to + i, from, weights + j, some, kLine);
      }
      const S* from[4];
      for (int k = 0; k < some; ++k) from[k] = sources[j + k] + i;
      add_combination<false>(to + i, from, weights + j, some, count - i);
    }
    return;
  }
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

// Calls run.operator()<S>() for the type of a history beside an iterate of type X.
template <typename X, typename Run>
void with_history_type(bool narrow, const Run& run) {
  if constexpr (sizeof(X) == sizeof(float)) {
    if (narrow) return run.template operator()<BFloat16>();
  }
  run.template operator()<X>();
}

}  // namespace deqcore::cpu::DEQCORE_ISA
