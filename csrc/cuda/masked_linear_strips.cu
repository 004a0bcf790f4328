// masked_linear's CUDA kernels for many tokens in float32, bfloat16 and float16: strips of rows
// whose sums a warp holds in registers, and their entries as code. No torch.
//
// Two launches. The first one turns x round, so that the tokens of a column lie side by side, and
// writes each strip's code. In the second a block takes a tile of tokens and kWarps strips,
// while chunks of x pass through shared memory. docs/architecture.md counts what bounds it.
#include "cuda/masked_linear.h"
#include "cuda/strip_code.cuh"

namespace deqcore::cuda {
namespace {

template <typename S>
struct Prepared {
  Streams streams;
  S* turned;  // [width, padded]
  int64_t padded;
  int64_t strips;
};

// A strip: kRows rows, and kTokens tokens of each lane. A block: kWarps strips, and chunks of at
// most kMostBytes.
template <typename S, int kRowsOfAStrip, int kTokensOfALane, int kWarpsOfABlock, int kMost>
struct Strip : LaneTokens<S, kTokensOfALane> {
  static constexpr int kRows = kRowsOfAStrip;
  static constexpr int kWarps = kWarpsOfABlock;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kMostBytes = kMost;
  static constexpr int kSums = kRows * kTokensOfALane;
  static constexpr int kTileRows = kWarps * kRows;
  static constexpr int kStride = kTileRows + 16 / static_cast<int>(sizeof(S));  // of a stored token
  static constexpr int64_t kStoreBytes = kWarp * kStride * sizeof(S);
  static constexpr int64_t kBatchBytes = kWarps * ValueBatch::kWords * 4;
};
template <typename S>
using Wide = Strip<S, 8, 8, 20, 96 * 1024>;
template <typename S>
using Tall = Strip<S, 16, 4, 20, 96 * 1024>;
template <typename S>
using Small = Strip<S, 8, 4, 8, 24 * 1024>;  // so that several blocks share a multiprocessor

template <typename S, typename T>
__global__ void __launch_bounds__(kTurnThreads, 4)
    masked_linear_write_strips(const MaskedLinearArgs args, const Prepared<S> ready,
                               const Turned turned, const StripBlocks blocks) {
  DEQCORE_SHARED_DOUBLES(shared);
  if (!blocks.has(blockIdx.x)) {
    turn_square(turned, blocks.other(blockIdx.x), reinterpret_cast<S*>(shared));
    return;
  }
  const SparseRows& weight = args.weight;
  float* const words = static_cast<float*>(ready.streams.batches);
  const auto put = [&](int64_t batch, int i, int entry, bool) {
    const int64_t from = weight.position != nullptr ? weight.position[entry] : entry;
    words[batch * ValueBatch::kWords + ValueBatch::value(i)] =
        to_compute(static_cast<const S*>(args.values)[from]);
  };
  write_stream<ValueBatch, T::kRows>(weight, ready.streams, blocks.strip(blockIdx.x),
                                     reinterpret_cast<SegmentScratch*>(shared), put,
                                     [](int64_t) {});
}

// A block's sums, with the bias, to y. They pass through shared memory, so that neighbouring
// threads write neighbouring rows of a token.
template <typename S, typename T>
DEQCORE_DEVICE void store_tile(const MaskedLinearArgs& args, int64_t first_row, int64_t tile,
                               const float (&sums)[T::kSums], S* scratch, bool aligned) {
  constexpr int kWhole = T::kWhole, kPieces = T::kTileRows / kWhole;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int own = thread / kWarp * T::kRows;  // the warp's first row
  const S* const bias = static_cast<const S*>(args.bias);
#pragma unroll
  for (int t = 0; t < T::kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < T::kRows; r += kWhole) {
      Pack<S, kWhole> out;
#pragma unroll
      for (int i = 0; i < kWhole; ++i) {
        const int64_t row = first_row + own + r + i;
        float sum = sums[(r + i) * T::kTokens + t];
        if (bias != nullptr && row < args.weight.rows) sum += to_compute(bias[row]);
        out.at[i] = from_compute<S>(sum);
      }
      *reinterpret_cast<Pack<S, kWhole>*>(scratch + lane * T::kStride + own + r) = out;
    }
    __syncthreads();
    for (int i = thread; i < kWarp * kPieces; i += T::kThreads) {
      const int from = i / kPieces, r = i % kPieces * kWhole;
      const int64_t token = tile * T::kWidth + T::token(from, t);
      const int64_t left = args.weight.rows - first_row - r;
      if (token >= args.tokens || left <= 0) continue;
      const auto out = *reinterpret_cast<const Pack<S, kWhole>*>(scratch + from * T::kStride + r);
      S* const to = static_cast<S*>(args.y) + token * args.weight.rows + first_row + r;
      if (aligned && left >= kWhole) {
        store_whole(to, out);
      } else {
        store<false, kWhole>(to, out, left);
      }
    }
    __syncthreads();
  }
}

template <typename S, typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    masked_linear_by_strips(const MaskedLinearArgs args, const Prepared<S> ready,
                            const bool aligned) {
  DEQCORE_SHARED_DOUBLES(shared);
  using Part = Pack<uint32_t, 4>;
  constexpr int kParts = ValueBatch::kWords / 4;
  static_assert(kParts == kWarp);
  const int columns = ready.streams.columns, chunk_bytes = columns * T::kColumnBytes;
  const int64_t width = args.weight.width, chunks = ready.streams.chunks;
  char* const buffers = reinterpret_cast<char*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarp, 0);
  // Blocks that run together share a tile of tokens, which the L2 cache then keeps.
  const int64_t row_tiles = blocks_for(ready.strips, T::kWarps);
  const int64_t tile = blockIdx.x / row_tiles;
  const int64_t strip = blockIdx.x % row_tiles * T::kWarps + warp;
  const bool has_rows = strip < ready.strips;
  uint32_t* const batch =
      reinterpret_cast<uint32_t*>(buffers + 2 * chunk_bytes) + warp * ValueBatch::kWords;
  const Part* next = static_cast<const Part*>(ready.streams.batches) + lane;
  if (has_rows) next += int64_t{ready.streams.starts[strip * chunks]} * kParts;
  Part part = *next;

