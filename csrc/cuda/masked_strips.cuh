// Strips: neighbouring rows of a weight whose sums, or numbers, a warp holds in registers, and
// their entries as a stream of code that the warp runs.
//
// An entry is one instruction: which row of the strip it belongs to, and whether its column of the
// other operand is another one than before. Entries of a strip go by column after column, so that a
// column is loaded from shared memory once for all rows of the strip that have an entry in it;
// within a row their order is that of the columns. They come in batches, each of which ends with an
// instruction of its own; a chunk of columns has one at least, and the first code of its last one
// is marked.
#pragma once

#include <cstdint>

#include "cuda/masked_tile.cuh"
#include "cuda/path.h"

namespace deqcore::cuda {

constexpr int kSegmentColumns = 4608;      // that are sorted at a time
constexpr int kSegmentChunks = 128;        // at most
constexpr uint32_t kLastBatch = 1u << 31;  // in a batch's first code
constexpr uint32_t kOtherColumn = 128;     // in a code: not that of the entry before

// A code: the row (kRows: the end of the batch), marks, and from bit 8 on where the column is in
// its chunk, in bytes.
struct Streams {
  void* batches;
  int32_t* starts;  // [strips, chunks]: the first batch of each chunk
  int32_t* where;   // for each code, which entry it is; or null
  int columns;      // of a chunk
  int column_bytes;
  int64_t chunks;
};

// Values beside codes: 64 slots of 8 bytes. Slot 0 has the first code, slot i + 1 the value of
// entry i and the code of entry i + 1.
struct ValueBatch {
  static constexpr int kEntries = 62;
  static constexpr int kWords = 128;
  DEQCORE_DEVICE static int code(int i) { return i == 0 ? 0 : 2 * i + 1; }
  DEQCORE_DEVICE static int value(int i) { return 2 * i + 2; }
};
// Codes alone, and how many entries they are.
struct CodeBatch {
  static constexpr int kEntries = 30;
  static constexpr int kWords = 32;
  static constexpr int kCount = 31;
  DEQCORE_DEVICE static int code(int i) { return i; }
};

// At most as many batches as there are.
template <typename Batch>
DEQCORE_HD int64_t batches_before(int64_t entries, int64_t strip, int64_t chunks) {
  return entries / Batch::kEntries + strip * chunks;
}
template <typename Batch>
int64_t stream_words(const SparseRows& weight, int64_t strips, int64_t chunks) {
  // One more is read ahead of its use.
  return (batches_before<Batch>(weight.kept, strips, chunks) + 1) * Batch::kWords;
}

// Scratch in shared memory for one segment of a strip.
struct SegmentScratch {
  uint32_t rows[kSegmentColumns];    // a bit for each row with an entry in the column
  uint16_t before[kSegmentColumns];  // entries before it in its chunk
  int32_t entries[kSegmentChunks];
  int32_t first_batch[kSegmentChunks + 1];
  int32_t begin[kWarp], end[kWarp];  // entries of each row
};

constexpr int64_t kStreamBytes = sizeof(SegmentScratch);  // of shared memory; enough to turn, too

// Inclusive over the lanes.
DEQCORE_DEVICE int scan_warp(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_sync(kWholeWarp, value, (lane - distance) & (kWarp - 1));
    if (lane >= distance) value += other;
  }
  return value;
}

// Marks which rows have entries in which columns of the segment, and finds where those end.
template <int kRows>
DEQCORE_DEVICE void mark_entries(const SparseRows& weight, int64_t first_row, int64_t column,
                                 int64_t limit, SegmentScratch* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int r = warp; r < kRows && first_row + r < weight.rows; r += kTurnThreads / kWarp) {
    const int begin = scratch->begin[r], end = weight.offsets[first_row + r + 1];
    int found = 0;
    for (int i = begin + lane; i < end; i += kWarp) {
      const int at = weight.columns[i];
      if (at >= limit) break;
      atomicOr(&scratch->rows[at - column], 1u << r);
      ++found;
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      found += __shfl_xor_sync(kWholeWarp, found, distance);
    }
    if (lane == 0) scratch->end[r] = begin + found;
  }
}

