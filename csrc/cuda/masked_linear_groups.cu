// masked_linear's CUDA kernels for blocks of 64 in bfloat16 or float16 on Hopper: a block of
// threads takes a tile of tokens and four rows of blocks, which share the columns of x that they
// have in common. No torch.
//
// Two launches. The first one lays each kept block out as the tensor cores read it, and lists, for
// each group of four rows of blocks, the columns of blocks that any of them has. In the second one,
// a warp has tiles of x and of the weight copied into a ring in shared memory, by the copy engine,
// and groups of four warps multiply them (wgmma) and hold the sums: 64 tokens x 256 rows each.
//
// What bounds it is the traffic from the L2 cache: for a column of blocks that n of the four rows
// have, 128 tokens take 16 KB of x and n * 8 KB of the weight for n * 524,288 multiply-adds. Blocks
// of a cluster work on different tokens and share the weight's part: each copies a part for all.
#include "cuda/masked_linear.h"
#include "cuda/path.h"
#include "cuda/tile_products.cuh"
#include "cuda/tile_ring.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kGroup = 4;  // rows of blocks that share tiles of x
constexpr int kPrepareThreads = 128;

// A column of blocks that a group has: bit r of `mask` for row r of the group, whose tile it is.
struct Visit {
  int32_t column;  // of x
  int32_t mask;
  int32_t tiles[kGroup];
};
constexpr int kLast = 1 << kGroup;  // beside the mask: the last visit of a group

struct Prepared {
  char* tiles;      // [blocks] of kTileBytes
  Visit* visits;    // [groups, columns of blocks]
  int32_t* counts;  // [groups] at least 1
  int64_t blocks, groups, across;
};

// kConsumers: groups of four warps, for 64 tokens each; kCluster: blocks that share the weight.
template <int kConsumersOfABlock, int kBlocksOfACluster>
struct Shape {
  static constexpr int kConsumers = kConsumersOfABlock;
  static constexpr int kCluster = kBlocksOfACluster;
  static constexpr int kTokens = kConsumers * kTileSide;
  static constexpr int kThreads = (4 * kConsumers + 1) * kWarp;
  static constexpr int kResident = kConsumers == 1 ? 2 : 1;  // blocks of a multiprocessor
  static constexpr int kSlots = kResident == 2 ? 13 : 27;
  using Ring = TileRing<kSlots, kCluster, 4 * kConsumers>;
};

// Lays a block out as a tile whose rows are rows of the weight.
template <typename S, bool kTurned>
DEQCORE_DEVICE void lay_out(const MaskedLinearArgs& args, const Prepared& ready, int64_t index,
                            S* scratch) {
  const SparseRows& weight = args.weight;
  const int64_t row = row_of_block(weight, index) * kTileSide;
  const int first = weight.offsets[row], length = weight.offsets[row + 1] - first;
  const int along = static_cast<int>(index - first / (kTileSide * kTileSide)) * kTileSide;
  const S* const values = static_cast<const S*>(args.values);
  char* const tile = ready.tiles + index * kTileBytes;
  constexpr int kPieces = 8, kStride = kTileSide + 2;
  using Piece = Pack<S, 8>;
  if constexpr (kTurned) {  // what is stored in a row is a column here
    for (int i = static_cast<int>(threadIdx.x); i < kTileSide * kPieces; i += kPrepareThreads) {
      const int column = i / kPieces, piece = i % kPieces;
      const S* const from = values + weight.position[first + along + column] + 8 * piece;
      const Piece eight = load<true, 8>(from, 8);
      for (int j = 0; j < 8; ++j) scratch[column * kStride + 8 * piece + j] = eight.at[j];
    }
    __syncthreads();
  }
  for (int i = static_cast<int>(threadIdx.x); i < kTileSide * kPieces; i += kPrepareThreads) {
    const int own = i / kPieces, piece = i % kPieces;
    Piece eight;
    if constexpr (kTurned) {
      for (int j = 0; j < 8; ++j) eight.at[j] = scratch[(8 * piece + j) * kStride + own];
    } else {
      eight = load<true, 8>(values + first + int64_t{own} * length + along + 8 * piece, 8);
    }
    store<true, 8>(reinterpret_cast<S*>(tile + tile_place(own, piece)), eight, 8);
  }
}

