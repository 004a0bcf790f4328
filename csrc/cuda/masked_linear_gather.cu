// masked_linear's CUDA kernel for a token or a few in float32, bfloat16 and float16, as many as fit
// 16 bytes: a block holds all of x in shared memory, the tokens of a column side by side, and its
// warps read the rows of the weight as they are stored. One launch, no scratch memory. No torch.
//
// What it takes is the time to read the weight: 4 bytes of column and its value for each entry.
// An entry of y is added up by the lanes of a warp, each in the order of its entries, and then over
// the lanes in a tree: for each token alone, but not as the other kernels do it.
#include "cuda/masked_layout.h"
#include "cuda/masked_linear.h"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kAtOnce = 8;    // entries that a lane asks for
constexpr int kMostRows = 8;  // of a warp

// x [kTokens, width] to shared memory, turned round.
template <typename S, int kTokens>
DEQCORE_DEVICE void turn_tokens(const MaskedLinearArgs& args, Pack<S, kTokens>* to) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(S));
  const int64_t width = args.weight.width;
  const S* const x = static_cast<const S*>(args.x);
  const bool aligned = width % kWidth == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  for (int64_t c = threadIdx.x * kWidth; c < width; c += kThreads * kWidth) {
    Pack<S, kWidth> packs[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      packs[t] = {};
      if (t >= args.tokens) continue;
      const S* const from = x + t * width + c;
      packs[t] =
          aligned ? load<true, kWidth>(from, width - c) : load<false, kWidth>(from, width - c);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (c + k >= width) continue;
      Pack<S, kTokens> column;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) column.at[t] = packs[t].at[k];
      to[c + k] = column;
    }
  }
}

// Adds up what this lane has of a row. kTurned: the weight is the transpose of what is stored.
template <typename S, int kTokens, bool kTurned>
DEQCORE_DEVICE void add_row(const MaskedLinearArgs& args, int64_t row, int lane,
                            const Pack<S, kTokens>* x, Compute<S> (&sums)[kTokens]) {
  const SparseRows& weight = args.weight;
  const S* const values = static_cast<const S*>(args.values);
  const int end = weight.offsets[row + 1];
#pragma unroll 1
  for (int first = weight.offsets[row] + lane; first < end; first += kAtOnce * kWarp) {
    int columns[kAtOnce], from[kAtOnce];
    S own[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = first + k * kWarp;
      if (i < end) columns[k] = weight.columns[i];
      from[k] = i < end && kTurned ? weight.position[i] : i;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k * kWarp < end) own[k] = values[from[k]];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k * kWarp >= end) continue;
      const Pack<S, kTokens> column = x[columns[k]];
      const Compute<S> value = to_compute(own[k]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums[t] = fma(value, to_compute(column.at[t]), sums[t]);
    }
  }
}

template <typename S, int kTokens, bool kTurned>
__global__ void __launch_bounds__(kThreads)
    masked_linear_by_gathering(const MaskedLinearArgs args, const int rows_of_a_warp) {
  DEQCORE_SHARED_DOUBLES(shared);
  const SparseRows& weight = args.weight;
  // Sums of the block's rows, and x.
  Compute<S>* const out = reinterpret_cast<Compute<S>*>(shared);
  const auto x = reinterpret_cast<Pack<S, kTokens>*>(out + kWarps * kMostRows * kTokens);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int rows = kWarps * rows_of_a_warp;
  const int64_t first_row = int64_t{blockIdx.x} * rows;
  turn_tokens<S, kTokens>(args, x);
  __syncthreads();
  for (int r = warp; r < rows && first_row + r < weight.rows; r += kWarps) {
    Compute<S> sums[kTokens] = {};
    add_row<S, kTokens, kTurned>(args, first_row + r, lane, x, sums);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        sums[t] += __shfl_xor_sync(kWholeWarp, sums[t], distance);
      }
      if (lane == 0) out[t * rows + r] = sums[t];
    }
  }
  __syncthreads();
  const S* const bias = static_cast<const S*>(args.bias);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kTokens; i += kThreads) {
    const int64_t token = i / rows, row = first_row + i % rows;
    if (token >= args.tokens || row >= weight.rows) continue;
    Compute<S> sum = out[i];
    if (bias != nullptr) sum += to_compute(bias[row]);
    count_write(sizeof(S));
    static_cast<S*>(args.y)[token * weight.rows + row] = from_compute<S>(sum);
  }
}

template <typename S>
constexpr int kMostTokens = 16 / sizeof(S);

template <typename S>
int64_t shared_bytes(int64_t tokens, int64_t width) {
  return kWarps * kMostRows * tokens * sizeof(Compute<S>) + width * tokens * sizeof(S);
}

template <typename S, int kTokens>
const char* launch_tokens(const MaskedLinearArgs& args, Stream stream) {
  // About a block for each multiprocessor, because each reads x.
  const int64_t rows = args.weight.rows, even = rows / (kWarps * multiprocessors());
  const int64_t rows_of_a_warp = even < 1 ? 1 : even > kMostRows ? kMostRows : even;
  const int64_t blocks = blocks_for(rows, kWarps * rows_of_a_warp);
  const int64_t bytes = shared_bytes<S>(kTokens, args.weight.width);
  const int each = static_cast<int>(rows_of_a_warp);
  return args.weight.position == nullptr ? launch(masked_linear_by_gathering<S, kTokens, false>,
                                                  blocks, kThreads, bytes, stream, args, each)
                                         : launch(masked_linear_by_gathering<S, kTokens, true>,
                                                  blocks, kThreads, bytes, stream, args, each);
}

template <typename S>
const char* launch_type(const MaskedLinearArgs& args, Stream stream) {
  if (args.tokens == 1) return launch_tokens<S, 1>(args, stream);
  if (args.tokens == 2) return launch_tokens<S, 2>(args, stream);
  if (args.tokens <= 4) return launch_tokens<S, 4>(args, stream);
  if constexpr (kMostTokens<S> == 8) {
    if (args.tokens <= 8) return launch_tokens<S, 8>(args, stream);
  }
  return "too many tokens to gather";
}

}  // namespace

bool masked_linear_can_gather(const MaskedLinearArgs& args, Dtype type) {
  if (type == Dtype::f64) return false;
  return with_narrow_dtype(type, [&]<typename S>() {
    constexpr int64_t kMost = kMostTokens<S>;
    return args.tokens <= kMost && shared_bytes<S>(kMost, args.weight.width) <= most_shared_bytes();
  });
}

const char* masked_linear_gather(const MaskedLinearArgs& args, Dtype type, void* stream) {
  return with_narrow_dtype(
      type, [&]<typename S>() { return launch_type<S>(args, static_cast<Stream>(stream)); });
}

}  // namespace deqcore::cuda
