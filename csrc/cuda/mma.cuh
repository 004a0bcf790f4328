// Tensor cores: products of small tiles by a warp (mma.sync m16n8k16), and how their operands come
// out of shared memory (ldmatrix). Everything that the hardware does and plain C++ does not is
// here, each with a host path for the emulation. Needs sm_80.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"

namespace deqcore::cuda {

// A lane's registers of the four 8 x 8 tiles of 2-byte numbers whose rows, of 16 bytes, begin at
// `row`: lane 8 m + i names row i of tile m. A lane gets two neighbours of row lane / 4 of each; of
// column lane / 4 where kTurned.
template <bool kTurned>
DEQCORE_DEVICE void load_tiles(uint32_t (&out)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) ::emulation::complain("loads a tile not aligned");
  const auto own_row = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(row));
  const uint64_t* const all = ::emulation::gather_warp(&own_row, 1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto number = [&](int tile, int i, int j) {
    return uint32_t{reinterpret_cast<const uint16_t*>(all[8 * tile + i])[j]};
  };
  for (int tile = 0; tile < 4; ++tile) {
    const int own = lane / 4, pair = lane % 4 * 2;
    out[tile] = kTurned ? number(tile, pair, own) | number(tile, pair + 1, own) << 16
                        : number(tile, own, pair) | number(tile, own, pair + 1) << 16;
  }
#endif
}

// c += a b for a [16 x 16], b [16 x 8] of type S and c [16 x 8] in float32, laid out over the lanes
// as mma.sync defines it: a lane has rows lane / 4 and 8 more of c, and two neighbours in each.
template <typename S>
DEQCORE_DEVICE void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (__is_same(S, BFloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  const uint64_t own[3] = {a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32,
                           b0 | uint64_t{b1} << 32};
  const uint64_t* const all = ::emulation::gather_warp(own, 3);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto number = [&](int from, int word, int half) {
    const uint64_t pair = all[3 * from + word / 2] >> 32 * (word % 2);
    return to_compute(S{static_cast<uint16_t>(pair >> 16 * half)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int within = k % 8 / 2, half = k % 2;
      c[i] = fma(number(row % 8 * 4 + within, row / 8 + k / 8 * 2, half),
                 number(column * 4 + within, 4 + k / 8, half), c[i]);
    }
  }
#endif
}

// A matrix of 2-byte numbers in shared memory, rows of kRowBytes (32, 64 or 128), whose 16-byte
// pieces change places so that the 8 rows of a tile lie in different banks.
template <int kRowBytes>
struct BankedRows {
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kRowsOfALine = 8 / kPieces;       // a line is all banks once: 128 bytes
  DEQCORE_DEVICE static int place(int row, int piece) {  // in bytes
    return row * kRowBytes + (piece ^ (row / kRowsOfALine % kPieces)) * 16;
  }
};

}  // namespace deqcore::cuda
