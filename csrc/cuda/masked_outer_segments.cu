// masked_outer's CUDA kernels for blocks of 64 in bfloat16 or float16 on Hopper: a cluster takes up
// to four kept blocks of a row of blocks, which share the left operand, and each of its blocks of
// threads takes a part of the tokens. One launch, no scratch memory. No torch.
//
// A warp has tiles of both operands, 64 tokens each, copied into a ring in shared memory by the
// copy engine; four warps multiply them (wgmma) and hold the sums. In the end the blocks of threads
// add their sums up, in their order, by way of each other's shared memory. What bounds it is the
// traffic from the L2 cache: (1 + n) * 128 bytes for n * 4096 multiply-adds of a token.
//
// The order of a sum: groups of 16 tokens in their order within each part, then the parts. The
// parts are quarters of the tiles of tokens: it depends on the number of tokens alone.
#include "cuda/masked_outer.h"
#include "cuda/path.h"
#include "cuda/tile_products.cuh"
#include "cuda/tile_ring.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kSegment = 4;  // blocks that share the left operand
constexpr int kThreads = 5 * kWarp;
constexpr int kSlots = 13;
constexpr int kBlockEntries = kTileSide * kTileSide;
using Ring = TileRing<kSlots, 1, 4>;

// Neighbouring kept blocks of one row of blocks.
struct Segment {
  int64_t row;  // of the weight
  int first;    // entry of the row
  int length;   // entries of the row
  int along;    // entries of the row before this segment
  int blocks;   // none: there are fewer segments
};

// The segment `index` of all: each row of blocks has as few as can be, of nearly one length.
DEQCORE_DEVICE Segment find_segment(const SparseRows& entries, int64_t index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t rows = entries.rows / kTileSide;
  for (int64_t first = 0; first < rows; first += kWarp) {
    const int64_t row = (first + lane) * kTileSide;
    int begin = 0, blocks = 0;
    if (row < entries.rows) {
      begin = entries.offsets[row];
      blocks = (entries.offsets[row + 1] - begin) / kTileSide;
    }
    const int own = static_cast<int>(blocks_for(blocks, kSegment));
    int upto = own;  // segments of this lane's row and those before it
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int from = lane >= distance ? lane - distance : lane;
      const int before = __shfl_sync(kWholeWarp, upto, from);
      if (lane >= distance) upto += before;
    }
    const int all = __shfl_sync(kWholeWarp, upto, kWarp - 1);
    if (index >= all) {
      index -= all;
      continue;
    }
    const unsigned later = __ballot_sync(kWholeWarp, upto > index);
    const int owner = __popc(~later & (later - 1));  // the first lane whose segments reach so far
    const int part = static_cast<int>(index) - __shfl_sync(kWholeWarp, upto - own, owner);
    const int of_row = __shfl_sync(kWholeWarp, own, owner);
    const int kept = __shfl_sync(kWholeWarp, blocks, owner);
    const int from = kept * part / of_row;
    return {(first + owner) * kTileSide, __shfl_sync(kWholeWarp, begin, owner), kept * kTileSide,
            from * kTileSide, kept * (part + 1) / of_row - from};
  }
  return {};
}

// Has the tiles of tokens [begin, end) copied in.
DEQCORE_DEVICE void fill_ring(const Ring& ring, const TileMap& left, const TileMap& right,
                              const SparseRows& entries, const Segment& segment, int64_t begin,
                              int64_t end) {
  int columns[kSegment];
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int at = i < segment.blocks ? i : 0;
    columns[i] = entries.columns[segment.first + segment.along + at * kTileSide];
  }
  Place<kSlots> place;
#pragma unroll 1
  for (int64_t token = begin; token < end; token += kTileSide) {
    const int at = static_cast<int>(token);
    copy_tile(ring.tile(place), left, at, static_cast<int>(segment.row), ring.fill(place, 0));
    place.go_on();
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      if (i >= segment.blocks) break;
      copy_tile(ring.tile(place), right, at, columns[i], ring.fill(place, 0));
      place.go_on();
    }
  }
}

template <typename S>
DEQCORE_DEVICE void add_tokens(const Ring& ring, const Segment& segment, int64_t begin, int64_t end,
                               float (&sums)[kSegment][32]) {
  Place<kSlots> place;
#pragma unroll 1
  for (int64_t token = begin; token < end; token += kTileSide) {
    const Place<kSlots> left = place;
    ring.await(left);
    place.go_on();
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      if (i >= segment.blocks) break;
      ring.await(place);
      begin_products();
#pragma unroll
      for (int k = 0; k < kTileSide; k += 16) {
        multiply_tiles_64<S, true, true>(sums[i], ring.tile(left), ring.tile(place), k);
      }
      end_products();
      wait_for_products<0>();
      ring.release(place);
      place.go_on();
    }
    ring.release(left);
  }
}