// Lists a group's visits, in the order of the columns. `tiles`: scratch for kGroup of each column.
DEQCORE_DEVICE void list_visits(const SparseRows& weight, const Prepared& ready, int64_t group,
                                int* tiles) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int across = static_cast<int>(ready.across);
  int* const warp_counts = tiles + across * kGroup;
  for (int i = thread; i < across * kGroup; i += kPrepareThreads) tiles[i] = -1;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kGroup; ++r) {
    const int64_t row = (group * kGroup + r) * kTileSide;
    if (row >= weight.rows) break;
    const int first = weight.offsets[row], count = (weight.offsets[row + 1] - first) / kTileSide;
    for (int i = thread; i < count; i += kPrepareThreads) {
      const int column = weight.columns[first + i * kTileSide] / kTileSide;
      tiles[column * kGroup + r] = first / (kTileSide * kTileSide) + i;
    }
  }
  __syncthreads();
  Visit* const visits = ready.visits + group * ready.across;
  int listed = 0;
  for (int begin = 0; begin < across; begin += kPrepareThreads) {
    const int column = begin + thread;
    Visit visit{column * kTileSide, 0, {}};
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      visit.tiles[r] = column < across ? tiles[column * kGroup + r] : -1;
      if (visit.tiles[r] >= 0) visit.mask |= 1 << r;
    }
    const unsigned there = __ballot_sync(kWholeWarp, visit.mask != 0);
    if (lane == 0) warp_counts[warp] = __popc(there);
    __syncthreads();
    int at = listed + __popc(there & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kPrepareThreads / kWarp; ++w) {
      if (w < warp) at += warp_counts[w];
      listed += warp_counts[w];
    }
    if (visit.mask != 0) visits[at] = visit;
    __syncthreads();
  }
  if (thread != 0) return;
  if (listed == 0) visits[0] = Visit{};  // so that each tile of y has a last visit
  ready.counts[group] = listed > 0 ? listed : 1;
}

template <typename S, bool kTurned>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_groups(const MaskedLinearArgs args, const Prepared ready) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int64_t block = blockIdx.x;
  if (block < ready.groups) {
    list_visits(args.weight, ready, block, reinterpret_cast<int*>(shared));
  } else {
    lay_out<S, kTurned>(args, ready, block - ready.groups, reinterpret_cast<S*>(shared));
  }
}

// Has the tiles of one tile of y copied in: of x for each group of warps, then of the weight.
template <typename Sh>
DEQCORE_DEVICE void fill_ring(const typename Sh::Ring& ring, Place<Sh::kSlots>& place,
                              const TileMap& x, const Prepared& ready, int64_t group, int64_t token,
                              int rank) {
  constexpr int kPart = kTileBytes / Sh::kCluster;
  const Visit* const visits = ready.visits + group * ready.across;
  const int count = ready.counts[group];
  Visit next = visits[0];
#pragma unroll 1
  for (int v = 0; v < count; ++v) {
    const Visit visit = next;
    if (v + 1 < count) next = visits[v + 1];
    const int note = visit.mask | (v + 1 == count ? kLast : 0);
#pragma unroll
    for (int i = 0; i < Sh::kConsumers; ++i, place.go_on()) {
      Barrier* const full = ring.fill(place, note);
      copy_tile(ring.tile(place), x, static_cast<int>(token) + i * kTileSide, visit.column, full);
    }
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      if (!(visit.mask >> r & 1)) continue;
      Barrier* const full = ring.fill(place, 0);
      copy_to_cluster<Sh::kCluster>(
          ring.tile(place) + rank * kPart,
          ready.tiles + int64_t{visit.tiles[r]} * kTileBytes + rank * kPart, kPart, full);
      place.go_on();
    }
  }
}

