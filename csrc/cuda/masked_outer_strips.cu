// masked_outer's CUDA kernels for many tokens in float32, bfloat16 and float16: strips of rows
// whose tokens a warp holds in registers, and their entries as code. No torch.
//
// Two launches. The first one turns both operands round, so that the tokens of a column lie side by
// side, and writes each strip's code. In the second a block takes kStripWarps strips and some
// chunks of columns, and goes through all tokens, a tile at a time: chunks of the right operand
// pass through shared memory. An instruction leaves each lane's part of an entry's sum in shared
// memory; after a batch, each lane adds up the parts of one entry.
//
// The order of an entry's sum: a lane's tokens of a tile in two chains, the lanes in four, the
// tiles in turn. It depends on the number of tokens alone.
#include "cuda/masked_outer.h"
#include "cuda/strip_code.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kRows = 8;    // of a strip
constexpr int kTokens = 8;  // of a lane
template <typename S>
using Tile = LaneTokens<S, kTokens>;
constexpr int kStripWarps = 20;  // of a block, a strip each
constexpr int kThreads = kStripWarps * kWarp;
constexpr int64_t kMostBytes = 96 * 1024;  // of a chunk
constexpr int kWords = CodeBatch::kWords;
constexpr int kWarpWords = (kWords + CodeBatch::kEntries * kPartStride + 3) / 4 * 4;
constexpr int64_t kBatchBytes = kStripWarps * kWarpWords * 4;

template <typename S>
struct Prepared {
  Streams streams;
  S* left;      // [rows, padded]
  S* right;     // [width, padded]
  float* sums;  // for each code
  int64_t padded;
  int64_t strips;
  int64_t chunks_of_a_block;
};

template <typename S>
__global__ void __launch_bounds__(kTurnThreads, 4)
    masked_outer_write_strips(const SparseRows entries, const Prepared<S> ready, const Turned left,
                              const Turned right, const StripBlocks blocks) {
  DEQCORE_SHARED_DOUBLES(shared);
  if (!blocks.has(blockIdx.x)) {
    const int64_t square = blocks.other(blockIdx.x);
    const int64_t of_left = turn_blocks(left);
    S* const scratch = reinterpret_cast<S*>(shared);
    if (square < of_left) {
      turn_square(left, square, scratch);
    } else {
      turn_square(right, square - of_left, scratch);
    }
    return;
  }
  int32_t* const words = static_cast<int32_t*>(ready.streams.batches);
  int32_t* const where = ready.streams.where;
  const auto put = [&](int64_t batch, int i, int entry, bool ends) {
    where[batch * kWords + i] = entry;
    if (ends) words[batch * kWords + CodeBatch::kCount] = i + 1;
  };
  write_stream<CodeBatch, kRows>(
      entries, ready.streams, blocks.strip(blockIdx.x), reinterpret_cast<SegmentScratch*>(shared),
      put, [&](int64_t batch) { words[batch * kWords + CodeBatch::kCount] = 0; });
}

// A lane's tokens of the rows of a strip, as far as they are there.
template <typename S>
DEQCORE_DEVICE void load_rows(const S* from, int64_t padded, int64_t rows, int lane,
                              float (&to)[kRows * kTokens]) {
  using Part = typename Tile<S>::Part;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int t = 0; t < kTokens; t += Tile<S>::kGroup) {
      count_read(sizeof(Part), false);
      const auto part = *reinterpret_cast<const Part*>(from + r * padded + Tile<S>::token(lane, t));
#pragma unroll
      for (int i = 0; i < Tile<S>::kGroup; ++i) to[r * kTokens + t + i] = to_compute(part.at[i]);
    }
  }
}