  float sums[T::kSums] = {};
  fetch_columns<T, T::kThreads>(ready.turned, ready.padded, width, tile, 0, columns, buffers);
#pragma unroll 1
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies();
    __syncthreads();  // all see this chunk, and none still reads the one before it
    if (chunk + 1 < chunks) {
      fetch_columns<T, T::kThreads>(ready.turned, ready.padded, width, tile, (chunk + 1) * columns,
                                    columns, buffers + (chunk + 1) % 2 * chunk_bytes);
    }
    if (!has_rows) continue;
    const char* const own = buffers + chunk % 2 * chunk_bytes + lane * sizeof(typename T::Part);
    bool last = false;
#pragma unroll 1
    while (!last) {
      __syncwarp();
      reinterpret_cast<Part*>(batch)[lane] = part;
      __syncwarp();
      next += kParts;
      part = *next;  // of the next batch, while this one runs
      last = (batch[0] & kLastBatch) != 0;
      run_linear<S, T::kRows, T::kTokens>(batch, own, sums);
    }
  }
  __syncthreads();  // none still reads a chunk
  store_tile<S, T>(args, blockIdx.x % row_tiles * T::kTileRows, tile, sums,
                   reinterpret_cast<S*>(buffers), aligned);
}

template <typename S, typename T>
Prepared<S> prepare_in(const MaskedLinearArgs& args, Pieces& pieces) {
  const SparseRows& weight = args.weight;
  Prepared<S> ready{};
  ready.padded = padded_tokens(args.tokens, T::kWidth);
  ready.strips = blocks_for(weight.rows, T::kRows);
  Streams& streams = ready.streams;
  streams.columns = columns_of_chunk<T>(weight.width, T::kMostBytes, T::kBatchBytes);
  streams.column_bytes = T::kColumnBytes;
  streams.chunks = weight.width > 0 ? blocks_for(weight.width, streams.columns) : 1;
  streams.batches =
      pieces.take<uint32_t>(stream_words<ValueBatch>(weight, ready.strips, streams.chunks));
  streams.starts = pieces.take<int32_t>(ready.strips * streams.chunks);
  ready.turned = pieces.take<S>(weight.width * ready.padded);
  return ready;
}

template <typename S, typename T>
const char* launch_strips(const MaskedLinearArgs& args, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const Prepared<S> ready = prepare_in<S, T>(args, pieces);
  const Turned turned{args.x, ready.turned, args.tokens, ready.padded, args.weight.width};
  const int64_t squares = turn_blocks(turned);
  const char* const error =
      launch(masked_linear_write_strips<S, T>, ready.strips + squares, kTurnThreads, kStreamBytes,
             stream, args, ready, turned, StripBlocks(ready.strips, squares));
  if (error != nullptr) return error;

  const int64_t blocks = blocks_for(ready.strips, T::kWarps) * (ready.padded / T::kWidth);
  const int64_t chunks = 2 * int64_t{ready.streams.columns} * T::kColumnBytes + T::kBatchBytes;
  const int64_t bytes = chunks > T::kStoreBytes ? chunks : T::kStoreBytes;
  // A tile's rows of y begin at a multiple of 16 bytes if each row of y does.
  const bool aligned = args.weight.rows * sizeof(S) % 16 == 0 && are_aligned(16, {args.y});
  return launch(masked_linear_by_strips<S, T>, blocks, T::kThreads, bytes, stream, args, ready,
                aligned);
}

// Calls run.operator()<S, Strip>().
template <typename Run>
auto with_strip(const MaskedLinearArgs& args, Dtype type, bool large, const Run& run) {
  const auto with = [&]<typename S>() {
    if (!large) return run.template operator()<S, Small<S>>();
    // Where few entries share a column, more rows that share the chunks of x matter more.
    const bool sparse = args.weight.kept * 40 < args.weight.rows * args.weight.width;
    return sparse ? run.template operator()<S, Tall<S>>() : run.template operator()<S, Wide<S>>();
  };
  if (type == Dtype::f32) return with.template operator()<float>();
  if (type == Dtype::bf16) return with.template operator()<BFloat16>();
  return with.template operator()<Half>();
}

}  // namespace

int64_t masked_linear_strips_bytes(const MaskedLinearArgs& args, Dtype type, bool large) {
  return with_strip(args, type, large, [&]<typename S, typename T>() {
    Pieces pieces(nullptr);
    prepare_in<S, T>(args, pieces);
    return pieces.used();
  });
}

const char* masked_linear_strips(const MaskedLinearArgs& args, Dtype type, bool large,
                                 void* workspace, void* stream) {
  return with_strip(args, type, large, [&]<typename S, typename T>() {
    return launch_strips<S, T>(args, workspace, static_cast<Stream>(stream));
  });
}

}  // namespace deqcore::cuda
