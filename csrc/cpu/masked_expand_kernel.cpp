// masked_expand: a register of values goes to the places of a mask's bits at once, where the
// instruction set can do that; scattering entry by entry takes longer than a dense multiplication
// by the mask would.
#include "cpu/masked_expand.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd.h"

namespace deqcore::cpu::DEQCORE_ISA {

#if defined(__AVX512F__)
namespace {

// The bits of the entries from `cell` on, a multiple of the lanes: as many as T has lanes.
template <typename T>
uint32_t whole_bits_at(const uint8_t* words, int64_t cell) {
  if constexpr (sizeof(T) == 8) return words[cell / 8];
  uint16_t bits;
  std::memcpy(&bits, words + cell / 8, sizeof(bits));
  return bits;
}

// The bits of `count` entries.
uint32_t bits_at(const uint8_t* words, int64_t cell, int count) {
  uint32_t bits = words[cell / 8];
  if (count > 8) bits |= static_cast<uint32_t>(words[cell / 8 + 1]) << 8;
  return bits & ((1u << count) - 1);
}

uint32_t lowest(int64_t count, int lanes) {
  return count >= lanes ? (1u << lanes) - 1 : (1u << count) - 1;
}

// A register's worth of entries; as many values can be read.
void expand(const float* from, uint32_t bits, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(from)));
}

void expand(const double* from, uint32_t bits, double* to) {
  _mm512_storeu_pd(to, _mm512_maskz_expand_pd(static_cast<__mmask8>(bits), _mm512_loadu_pd(from)));
}

// The same near the ends: `left` values can be read, `count` entries written.
void expand(const float* from, int64_t left, uint32_t bits, int count, float* to) {
  const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lowest(left, 16)), from);
  const __m512 placed = _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), values);
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lowest(count, 16)), placed);
}

void expand(const double* from, int64_t left, uint32_t bits, int count, double* to) {
  const __m512d values = _mm512_maskz_loadu_pd(static_cast<__mmask8>(lowest(left, 8)), from);
  const __m512d placed = _mm512_maskz_expand_pd(static_cast<__mmask8>(bits), values);
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lowest(count, 8)), placed);
}

template <typename T>
void expand_range(const MaskedExpandArgs& args, int64_t at, int64_t begin, int64_t end) {
  const T* const values = static_cast<const T*>(args.values);
  T* const dense = static_cast<T*>(args.dense);
  int64_t cell = begin;
  for (; cell + kLanes<T> <= end && at + kLanes<T> <= args.kept; cell += kLanes<T>) {
    const uint32_t bits = whole_bits_at<T>(args.words, cell);
    expand(values + at, bits, dense + cell);
    at += __builtin_popcount(bits);
  }
  for (; cell < end; cell += kLanes<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, end - cell));
    const uint32_t bits = bits_at(args.words, cell, count);
    expand(values + at, args.kept - at, bits, count, dense + cell);
    at += __builtin_popcount(bits);
  }
}

}  // namespace

bool masked_expand(const MaskedExpandArgs& args, Dtype type, int64_t at, int64_t begin,
                   int64_t end) {
  if (type == Dtype::f32) {
    expand_range<float>(args, at, begin, end);
    return true;
  }
  if (type == Dtype::f64) {
    expand_range<double>(args, at, begin, end);
    return true;
  }
  return false;
}

#else

bool masked_expand(const MaskedExpandArgs&, Dtype, int64_t, int64_t, int64_t) { return false; }

#endif

}  // namespace deqcore::cpu::DEQCORE_ISA
