// masked_outer's CUDA kernels: the gradient of the kept values alone (SDDMM), row by row; and which
// kernels it goes to. On trial (device.cuh), many tokens of other types than float64 go to strips
// (masked_outer_strips.cu). No torch.
//
// Two launches. The first one turns both operands round, so that the tokens of a column lie side by
// side, and looks up where each chunk of columns ends in each row. In the second a block takes a
// tile of rows and a chunk of columns, and goes through all tokens: a tile of the right operand
// passes through shared memory while the next one is fetched beside it; a warp goes row by row,
// holding the tokens of its left column in registers.
//
// The order of an entry's sum: each lane adds up its kTokens products of a tile, the lanes are
// added in a tree of fixed shape, and tiles are added in turn by one thread. It depends on the
// number of tokens alone.
//
// For each kept entry and 128 tokens, float32: 4 warp-wide multiply-adds, 4 passes of 128 bytes of
// shared memory for the right operand, 9/8 for the exchanges of the tree (8 entries share it), 1
// for the entry's column and about 1/2 for the running sum: 6.6 passes bound this to 19
// multiply-adds a clock and multiprocessor. Each visit of a row in a chunk reads the left operand's
// 4 passes, too.
#include "cuda/masked_outer.h"

#include "cuda/masked_tile.cuh"

namespace deqcore::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kGroup = 8;                        // entries whose sums share a tree
constexpr int kLanesOfAnEntry = kWarp / kGroup;  // that hold its sum in the end

template <typename S>
struct Prepared {
  int32_t* ends;     // [chunks, rows]
  S* left;           // [rows, padded]
  S* right;          // [width, padded]
  Compute<S>* sums;  // [kept]: the values themselves, where they have that type
  int64_t padded;
  int64_t chunks;
  int rows_of_a_warp;
};

template <typename S, typename Tile>
__global__ void __launch_bounds__(kTurnThreads)
    masked_outer_prepare(const SparseRows entries, const Prepared<S> ready, const Turned left,
                         const Turned right, const int64_t look_up, const int64_t left_blocks) {
  DEQCORE_SHARED_DOUBLES(shared);
  int64_t block = blockIdx.x;
  if (block < look_up) {
    const int64_t i = block * kTurnThreads + threadIdx.x;
    if (i >= ready.chunks * entries.rows) return;
    ready.ends[i] = chunk_end(entries, i % entries.rows, i / entries.rows, Tile::kColumns);
    return;
  }
  block -= look_up;
  if (block < left_blocks) {
    turn_square(left, block, reinterpret_cast<S*>(shared));
  } else {
    turn_square(right, block - left_blocks, reinterpret_cast<S*>(shared));
  }
}

// Halves the number of sums that each lane holds, and adds in its partner's: lanes with the bit
// `distance` keep the upper half.
template <int kCount, typename T>
DEQCORE_DEVICE void halve(T (&sums)[kGroup], int lane, int distance) {
  const bool upper = (lane & distance) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const T mine = upper ? sums[i + kCount / 2] : sums[i];
    const T other = upper ? sums[i] : sums[i + kCount / 2];
    sums[i] = mine + __shfl_xor_sync(kWholeWarp, other, distance);
  }
}

// The sum over all lanes of sums[i], for i = lane / kLanesOfAnEntry.
template <typename T>
DEQCORE_DEVICE T add_lanes(T (&sums)[kGroup], int lane) {
  static_assert(kGroup == 8 && kLanesOfAnEntry == 4);
  halve<8>(sums, lane, 16);
  halve<4>(sums, lane, 8);
  halve<2>(sums, lane, 4);
  T sum = sums[0];
  sum += __shfl_xor_sync(kWholeWarp, sum, 2);
  return sum + __shfl_xor_sync(kWholeWarp, sum, 1);
}