// Tiles that the last product read, or reads still.
template <int kSlots>
struct InUse {
  Place<kSlots> weight, x;  // x: the first of its visit
  bool any = false, ends_visit = false;
};

// All readers empty every place, those of other groups' tokens too, and none before it was filled.
template <typename Sh>
DEQCORE_DEVICE void release_x(const typename Sh::Ring& ring, Place<Sh::kSlots> x) {
#pragma unroll
  for (int i = 0; i < Sh::kConsumers; ++i, x.go_on()) {
    ring.await(x);
    ring.release(x);
  }
}

template <typename Sh>
DEQCORE_DEVICE void release(const typename Sh::Ring& ring, InUse<Sh::kSlots>& used) {
  if (!used.any) return;
  ring.release(used.weight);
  if (used.ends_visit) release_x<Sh>(ring, used.x);
  used.any = false;
}

// The sums of 64 tokens and 4 x 64 rows, by one group of warps. A product runs while the next one
// is made ready.
template <typename S, typename Sh>
DEQCORE_DEVICE void add_visits(const typename Sh::Ring& ring, Place<Sh::kSlots>& place, int group,
                               float (&sums)[kGroup][32]) {
  InUse<Sh::kSlots> used;
  int note;
  do {
    const Place<Sh::kSlots> first = place;
    Place<Sh::kSlots> x = place;
#pragma unroll
    for (int i = 0; i < Sh::kConsumers; ++i, place.go_on()) {
      if (i < group) x.go_on();
    }
    note = ring.await(x);
    if (note == kLast) release_x<Sh>(ring, first);  // there is no product
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      if (!(note >> r & 1)) continue;
      ring.await(place);
      begin_products();
#pragma unroll
      for (int k = 0; k < kTileSide; k += 16) {
        multiply_tiles_64<S, false, false>(sums[r], ring.tile(x), ring.tile(place), k);
      }
      end_products();
      wait_for_products<1>();
      release<Sh>(ring, used);
      used = {place, first, true, (note & (kLast - 1)) >> (r + 1) == 0};
      place.go_on();
    }
  } while (!(note & kLast));
  wait_for_products<0>();
  release<Sh>(ring, used);
}

// Writes 64 tokens of 64 rows of y.
template <typename S>
DEQCORE_DEVICE void store_sums(const MaskedLinearArgs& args, int64_t token, int64_t row,
                               float (&sums)[32]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (args.bias != nullptr) {
    const S* const bias = static_cast<const S*>(args.bias) + row + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] += to_compute(bias[i / 4 * 8 + i % 2]);
  }
  S* const y = static_cast<S*>(args.y) + row;
  each_eight<S>(sums, [&](int i, int j, const Pack<S, 8>& eight) {
    if (token + i < args.tokens) store_whole(y + (token + i) * args.weight.rows + j, eight);
  });
}

template <typename S, typename Sh>
__global__ void __launch_bounds__(Sh::kThreads, Sh::kResident)
    masked_linear_by_groups(const __grid_constant__ TileMap x, const MaskedLinearArgs args,
                            const Prepared ready, const int64_t tiles) {
  DEQCORE_SHARED_DOUBLES(shared);
  const typename Sh::Ring ring(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, rank = rank_in_cluster();
  ring.start();
  Place<Sh::kSlots> place;
  const int64_t stride = int64_t{gridDim.x} / Sh::kCluster;
  // Clusters that run together share tokens, which the L2 cache then keeps.
  for (int64_t tile = blockIdx.x / Sh::kCluster; tile < tiles; tile += stride) {
    const int64_t group = tile % ready.groups;
    const int64_t token = (tile / ready.groups * Sh::kCluster + rank) * Sh::kTokens;
    if (warp == 4 * Sh::kConsumers) {
      if (threadIdx.x % kWarp == 0) {
        fill_ring<Sh>(ring, place, x, ready, group, token, rank);
      }
      continue;
    }
    float sums[kGroup][32] = {};
    add_visits<S, Sh>(ring, place, warp / 4, sums);
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const int64_t row = (group * kGroup + r) * kTileSide;
      if (row < args.weight.rows) {
        store_sums<S>(args, token + warp / 4 * kTileSide, row, sums[r]);
      }
    }
  }
  if constexpr (Sh::kCluster > 1) {  // none leaves while others write to it
    __syncwarp();
    sync_cluster();
  }
}

