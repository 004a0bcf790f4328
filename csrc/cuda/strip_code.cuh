// What runs a strip's code (masked_strips.cuh): a small machine in a warp. Its registers are the
// kernel's, which no index can choose at run time; so each row has instructions of its own, and the
// bits of a code say, jump by jump, which come next. All lanes run the same code, which PTX can say
// (bra.uni) and C++ cannot; the host path is for the emulation.
//
// An instruction adds to its row, and beside that asks for what the next one needs: its column of x
// if that is another one, its value, and the code after it. These loads are under way during the
// jumps. (An indexed jump, brx.idx, waits for all loads before it, and looks its target up in a
// table; on an H200 that was the slower, the more rows there were.)
#pragma once

#include <cstdint>

#include "cuda/masked_strips.cuh"

namespace deqcore::cuda {

constexpr int kPartStride = kWarp + 1;  // from one entry's parts to the next one's, in floats

#if defined(__CUDA_ARCH__)

// clang-format off
// The way to a row is a tree of jumps, by the bits of its number: FORK(bit, row, next bit, row
// where the bit is set), LEAF(row, row where bit 0 is set). ROW(type, row, its operands).
#define DEQCORE_FORK(bit, row, next, other) \
  "J" #bit "_" #row "_%=: @bit" #bit " bra.uni J" #next "_" #other "_%=;\n"
#define DEQCORE_LEAF(row, other) "J0_" #row "_%=: @bit0 bra.uni R" #other "_%=;\n"
#define DEQCORE_ROWS_8X8(ROW, TYPE) \
  DEQCORE_FORK(2, 0, 1, 4) \
  DEQCORE_FORK(1, 0, 0, 2) \
  DEQCORE_LEAF(0, 1) \
  ROW(TYPE, 0, 0, 1, 2, 3, 4, 5, 6, 7) \
  ROW(TYPE, 1, 8, 9, 10, 11, 12, 13, 14, 15) \
  DEQCORE_LEAF(2, 3) \
  ROW(TYPE, 2, 16, 17, 18, 19, 20, 21, 22, 23) \
  ROW(TYPE, 3, 24, 25, 26, 27, 28, 29, 30, 31) \
  DEQCORE_FORK(1, 4, 0, 6) \
  DEQCORE_LEAF(4, 5) \
  ROW(TYPE, 4, 32, 33, 34, 35, 36, 37, 38, 39) \
  ROW(TYPE, 5, 40, 41, 42, 43, 44, 45, 46, 47) \
  DEQCORE_LEAF(6, 7) \
  ROW(TYPE, 6, 48, 49, 50, 51, 52, 53, 54, 55) \
  ROW(TYPE, 7, 56, 57, 58, 59, 60, 61, 62, 63)
#define DEQCORE_ROWS_8X4(ROW, TYPE) \
  DEQCORE_FORK(2, 0, 1, 4) \
  DEQCORE_FORK(1, 0, 0, 2) \
  DEQCORE_LEAF(0, 1) \
  ROW(TYPE, 0, 0, 1, 2, 3) \
  ROW(TYPE, 1, 4, 5, 6, 7) \
  DEQCORE_LEAF(2, 3) \
  ROW(TYPE, 2, 8, 9, 10, 11) \
  ROW(TYPE, 3, 12, 13, 14, 15) \
  DEQCORE_FORK(1, 4, 0, 6) \
  DEQCORE_LEAF(4, 5) \
  ROW(TYPE, 4, 16, 17, 18, 19) \
  ROW(TYPE, 5, 20, 21, 22, 23) \
  DEQCORE_LEAF(6, 7) \
  ROW(TYPE, 6, 24, 25, 26, 27) \
  ROW(TYPE, 7, 28, 29, 30, 31)
#define DEQCORE_ROWS_16X4(ROW, TYPE) \
  DEQCORE_FORK(3, 0, 2, 8) \
  DEQCORE_ROWS_8X4(ROW, TYPE) \
  DEQCORE_FORK(2, 8, 1, 12) \
  DEQCORE_FORK(1, 8, 0, 10) \
  DEQCORE_LEAF(8, 9) \
  ROW(TYPE, 8, 32, 33, 34, 35) \
  ROW(TYPE, 9, 36, 37, 38, 39) \
  DEQCORE_LEAF(10, 11) \
  ROW(TYPE, 10, 40, 41, 42, 43) \
  ROW(TYPE, 11, 44, 45, 46, 47) \
  DEQCORE_FORK(1, 12, 0, 14) \
  DEQCORE_LEAF(12, 13) \
  ROW(TYPE, 12, 48, 49, 50, 51) \
  ROW(TYPE, 13, 52, 53, 54, 55) \
  DEQCORE_LEAF(14, 15) \
  ROW(TYPE, 14, 56, 57, 58, 59) \
  ROW(TYPE, 15, 60, 61, 62, 63)
#define DEQCORE_BIT(name, from, mask) \
  "and.b32 op, " from ", " #mask "; setp.ne.u32 " #name ", op, 0;\n"
#define DEQCORE_BITS_8(from) \
  DEQCORE_BIT(bit0, from, 1) DEQCORE_BIT(bit1, from, 2) DEQCORE_BIT(bit2, from, 4) \
  DEQCORE_BIT(done, from, 8)
#define DEQCORE_BITS_16(from) \
  DEQCORE_BIT(bit0, from, 1) DEQCORE_BIT(bit1, from, 2) DEQCORE_BIT(bit2, from, 4) \
  DEQCORE_BIT(bit3, from, 8) DEQCORE_BIT(done, from, 16)

// A column's numbers, x0 to x3 or x7, from shared memory at `at`; IF is a predicate or nothing.
#define DEQCORE_LOAD_F32_4(IF) IF "ld.shared.v4.f32 {x0, x1, x2, x3}, [at];\n"
#define DEQCORE_LOAD_F32_8(IF) \
  DEQCORE_LOAD_F32_4(IF) IF "ld.shared.v4.f32 {x4, x5, x6, x7}, [at+512];\n"
#define DEQCORE_LOAD_HALF_4(IF) IF "ld.shared.v2.b32 {h0, h1}, [at];\n"
#define DEQCORE_LOAD_HALF_8(IF) IF "ld.shared.v4.b32 {h0, h1, h2, h3}, [at];\n"
#define DEQCORE_LOAD_BF16_4 DEQCORE_LOAD_HALF_4
#define DEQCORE_LOAD_BF16_8 DEQCORE_LOAD_HALF_8
#define DEQCORE_LOAD_F16_4 DEQCORE_LOAD_HALF_4
#define DEQCORE_LOAD_F16_8 DEQCORE_LOAD_HALF_8
// What makes float32 of them.
#define DEQCORE_WIDEN_F32_4 ""
#define DEQCORE_WIDEN_F32_8 ""
#define DEQCORE_BF16_PAIR(h, low, high) \
  "shl.b32 q, " #h ", 16; mov.b32 " #low ", q; " \
  "and.b32 q, " #h ", 0xffff0000; mov.b32 " #high ", q;\n"
#define DEQCORE_F16_PAIR(h, low, high) \
  "mov.b32 {b0, b1}, " #h "; cvt.f32.f16 " #low ", b0; cvt.f32.f16 " #high ", b1;\n"
#define DEQCORE_WIDEN_BF16_4 DEQCORE_BF16_PAIR(h0, x0, x1) DEQCORE_BF16_PAIR(h1, x2, x3)
#define DEQCORE_WIDEN_BF16_8 \
  DEQCORE_WIDEN_BF16_4 DEQCORE_BF16_PAIR(h2, x4, x5) DEQCORE_BF16_PAIR(h3, x6, x7)
#define DEQCORE_WIDEN_F16_4 DEQCORE_F16_PAIR(h0, x0, x1) DEQCORE_F16_PAIR(h1, x2, x3)
#define DEQCORE_WIDEN_F16_8 \
  DEQCORE_WIDEN_F16_4 DEQCORE_F16_PAIR(h2, x4, x5) DEQCORE_F16_PAIR(h3, x6, x7)

// The first code of a batch, its column, and the way to it. BATCH and OWN are operands, the batch
// and the lane's place in a chunk; FIRST reads the first codes, and sets p to what is read next.
#define DEQCORE_START(BITS, LOAD, OWN, FIRST) \
  "{\n" \
  ".reg .b32 own, code, op, at, p, s, q, h0, h1, h2, h3; .reg .b16 b0, b1;\n" \
  ".reg .f32 v, u, x0, x1, x2, x3, x4, x5, x6, x7;\n" \
  ".reg .pred other, done, bit0, bit1, bit2, bit3;\n" \
  "mov.b32 own, " OWN ";\n" FIRST \
  "bfe.u32 at, q, 8, 20; add.u32 at, at, own;\n" LOAD("") BITS("q") \
  "T%=: @done bra.uni E%=;\n"
#define DEQCORE_JUMP "bra.uni T%=;\n"
#define DEQCORE_END "E%=:\n}\n"

// What an instruction begins with: the next code taken apart. It ends with reading the next value,
// and the code after the next, which nothing waits for before the jump.
#define DEQCORE_ENTRY(row, BITS) \
  "R" #row "_%=:\n" BITS("code") DEQCORE_BIT(other, "code", 128) \
  "shr.u32 at, code, 8; add.u32 at, at, own;\n"
#define DEQCORE_FMA(sum, x) "fma.rn.f32 %" #sum ", v, x" #x ", %" #sum ";\n"
#define DEQCORE_READ_VALUE "ld.shared.v2.b32 {v, code}, [p]; add.u32 p, p, 8;\n"
#define DEQCORE_ADD_4(TYPE, a, b, c, d) \
  DEQCORE_WIDEN_##TYPE##_4 \
  DEQCORE_FMA(a, 0) DEQCORE_FMA(b, 1) DEQCORE_FMA(c, 2) DEQCORE_FMA(d, 3) \
  DEQCORE_LOAD_##TYPE##_4("@other ") DEQCORE_READ_VALUE DEQCORE_JUMP
#define DEQCORE_LINEAR_8_4(TYPE, row, a, b, c, d) \
  DEQCORE_ENTRY(row, DEQCORE_BITS_8) DEQCORE_ADD_4(TYPE, a, b, c, d)
#define DEQCORE_LINEAR_16_4(TYPE, row, a, b, c, d) \
  DEQCORE_ENTRY(row, DEQCORE_BITS_16) DEQCORE_ADD_4(TYPE, a, b, c, d)
#define DEQCORE_LINEAR_8(TYPE, row, a, b, c, d, e, f, g, h) \
  DEQCORE_ENTRY(row, DEQCORE_BITS_8) DEQCORE_WIDEN_##TYPE##_8 \
  DEQCORE_FMA(a, 0) DEQCORE_FMA(b, 1) DEQCORE_FMA(c, 2) DEQCORE_FMA(d, 3) \
  DEQCORE_FMA(e, 4) DEQCORE_FMA(f, 5) DEQCORE_FMA(g, 6) DEQCORE_FMA(h, 7) \
  DEQCORE_LOAD_##TYPE##_8("@other ") DEQCORE_READ_VALUE DEQCORE_JUMP
// Two chains, v and u, whose sum is the lane's part.
#define DEQCORE_OUTER_8(TYPE, row, a, b, c, d, e, f, g, h) \
  DEQCORE_ENTRY(row, DEQCORE_BITS_8) DEQCORE_WIDEN_##TYPE##_8 \
  "mul.rn.f32 v, %" #a ", x0; mul.rn.f32 u, %" #e ", x4;\n" \
  "fma.rn.f32 v, %" #b ", x1, v; fma.rn.f32 u, %" #f ", x5, u;\n" \
  "fma.rn.f32 v, %" #c ", x2, v; fma.rn.f32 u, %" #g ", x6, u;\n" \
  "fma.rn.f32 v, %" #d ", x3, v; fma.rn.f32 u, %" #h ", x7, u;\n" \
  DEQCORE_LOAD_##TYPE##_8("@other ") "ld.shared.b32 code, [p]; add.u32 p, p, 4;\n" \
  "add.rn.f32 v, v, u; st.shared.f32 [s], v; add.u32 s, s, 132;\n" DEQCORE_JUMP

#define DEQCORE_8_OF(HOW, from, i) \
  HOW(from[i]), HOW(from[i + 1]), HOW(from[i + 2]), HOW(from[i + 3]), \
  HOW(from[i + 4]), HOW(from[i + 5]), HOW(from[i + 6]), HOW(from[i + 7])
#define DEQCORE_32_OF(HOW, from, i) \
  DEQCORE_8_OF(HOW, from, i), DEQCORE_8_OF(HOW, from, i + 8), \
  DEQCORE_8_OF(HOW, from, i + 16), DEQCORE_8_OF(HOW, from, i + 24)
#define DEQCORE_64_OF(HOW, from) DEQCORE_32_OF(HOW, from, 0), DEQCORE_32_OF(HOW, from, 32)
#define DEQCORE_CHANGED(number) "+f"(number)
#define DEQCORE_READ(number) "f"(number)

#define DEQCORE_RUN_LINEAR(BITS, ROWS, LOAD, BATCH, OWN, SUMS) \
  asm volatile(DEQCORE_START(BITS, LOAD, OWN, \
                 "ld.shared.v4.b32 {q, at, v, code}, [" BATCH "]; add.u32 p, " BATCH ", 16;\n") \
               ROWS DEQCORE_END : SUMS : "r"(from), "r"(own) : "memory")
// By type, of the shapes.
#define DEQCORE_LINEAR_8X8(TYPE) \
  DEQCORE_RUN_LINEAR(DEQCORE_BITS_8, DEQCORE_ROWS_8X8(DEQCORE_LINEAR_8, TYPE), DEQCORE_LOAD_##TYPE##_8, \
                     "%64", "%65", DEQCORE_64_OF(DEQCORE_CHANGED, sums))
#define DEQCORE_LINEAR_16X4(TYPE) \
  DEQCORE_RUN_LINEAR(DEQCORE_BITS_16, DEQCORE_ROWS_16X4(DEQCORE_LINEAR_16_4, TYPE), \
                     DEQCORE_LOAD_##TYPE##_4, "%64", "%65", DEQCORE_64_OF(DEQCORE_CHANGED, sums))
#define DEQCORE_LINEAR_8X4(TYPE) \
  DEQCORE_RUN_LINEAR(DEQCORE_BITS_8, DEQCORE_ROWS_8X4(DEQCORE_LINEAR_8_4, TYPE), DEQCORE_LOAD_##TYPE##_4, \
                     "%32", "%33", DEQCORE_32_OF(DEQCORE_CHANGED, sums, 0))
#define DEQCORE_OUTER_8X8(TYPE) \
  asm volatile(DEQCORE_START(DEQCORE_BITS_8, DEQCORE_LOAD_##TYPE##_8, "%65", "mov.b32 s, %66;\n" \
                 "ld.shared.v2.b32 {q, code}, [%64]; add.u32 p, %64, 8;\n") \
               DEQCORE_ROWS_8X8(DEQCORE_OUTER_8, TYPE) DEQCORE_END \
               : : DEQCORE_64_OF(DEQCORE_READ, left), "r"(from), "r"(own), "r"(to) : "memory")
// For the type S.
#define DEQCORE_FOR_TYPE(WHAT) \
  if constexpr (__is_same(S, float)) { \
    WHAT(F32); \
  } else if constexpr (__is_same(S, BFloat16)) { \
    WHAT(BF16); \
  } else { \
    WHAT(F16); \
  }
// clang-format on

DEQCORE_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

#elif !defined(__CUDACC__)

// Calls run(number of the instruction, row, x) for each of a batch.
template <typename Batch, typename S, int kRows, int kTokens, typename Run>
DEQCORE_DEVICE void run_codes(const uint32_t* batch, const char* columns, const Run& run) {
  using L = LaneTokens<S, kTokens>;
  float x[kTokens] = {};
  for (int i = 0;; ++i) {
    const uint32_t code = batch[Batch::code(i)] & ~kLastBatch;
    const int row = static_cast<int>(code % kOtherColumn);
    if (row == kRows) return;
    const bool load = i == 0 || (code & kOtherColumn) != 0;
    for (int t = 0; load && t < kTokens; ++t) {
      const S* const from = reinterpret_cast<const S*>(columns + code / 256);
      x[t] = to_compute(from[L::token(0, t)]);
    }
    run(i, row, x);
  }
}

#endif

// A batch of values and codes: sums[row, token] += value * x[column, token], rounded once, where
// the sums are [kRows, kTokens] and `columns` is where the lane's tokens of a chunk begin.
template <typename S, int kRows, int kTokens>
DEQCORE_DEVICE void run_linear(const uint32_t* batch, const char* columns,
                               float (&sums)[kRows * kTokens]) {
#if defined(__CUDA_ARCH__)
  const uint32_t from = shared_address(batch), own = shared_address(columns);
  if constexpr (kTokens == 8) {
    DEQCORE_FOR_TYPE(DEQCORE_LINEAR_8X8)
  } else if constexpr (kRows == 16) {
    DEQCORE_FOR_TYPE(DEQCORE_LINEAR_16X4)
  } else {
    DEQCORE_FOR_TYPE(DEQCORE_LINEAR_8X4)
  }
#elif !defined(__CUDACC__)
  run_codes<ValueBatch, S, kRows, kTokens>(batch, columns, [&](int i, int row, const float* x) {
    float value;
    memcpy(&value, batch + ValueBatch::value(i), sizeof(value));
    float* const own = sums + row * kTokens;
    for (int t = 0; t < kTokens; ++t) own[t] = fma(value, x[t], own[t]);
  });
#endif
}

// A batch of codes: parts[i * kPartStride] = the lane's part of entry i, the sum over its tokens of
// left[row, token] * x[column, token]; 8 rows, 8 tokens.
template <typename S>
DEQCORE_DEVICE void run_outer(const uint32_t* batch, const char* columns, float* parts,
                              const float (&left)[64]) {
#if defined(__CUDA_ARCH__)
  const uint32_t from = shared_address(batch), own = shared_address(columns);
  const uint32_t to = shared_address(parts);
  DEQCORE_FOR_TYPE(DEQCORE_OUTER_8X8)
#elif !defined(__CUDACC__)
  run_codes<CodeBatch, S, 8, 8>(batch, columns, [&](int i, int row, const float* x) {
    const float* const own = left + row * 8;
    float low = own[0] * x[0], high = own[4] * x[4];
    for (int t = 1; t < 4; ++t) {
      low = fma(own[t], x[t], low);
      high = fma(own[4 + t], x[4 + t], high);
    }
    parts[i * kPartStride] = low + high;
  });
#endif
}

}  // namespace deqcore::cuda