// One tile of tokens' part of the entries first to last of a row.
template <typename S, int kTokens>
DEQCORE_DEVICE void add_tile(const MaskedOuterArgs& args, const Prepared<S>& ready, int first,
                             int last, int column, const Pack<S, kTokens>& left, const S* tile,
                             bool is_first, bool is_last) {
  using Tile = TokenTile<S, kTokens>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int group = first; group < last; group += kGroup) {
    Compute<S> sums[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sums[i] = 0;
      if (group + i >= last) continue;
      const int at = args.entries.columns[group + i] - column;
      const auto right = *reinterpret_cast<const Pack<S, kTokens>*>(tile + at * Tile::kWidth);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        sums[i] = fma(to_compute(left.at[t]), to_compute(right.at[t]), sums[i]);
      }
    }
    Compute<S> sum = add_lanes(sums, lane);
    const int entry = group + lane / kLanesOfAnEntry;
    if (lane % kLanesOfAnEntry != 0 || entry >= last) continue;
    if (!is_first) sum += ready.sums[entry];
    if (is_last) {
      static_cast<S*>(args.values)[entry] = from_compute<S>(sum);
    } else {
      ready.sums[entry] = sum;
    }
  }
}

template <typename S, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    masked_outer_product(const MaskedOuterArgs args, const Prepared<S> ready) {
  using Tile = TokenTile<S, kTokens>;
  DEQCORE_SHARED_DOUBLES(shared);
  S* const buffers = reinterpret_cast<S*>(shared);
  const SparseRows& entries = args.entries;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row_tiles = blocks_for(entries.rows, kWarps * ready.rows_of_a_warp);
  const int64_t chunk = blockIdx.x / row_tiles;
  const int64_t first_row = (blockIdx.x % row_tiles * kWarps + warp) * ready.rows_of_a_warp;
  const int column = static_cast<int>(chunk * Tile::kColumns);
  const int64_t tiles = ready.padded / Tile::kWidth;

  fetch_chunk<Tile>(ready.right, ready.padded, entries.width, chunk, 0, kThreads, buffers);
#pragma unroll 1
  for (int64_t tile = 0; tile < tiles; ++tile) {
    wait_for_copies();
    __syncthreads();  // all see this tile, and none still reads the one before it
    S* const buffer = buffers + tile % 2 * (Tile::kColumns * Tile::kWidth);
    if (tile + 1 < tiles) {
      S* const other = buffers + (tile + 1) % 2 * (Tile::kColumns * Tile::kWidth);
      fetch_chunk<Tile>(ready.right, ready.padded, entries.width, chunk, tile + 1, kThreads, other);
    }
#pragma unroll 1
    for (int r = 0; r < ready.rows_of_a_warp; ++r) {
      const int64_t row = first_row + r;
      if (row >= entries.rows) break;
      const int first =
          chunk > 0 ? ready.ends[(chunk - 1) * entries.rows + row] : entries.offsets[row];
      const int last = ready.ends[chunk * entries.rows + row];
      if (first == last) continue;
      const int64_t token = tile * Tile::kWidth + lane * kTokens;
      count_read(sizeof(S) * kTokens, false);
      const auto left =
          *reinterpret_cast<const Pack<S, kTokens>*>(ready.left + row * ready.padded + token);
      add_tile<S, kTokens>(args, ready, first, last, column, left, buffer + lane * kTokens,
                           tile == 0, tile + 1 == tiles);
    }
  }
}

template <typename S, int kTokens>
Prepared<S> prepare_in(const MaskedOuterArgs& args, Pieces& pieces) {
  using Tile = TokenTile<S, kTokens>;
  const SparseRows& entries = args.entries;
  Prepared<S> ready{};
  ready.padded = Tile::padded(args.tokens);
  ready.chunks = Tile::chunks(entries.width);
  ready.ends = pieces.take<int32_t>(ready.chunks * entries.rows);
  ready.left = pieces.take<S>(entries.rows * ready.padded);
  ready.right = pieces.take<S>(entries.width * ready.padded);
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    ready.sums = static_cast<S*>(args.values);
  } else {
    ready.sums = pieces.take<Compute<S>>(entries.kept);
  }
  // More rows share a tile of the right operand, but there should be blocks for a whole GPU.
  constexpr int64_t kEnoughBlocks = 256;
  ready.rows_of_a_warp = 32;
  while (ready.rows_of_a_warp > 1 &&
         blocks_for(entries.rows, kWarps * ready.rows_of_a_warp) * ready.chunks < kEnoughBlocks) {
    ready.rows_of_a_warp /= 2;
  }
  return ready;
}

