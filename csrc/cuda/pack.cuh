// Packs of neighbouring elements, 16 bytes of iterate each: how kernels read and write rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "ops/dtype.h"

namespace deqcore::cuda {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// Elements of a pack of iterates of type X.
template <typename X>
constexpr int kPackWidth = 16 / sizeof(X);

// kAligned: packs lie on their own alignment and the row's length is a multiple of kWidth; else
// element by element, the `left` elements that the row still has. `again`: the same thread has just
// read or written them, so that a cache should have them (it only matters to who counts).
template <bool kAligned, int kWidth, typename T>
DEQCORE_DEVICE Pack<T, kWidth> load(const T* from, int64_t left, bool again = false) {
  Pack<T, kWidth> pack;
  if constexpr (kAligned) {
    count_read(sizeof(pack), again);
    pack = *reinterpret_cast<const Pack<T, kWidth>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < left) count_read(sizeof(T), again);
      pack.at[i] = i < left ? from[i] : T{};
    }
  }
  return pack;
}

// The same for what this launch reads once: it leaves the caches first.
template <bool kAligned, int kWidth, typename T>
DEQCORE_DEVICE Pack<T, kWidth> load_once(const T* from, int64_t left) {
#if defined(__CUDA_ARCH__)
  if constexpr (kAligned && sizeof(T) * kWidth == 16) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    Pack<T, kWidth> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
  } else if constexpr (kAligned && sizeof(T) * kWidth == 8) {
    const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(from));
    Pack<T, kWidth> pack;
    memcpy(&pack, &raw, sizeof(pack));
    return pack;
  }
#endif
  return load<kAligned, kWidth>(from, left);
}

template <bool kAligned, int kWidth, typename T>
DEQCORE_DEVICE void store(T* to, const Pack<T, kWidth>& pack, int64_t left) {
  if constexpr (kAligned) {
    count_write(sizeof(pack));
    *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < left) {
        count_write(sizeof(T));
        to[i] = pack.at[i];
      }
    }
  }
}

#if defined(__CUDA_ARCH__)
template <typename Sixteen>
DEQCORE_DEVICE void store_sixteen_bytes(void* to, const Sixteen& bytes) {
  static_assert(sizeof(bytes) == 16);
  uint4 raw;
  memcpy(&raw, &bytes, sizeof(raw));
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w)
               : "memory");
}
#endif

// An aligned pack by one access, or by two of 16 bytes. nvcc takes what `store` does apart into
// elements where it holds them apart, or where another branch stores them one by one.
template <typename T, int kWidth>
DEQCORE_DEVICE void store_whole(T* to, const Pack<T, kWidth>& pack) {
  count_write(sizeof(pack));
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == 32) {
    Pack<T, kWidth / 2> halves[2];
    memcpy(halves, &pack, sizeof(pack));
    store_sixteen_bytes(to, halves[0]);
    store_sixteen_bytes(to + kWidth / 2, halves[1]);
    return;
  } else if constexpr (sizeof(pack) == 16) {
    store_sixteen_bytes(to, pack);
    return;
  } else if constexpr (sizeof(pack) == 8) {
    uint2 raw;
    memcpy(&raw, &pack, sizeof(raw));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(raw.x), "r"(raw.y) : "memory");
    return;
  } else if constexpr (sizeof(pack) == 4) {
    unsigned raw;
    memcpy(&raw, &pack, sizeof(raw));
    asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(raw) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// As `store`, an aligned pack as `store_whole` does.
template <bool kAligned, int kWidth, typename T>
DEQCORE_DEVICE void put(T* to, const Pack<T, kWidth>& pack, int64_t left) {
  if constexpr (kAligned) {
    store_whole(to, pack);
  } else {
    store<false, kWidth>(to, pack, left);
  }
}

// The same numbers in the iterate's type.
template <typename X, typename F, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> widen(const Pack<F, kWidth>& pack) {
  Pack<X, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = to_compute(pack.at[i]);
  return out;
}

// Rounded to the type of a history.
template <typename S, typename X, int kWidth>
DEQCORE_DEVICE Pack<S, kWidth> narrowed(const Pack<X, kWidth>& pack) {
  Pack<S, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = from_compute<S>(pack.at[i]);
  return out;
}

// f(z) - z, where z is x as f saw it.
template <typename F, typename X, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> residual_of(const Pack<X, kWidth>& f, const Pack<X, kWidth>& x) {
  Pack<X, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = f.at[i] - to_compute(from_compute<F>(x.at[i]));
  return out;
}

// The same numbers as sums add them up.
template <typename S, int kWidth>
DEQCORE_DEVICE Pack<double, kWidth> in_doubles(const Pack<S, kWidth>& pack) {
  Pack<double, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = static_cast<double>(to_compute(pack.at[i]));
  return out;
}

template <typename X, int kWidth>
DEQCORE_DEVICE void add_dot(const Pack<X, kWidth>& a, const Pack<X, kWidth>& b, double& sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    sum = fma(static_cast<double>(a.at[i]), static_cast<double>(b.at[i]), sum);
  }
}

// to + weight * from, rounded once.
template <typename X, int kWidth>
DEQCORE_DEVICE void add_scaled(Pack<X, kWidth>& to, X weight, const Pack<X, kWidth>& from) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to.at[i] = fma(weight, from.at[i], to.at[i]);
}

// h - damping * g: the iterate that a slot was made from.
template <typename X, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> rebuilt(const Pack<X, kWidth>& h, X damping,
                                       const Pack<X, kWidth>& g) {
  Pack<X, kWidth> out = h;
  add_scaled(out, -damping, g);
  return out;
}

// The next iterate, and the same as f will see it.
template <bool kAligned, int kWidth, typename X, typename F>
DEQCORE_DEVICE void put_iterate(X* x_next, F* z_next, const Pack<X, kWidth>& value, int64_t left) {
  put<kAligned, kWidth>(x_next, value, left);
  if (z_next != nullptr) put<kAligned, kWidth>(z_next, narrowed<F>(value), left);
}
template <bool kAligned, int kWidth, typename X, typename F>
DEQCORE_DEVICE void store_iterate(X* x_next, F* z_next, const Pack<X, kWidth>& value,
                                  int64_t left) {
  store<kAligned, kWidth>(x_next, value, left);
  if (z_next == nullptr) return;
  Pack<F, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded.at[i] = from_compute<F>(value.at[i]);
  store<kAligned, kWidth>(z_next, rounded, left);
}

}  // namespace deqcore::cuda