// Where the entries of each column begin in their chunk; a warp takes a chunk.
DEQCORE_DEVICE void count_entries(const Streams& streams, int chunks, SegmentScratch* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int chunk = warp; chunk < chunks; chunk += kTurnThreads / kWarp) {
    int before = 0;
    for (int c = 0; c < streams.columns; c += kWarp) {
      const int column = chunk * streams.columns + c + lane;
      const bool there = c + lane < streams.columns;
      const int own = there ? __popc(scratch->rows[column]) : 0;
      const int upto = scan_warp(own, lane);
      if (there) scratch->before[column] = static_cast<uint16_t>(before + upto - own);
      before += __shfl_sync(kWholeWarp, upto, kWarp - 1);
    }
    if (lane == 0) scratch->entries[chunk] = before;
  }
}

// Where the batches of each chunk begin; by one warp.
template <typename Batch>
DEQCORE_DEVICE void place_batches(int chunks, int lane, SegmentScratch* scratch) {
  int before = 0;
  for (int c = 0; c < chunks; c += kWarp) {
    int own = 0;
    if (c + lane < chunks) {
      const int full = (scratch->entries[c + lane] + Batch::kEntries - 1) / Batch::kEntries;
      own = full > 0 ? full : 1;
    }
    const int upto = scan_warp(own, lane);
    if (c + lane < chunks) scratch->first_batch[c + lane] = before + upto - own;
    before += __shfl_sync(kWholeWarp, upto, kWarp - 1);
  }
  if (lane == 0) scratch->first_batch[chunks] = before;
}

// Writes the codes, and what goes with them, of the entries of one segment.
template <typename Batch, int kRows, typename Put>
DEQCORE_DEVICE void write_codes(const SparseRows& weight, const Streams& streams, int64_t first_row,
                                int64_t column, int64_t batch, const SegmentScratch* scratch,
                                const Put& put) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  uint32_t* const words = static_cast<uint32_t*>(streams.batches);
  for (int r = warp; r < kRows && first_row + r < weight.rows; r += kTurnThreads / kWarp) {
    for (int i = scratch->begin[r] + lane; i < scratch->end[r]; i += kWarp) {
      const int at = static_cast<int>(weight.columns[i] - column), chunk = at / streams.columns;
      const int above = __popc(scratch->rows[at] & ((1u << r) - 1));
      const int index = scratch->before[at] + above;
      const int in_batch = index % Batch::kEntries, entries = scratch->entries[chunk];
      const int64_t own = batch + scratch->first_batch[chunk] + index / Batch::kEntries;
      uint32_t* const to = words + own * Batch::kWords;
      uint32_t code = above == 0 ? kOtherColumn | r : r;
      code |= static_cast<uint32_t>(at % streams.columns * streams.column_bytes) << 8;
      const bool is_last = own + 1 == batch + scratch->first_batch[chunk + 1];
      if (in_batch == 0 && is_last) code |= kLastBatch;
      to[Batch::code(in_batch)] = code;
      const bool ends = in_batch == Batch::kEntries - 1 || index == entries - 1;
      if (ends) to[Batch::code(in_batch + 1)] = kRows;
      put(own, in_batch, i, ends);
    }
  }
}

