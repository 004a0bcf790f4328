// The dtypes of the kernels' tensors, for host and device: how a number is stored, in which type it
// is computed, and the way there and back. No torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/host_device.h"

namespace deqcore {

enum class Dtype { f64, f32, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
// The type in which numbers stored as S are computed: double for double, else float. (An iterate
// and its history have this type of what f returns; sums of a masked matmul have it of its values.)
template <typename S>
using Compute = typename ComputeOf<S>::type;

DEQCORE_HD bool is_half(Dtype type) { return type == Dtype::bf16 || type == Dtype::f16; }

// Bytes of a stored number, and of what it is computed as.
DEQCORE_HD int64_t stored_size(Dtype type) {
  return type == Dtype::f64 ? 8 : type == Dtype::f32 ? 4 : 2;
}
DEQCORE_HD int64_t compute_size(Dtype type) { return type == Dtype::f64 ? 8 : 4; }

// Calls run.operator()<S>() for the type that such numbers are stored as.
template <typename Run>
auto with_dtype(Dtype type, const Run& run) {
  switch (type) {
    case Dtype::f64:
      return run.template operator()<double>();
    case Dtype::f32:
      return run.template operator()<float>();
    case Dtype::bf16:
      return run.template operator()<BFloat16>();
    case Dtype::f16:
      break;
  }
  return run.template operator()<Half>();
}

// The same for what has no kernel for float64.
template <typename Run>
auto with_narrow_dtype(Dtype type, const Run& run) {
  if (type == Dtype::f32) return run.template operator()<float>();
  if (type == Dtype::bf16) return run.template operator()<BFloat16>();
  return run.template operator()<Half>();
}

DEQCORE_HD_ALWAYS float to_compute(float value) { return value; }
DEQCORE_HD_ALWAYS double to_compute(double value) { return value; }

// A bfloat16 is the upper half of a float.
DEQCORE_HD_ALWAYS float to_compute(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

#if !defined(__CUDACC__)
#if defined(__aarch64__)
using HostHalf = __fp16;  // GCC knows _Float16 in C++ from version 13 on
#else
using HostHalf = _Float16;
#endif
#endif

DEQCORE_HD_ALWAYS float to_compute(Half value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#elif defined(__CUDACC__)
  return 0.0f;  // nvcc's host pass: never run
#else
  HostHalf half;
  memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
#endif
}

// Rounds to nearest, ties to even, as torch does.
template <typename S, typename X>
DEQCORE_HD_ALWAYS S from_compute(X value) {
  static_assert(sizeof(X) == sizeof(Compute<S>));
  if constexpr (sizeof(S) != 2) {
    return value;
  } else if constexpr (__is_same(S, BFloat16)) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    return out;
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
  } else {
    Half out{0};
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#elif !defined(__CUDACC__)
    const HostHalf half = static_cast<HostHalf>(value);
    memcpy(&out.bits, &half, sizeof(half));
#endif
    return out;
  }
}

}  // namespace deqcore