DEQCORE_DEVICE float add_parts(const float* parts) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kWarp; ++i) sums[i % 4] += parts[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    masked_outer_by_strips(const MaskedOuterArgs args, const Prepared<S> ready) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int columns = ready.streams.columns, chunk_bytes = columns * Tile<S>::kColumnBytes;
  const int64_t width = args.entries.width, all = ready.streams.chunks;
  char* const buffers = reinterpret_cast<char*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int64_t row_tiles = blocks_for(ready.strips, kStripWarps);
  const int64_t strip = blockIdx.x % row_tiles * kStripWarps + warp;
  const bool has_rows = strip < ready.strips;
  const int64_t first_chunk = blockIdx.x / row_tiles * ready.chunks_of_a_block;
  const int64_t left_over = all - first_chunk, most = ready.chunks_of_a_block;
  const int64_t chunks = left_over < most ? left_over : most;
  const int64_t tiles = ready.padded / Tile<S>::kWidth, steps = tiles * chunks;
  uint32_t* const batch =
      reinterpret_cast<uint32_t*>(buffers + 2 * chunk_bytes) + warp * kWarpWords;
  float* const parts = reinterpret_cast<float*>(batch + kWords);

  const uint32_t* const codes = static_cast<const uint32_t*>(ready.streams.batches);
  const int64_t first = has_rows ? ready.streams.starts[strip * all + first_chunk] : 0;
  int64_t own = first;
  uint32_t code = codes[own * kWords + lane];
  const auto fetch = [&](int64_t step) {
    fetch_columns<Tile<S>, kThreads>(ready.right, ready.padded, width, step / chunks,
                                     (first_chunk + step % chunks) * columns, columns,
                                     buffers + step % 2 * chunk_bytes);
  };
  float left[kRows * kTokens] = {};
  fetch(0);
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t tile = step / chunks;
    wait_for_copies();
    __syncthreads();  // all see this chunk, and none still reads the one before it
    if (step + 1 < steps) fetch(step + 1);
    if (!has_rows) continue;
    if (step % chunks == 0) {
      load_rows(ready.left + strip * kRows * ready.padded + tile * Tile<S>::kWidth, ready.padded,
                args.entries.rows - strip * kRows, lane, left);
    }
    const bool tile_ends = (step + 1) % chunks == 0;
    const char* const x = buffers + step % 2 * chunk_bytes + lane * sizeof(typename Tile<S>::Part);
    bool last = false;
#pragma unroll 1
    while (!last) {
      __syncwarp();
      batch[lane] = code;
      __syncwarp();
      const int count = static_cast<int>(batch[CodeBatch::kCount]);
      last = (batch[0] & kLastBatch) != 0;
      const int64_t at = own * kWords + lane;
      own = last && tile_ends ? first : own + 1;
      code = codes[own * kWords + lane];  // of the next batch, while this one runs
      float sum = tile > 0 && lane < count ? ready.sums[at] : 0.0f;
      run_outer<S>(batch, x, parts + lane, left);
      __syncwarp();
      if (lane >= count) continue;
      sum += add_parts(parts + kPartStride * lane);
      if (tile + 1 < tiles) {
        ready.sums[at] = sum;
      } else {
        static_cast<S*>(args.values)[ready.streams.where[at]] = from_compute<S>(sum);
      }
    }
  }
}

template <typename S>
Prepared<S> prepare_in(const MaskedOuterArgs& args, Pieces& pieces) {
  const SparseRows& entries = args.entries;
  Prepared<S> ready{};
  ready.padded = padded_tokens(args.tokens, Tile<S>::kWidth);
  ready.strips = blocks_for(entries.rows, kRows);
  Streams& streams = ready.streams;
  streams.columns = columns_of_chunk<Tile<S>>(entries.width, kMostBytes, kBatchBytes);
  streams.column_bytes = Tile<S>::kColumnBytes;
  streams.chunks = blocks_for(entries.width, streams.columns);
  const int64_t words = stream_words<CodeBatch>(entries, ready.strips, streams.chunks);
  streams.batches = pieces.take<uint32_t>(words);
  streams.where = pieces.take<int32_t>(words);
  streams.starts = pieces.take<int32_t>(ready.strips * streams.chunks);
  ready.sums = pieces.take<float>(words);
  ready.left = pieces.take<S>(entries.rows * ready.padded);
  ready.right = pieces.take<S>(entries.width * ready.padded);
  // Blocks that run at once: as many as there are multiprocessors, where there is so much work.
  const int64_t row_tiles = blocks_for(ready.strips, kStripWarps);
  const int64_t at_once = multiprocessors() > row_tiles ? multiprocessors() / row_tiles : 1;
  ready.chunks_of_a_block = blocks_for(streams.chunks, at_once);
  return ready;
}

template <typename S>
const char* launch_strips(const MaskedOuterArgs& args, void* workspace, Stream stream) {
  const SparseRows& entries = args.entries;
  Pieces pieces(workspace);
  const Prepared<S> ready = prepare_in<S>(args, pieces);
  const Turned left{args.left, ready.left, args.tokens, ready.padded, entries.rows};
  const Turned right{args.right, ready.right, args.tokens, ready.padded, entries.width};
  const int64_t squares = turn_blocks(left) + turn_blocks(right);
  const char* const error =
      launch(masked_outer_write_strips<S>, ready.strips + squares, kTurnThreads, kStreamBytes,
             stream, entries, ready, left, right, StripBlocks(ready.strips, squares));
  if (error != nullptr) return error;
  const int64_t blocks = blocks_for(ready.strips, kStripWarps) *
                         blocks_for(ready.streams.chunks, ready.chunks_of_a_block);
  const int64_t bytes = 2 * int64_t{ready.streams.columns} * Tile<S>::kColumnBytes + kBatchBytes;
  return launch(masked_outer_by_strips<S>, blocks, kThreads, bytes, stream, args, ready);
}

}  // namespace

int64_t masked_outer_strips_bytes(const MaskedOuterArgs& args, Dtype type) {
  return with_narrow_dtype(type, [&]<typename S>() {
    Pieces pieces(nullptr);
    prepare_in<S>(args, pieces);
    return pieces.used();
  });
}

const char* masked_outer_strips(const MaskedOuterArgs& args, Dtype type, void* workspace,
                                void* stream) {
  return with_narrow_dtype(type, [&]<typename S>() {
    return launch_strips<S>(args, workspace, static_cast<Stream>(stream));
  });
}

}  // namespace deqcore::cuda