Prepared prepare_in(const MaskedLinearArgs& args, Pieces& pieces) {
  const SparseRows& weight = args.weight;
  Prepared ready{};
  ready.blocks = weight.kept / (kTileSide * kTileSide);
  ready.groups = blocks_for(weight.rows, kGroup * kTileSide);
  ready.across = weight.width / kTileSide;
  ready.tiles = pieces.take<char>(ready.blocks * kTileBytes);
  ready.visits = pieces.take<Visit>(ready.groups * ready.across);
  ready.counts = pieces.take<int32_t>(ready.groups);
  return ready;
}

template <typename S, typename Sh>
const char* launch_shape(const MaskedLinearArgs& args, const Prepared& ready, Stream stream) {
  constexpr int64_t kTurn = kTileSide * (kTileSide + 2) * sizeof(S);
  const int64_t list = (ready.across * kGroup + kPrepareThreads / kWarp) * sizeof(int);
  const int64_t scratch = list > kTurn ? list : kTurn;
  const int64_t first = ready.groups + ready.blocks;
  const char* error =
      args.weight.position == nullptr
          ? launch(prepare_groups<S, false>, first, kPrepareThreads, scratch, stream, args, ready)
          : launch(prepare_groups<S, true>, first, kPrepareThreads, scratch, stream, args, ready);
  if (error != nullptr) return error;
  TileMap x;
  error = make_tile_map(&x, args.x, args.tokens, args.weight.width, __is_same(S, BFloat16));
  if (error != nullptr) return error;
  const int64_t tiles = ready.groups * blocks_for(args.tokens, Sh::kTokens * Sh::kCluster);
  const int64_t at_once = clusters_at_once(Sh::kCluster, Sh::kResident);
  return launch_copying_clusters(masked_linear_by_groups<S, Sh>, Sh::kCluster,
                                 tiles < at_once ? tiles : at_once, Sh::kThreads, Sh::Ring::kBytes,
                                 stream, x, args, ready, tiles);
}

// Emulated, a cluster is one block.
#if defined(__CUDACC__)
constexpr int kCluster = 2;
#else
constexpr int kCluster = 1;
#endif

}  // namespace

bool masked_linear_has_groups(const MaskedLinearArgs& args) {
  constexpr int64_t kFewTokens = 256;        // with fewer, the tiles do not fill the GPU
  constexpr int64_t kMostColumns = 1 << 17;  // whose lists fit shared memory
  const SparseRows& weight = args.weight;
  return weight.block == kTileSide && weight.kept > 0 && weight.width <= kMostColumns &&
         args.tokens >= kFewTokens;
}

int64_t masked_linear_groups_bytes(const MaskedLinearArgs& args) {
  Pieces pieces(nullptr);
  prepare_in(args, pieces);
  return pieces.used();
}

const char* masked_linear_groups(const MaskedLinearArgs& args, Dtype type, void* workspace,
                                 void* stream) {
  Pieces pieces(workspace);
  const Prepared ready = prepare_in(args, pieces);
  using Sh = Shape<2, kCluster>;
  const Stream on = static_cast<Stream>(stream);
  return type == Dtype::bf16 ? launch_shape<BFloat16, Sh>(args, ready, on)
                             : launch_shape<Half, Sh>(args, ready, on);
}

}  // namespace deqcore::cuda