// This block's sums, 16 bytes of a thread side by side, where the tiles were.
using Four = Pack<float, 4>;
DEQCORE_DEVICE Four* shared_sums(const Ring& ring, int block, int four) {
  return reinterpret_cast<Four*>(ring.tiles) + (block * 8 + four) * 4 * kWarp + threadIdx.x;
}

template <typename S, int kCluster>
__global__ void __launch_bounds__(kThreads, 2)
    masked_outer_by_segments(const __grid_constant__ TileMap left,
                             const __grid_constant__ TileMap right, const MaskedOuterArgs args) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Ring ring(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, rank = rank_in_cluster();
  const Segment segment = find_segment(args.entries, blockIdx.x / kCluster);
  if (segment.blocks == 0) return;  // the whole cluster leaves
  ring.start();
  const int64_t part = blocks_for(blocks_for(args.tokens, kTileSide), kCluster) * kTileSide;
  const int64_t begin = rank * part, end = begin + part < args.tokens ? begin + part : args.tokens;
  float sums[kSegment][32] = {};
  if (warp == 4) {
    if (threadIdx.x % kWarp == 0) {
      fill_ring(ring, left, right, args.entries, segment, begin, end);
    }
    __syncwarp();
  } else {
    add_tokens<S>(ring, segment, begin, end, sums);
  }
  if constexpr (kCluster > 1) {
    __syncthreads();  // none reads tiles any more
    if (warp < 4) {
#pragma unroll
      for (int i = 0; i < kSegment; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float (&own)[32] = sums[i];
          *shared_sums(ring, i, j) = {own[4 * j], own[4 * j + 1], own[4 * j + 2], own[4 * j + 3]};
        }
      }
    }
    sync_cluster();
  }
  if (warp < 4) {
    S* const values = static_cast<S*>(args.values) + segment.first + segment.along;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      if (i >= segment.blocks || i % kCluster != rank) continue;
      if constexpr (kCluster > 1) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          Four total = read_shared_of(0, shared_sums(ring, i, j));
#pragma unroll
          for (int r = 1; r < kCluster; ++r) {
            const Four more = read_shared_of(r, shared_sums(ring, i, j));
#pragma unroll
            for (int n = 0; n < 4; ++n) total.at[n] += more.at[n];
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) sums[i][4 * j + n] = total.at[n];
        }
      }
      each_eight<S>(sums[i], [&](int m, int n, const Pack<S, 8>& eight) {
        store<true, 8>(values + int64_t{m} * segment.length + i * kTileSide + n, eight, 8);
      });
    }
    __syncwarp();
  }
  if constexpr (kCluster > 1) sync_cluster();  // none leaves while others read from it
}

template <typename S, int kCluster>
const char* launch_segments(const MaskedOuterArgs& args, Stream stream) {
  const bool bfloat = __is_same(S, BFloat16);
  TileMap left, right;
  const char* error = make_tile_map(&left, args.left, args.tokens, args.entries.rows, bfloat);
  if (error != nullptr) return error;
  error = make_tile_map(&right, args.right, args.tokens, args.entries.width, bfloat);
  if (error != nullptr) return error;
  const int64_t blocks = args.entries.kept / kBlockEntries, rows = args.entries.rows / kTileSide;
  // As many segments as there can be: a row of blocks has at most one that is not full.
  const int64_t most = blocks / kSegment + rows, clusters = most < blocks ? most : blocks;
  return launch_copying_clusters(masked_outer_by_segments<S, kCluster>, kCluster, clusters,
                                 kThreads, Ring::kBytes, stream, left, right, args);
}

// Emulated, a cluster is one block.
#if defined(__CUDACC__)
constexpr int kParts = 4;
#else
constexpr int kParts = 1;
#endif

}  // namespace

bool masked_outer_has_segments(const MaskedOuterArgs& args) {
  return args.entries.block == kTileSide && args.tokens > 0;
}

const char* masked_outer_segments(const MaskedOuterArgs& args, Dtype type, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  return type == Dtype::bf16 ? launch_segments<BFloat16, kParts>(args, on)
                             : launch_segments<Half, kParts>(args, on);
}

}  // namespace deqcore::cuda