// By a block of kTurnThreads: the stream of a strip. put(batch, place in it, entry, whether it is
// the batch's last) writes what else an entry needs; put_none(batch) what an empty batch does.
template <typename Batch, int kRows, typename Put, typename PutNone>
DEQCORE_DEVICE void write_stream(const SparseRows& weight, const Streams& streams, int64_t strip,
                                 SegmentScratch* scratch, const Put& put, const PutNone& put_none) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = strip * kRows;
  uint32_t* const words = static_cast<uint32_t*>(streams.batches);
  int64_t batch = batches_before<Batch>(weight.offsets[first_row], strip, streams.chunks);
  if (thread < kRows && first_row + thread < weight.rows) {
    scratch->begin[thread] = weight.offsets[first_row + thread];
  }
  const int fitting = kSegmentColumns / streams.columns;
  const int at_once = fitting < kSegmentChunks ? fitting : kSegmentChunks;
  for (int64_t chunk = 0; chunk < streams.chunks; chunk += at_once) {
    const int64_t left = streams.chunks - chunk;
    const int chunks = static_cast<int>(left < at_once ? left : at_once);
    const int64_t column = chunk * streams.columns;
    for (int i = thread; i < chunks * streams.columns; i += kTurnThreads) scratch->rows[i] = 0;
    __syncthreads();
    mark_entries<kRows>(weight, first_row, column, column + chunks * streams.columns, scratch);
    __syncthreads();
    count_entries(streams, chunks, scratch);
    __syncthreads();
    if (thread < kWarp) place_batches<Batch>(chunks, thread, scratch);
    __syncthreads();
    write_codes<Batch, kRows>(weight, streams, first_row, column, batch, scratch, put);
    for (int i = thread; i < chunks; i += kTurnThreads) {
      const int64_t own = batch + scratch->first_batch[i];
      streams.starts[strip * streams.chunks + chunk + i] = static_cast<int32_t>(own);
      if (scratch->entries[i] > 0) continue;
      words[own * Batch::kWords + Batch::code(0)] = kRows | kLastBatch;
      put_none(own);
    }
    batch += scratch->first_batch[chunks];
    __syncthreads();
    if (thread < kRows && first_row + thread < weight.rows) {
      scratch->begin[thread] = scratch->end[thread];
    }
  }
}

// The blocks of a launch that write streams, one for each strip, among others: spread over the
// first half of them, because they wait for the caches where the others wait for memory.
struct StripBlocks {
  int64_t strips;
  int64_t every;  // which of the first blocks it is

  StripBlocks(int64_t count, int64_t others) : strips(count), every(1 + others / (2 * count)) {}
  DEQCORE_DEVICE bool has(int64_t block) const {
    return block % every == 0 && block / every < strips;
  }
  DEQCORE_DEVICE int64_t strip(int64_t block) const { return block / every; }
  // Which of the others it is.
  DEQCORE_DEVICE int64_t other(int64_t block) const {
    const int64_t before = block / every + 1;
    return block - (before < strips ? before : strips);
  }
};

// Tokens of a lane: groups of neighbours, one group in each run of kWarp groups.
template <typename S, int kTokensOfALane>
struct LaneTokens {
  static constexpr int kTokens = kTokensOfALane;
  static constexpr int kWhole = 16 / static_cast<int>(sizeof(S));
  static constexpr int kGroup = kWhole < kTokens ? kWhole : kTokens;
  static constexpr int kWidth = kWarp * kTokens;  // of a warp
  static constexpr int kColumnBytes = kWidth * static_cast<int>(sizeof(S));
  using Part = Pack<S, kGroup>;

  // The t-th of a lane's tokens.
  DEQCORE_DEVICE static int token(int lane, int t) {
    return t / kGroup * kWarp * kGroup + lane * kGroup + t % kGroup;
  }
};

// Starts copying a chunk of columns of a tile of tokens into shared memory.
template <typename L, int kThreads, typename S>
DEQCORE_DEVICE void fetch_columns(const S* turned, int64_t padded, int64_t width, int64_t tile,
                                  int64_t first, int columns, char* to) {
  constexpr int kPieces = L::kColumnBytes / 16;
  const int left = static_cast<int>(width - first < columns ? width - first : columns);
  const char* const from =
      reinterpret_cast<const char*>(turned + first * padded + tile * L::kWidth);
  const int64_t stride = padded * static_cast<int64_t>(sizeof(S));
  for (int i = static_cast<int>(threadIdx.x); i < left * kPieces; i += kThreads) {
    count_read(16, false);
    copy_async_16(to + i * 16, from + i / kPieces * stride + i % kPieces * 16);
  }
}

// Columns of a chunk of at most `most` bytes, two of which share a block's memory with `others`.
template <typename L>
int columns_of_chunk(int64_t width, int64_t most, int64_t others) {
  const int64_t fitting = (most_shared_bytes() - others) / 2;
  int64_t columns = (fitting < most ? fitting : most) / L::kColumnBytes;
  if (columns > width) columns = width;
  return static_cast<int>(columns > 1 ? columns : 1);
}

}  // namespace deqcore::cuda