template <typename S, int kTokens>
const char* launch_tokens(const MaskedOuterArgs& args, void* workspace, Stream stream) {
  using Tile = TokenTile<S, kTokens>;
  const SparseRows& entries = args.entries;
  Pieces pieces(workspace);
  const Prepared<S> ready = prepare_in<S, kTokens>(args, pieces);
  const Turned left{args.left, ready.left, args.tokens, ready.padded, entries.rows};
  const Turned right{args.right, ready.right, args.tokens, ready.padded, entries.width};
  const int64_t look_up = blocks_for(ready.chunks * entries.rows, kTurnThreads);
  const char* const error = launch(
      masked_outer_prepare<S, Tile>, look_up + turn_blocks(left) + turn_blocks(right), kTurnThreads,
      turn_shared_bytes<S>(), stream, entries, ready, left, right, look_up, turn_blocks(left));
  if (error != nullptr) return error;
  const int64_t row_tiles = blocks_for(entries.rows, kWarps * ready.rows_of_a_warp);
  const int64_t columns = entries.width < Tile::kColumns ? entries.width : Tile::kColumns;
  const int64_t buffers = ready.padded > Tile::kWidth ? kChunkBytes : 0;
  return launch(masked_outer_product<S, kTokens>, row_tiles * ready.chunks, kThreads,
                buffers + columns * Tile::kColumnBytes, stream, args, ready);
}

// Calls run.operator()<S, kTokens>() for a type and a path.
template <typename S, typename Run>
auto with_tokens(OuterPath path, const Run& run) {
  constexpr int kMany = 16 / sizeof(Compute<S>);
  if (path != OuterPath::few) return run.template operator()<S, kMany>();
  return run.template operator()<S, 1>();
}

template <typename Run>
auto with_types(Dtype type, OuterPath path, const Run& run) {
  return with_dtype(type, [&]<typename S>() { return with_tokens<S>(path, run); });
}

bool is_strips(OuterPath path, Dtype type) { return path == OuterPath::many && type != Dtype::f64; }

}  // namespace

OuterPath masked_outer_path(const MaskedOuterArgs& args, Dtype type) {
  if (masked_outer_has_blocks(args, type)) {
    return masked_outer_has_segments(args) && takes_hopper_paths() ? OuterPath::segments
                                                                   : OuterPath::blocks;
  }
  if (args.tokens <= 64) return OuterPath::few;
  return takes_trial_paths() ? OuterPath::many : OuterPath::tiles;
}

int64_t masked_outer_workspace_bytes(const MaskedOuterArgs& args, Dtype type, OuterPath path) {
  if (path == OuterPath::blocks || path == OuterPath::segments) return 0;
  if (is_strips(path, type)) return masked_outer_strips_bytes(args, type);
  return with_types(type, path, [&]<typename S, int kTokens>() {
    Pieces pieces(nullptr);
    prepare_in<S, kTokens>(args, pieces);
    return pieces.used();
  });
}

const char* masked_outer(const MaskedOuterArgs& args, Dtype type, OuterPath path, void* workspace,
                         void* stream) {
  if (args.entries.kept == 0) return nullptr;
  if (const char* const error = check_gpu()) return error;
  if (is_strips(path, type)) return masked_outer_strips(args, type, workspace, stream);
  if (path == OuterPath::segments) return masked_outer_segments(args, type, stream);
  if (path == OuterPath::blocks) return masked_outer_blocks(args, type, stream);
  return with_types(type, path, [&]<typename S, int kTokens>() {
    return launch_tokens<S, kTokens>(args, workspace, static_cast<Stream>(stream));
  });
}

}  // namespace deqcore::cuda
