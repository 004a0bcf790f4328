// masked_linear's CUDA kernels: y = x weight^T + bias for a weight of few kept entries, row by row;
// and which kernels a product goes to. On trial (device.cuh), more than 64 tokens of other types
// than float64 go to strips (masked_linear_strips.cu). No torch.
//
// Two launches. The first one turns x round, so that the tokens of a column lie side by side, puts
// each entry's value beside its place, and looks up where each chunk of columns ends in each row.
// In the second a block takes a tile of tokens and a tile of rows: a warp's lanes take kTokens
// tokens each, and the sums of kRows rows stay in registers while chunks of x pass through shared
// memory. The first design of this kind is Gale et al., "Sparse GPU kernels for deep learning"
// (2020); there the dense operand is read through the caches.
//
// For each kept entry and 128 tokens, float32: 4 warp-wide multiply-adds, one 16-byte load of x
// from shared memory (4 passes of 128 bytes) and half a 16-byte load that is the same for all lanes
// (1/2 to 1 pass). Shared memory gives one pass a clock, so 4.5 passes bound this to 28
// multiply-adds a clock and multiprocessor. Each visit of a row in a chunk costs two exchanges
// more.
#include "cuda/masked_linear.h"

#include "cuda/masked_tile.cuh"
#include "cuda/path.h"

namespace deqcore::cuda {
namespace {

constexpr int kPrepareThreads = kTurnThreads;

// A kept entry: its value, and where its column lies in its chunk, in bytes.
template <typename T>
struct alignas(2 * sizeof(T)) Entry {
  T value;
  int32_t place;
};

template <typename S>
struct Prepared {
  Entry<Compute<S>>* entries;  // [kept]
  int32_t* ends;               // [chunks, rows]
  S* turned;                   // [width, padded]
  int64_t padded;
  int64_t chunks;
};

// kTokens: of a lane; kRows: of a warp.
template <int kTokensOfALane, int kRowsOfAWarp, int kWarpsOfABlock>
struct Layout {
  static constexpr int kTokens = kTokensOfALane;
  static constexpr int kRows = kRowsOfAWarp;
  static constexpr int kWarps = kWarpsOfABlock;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTileRows = kWarps * kRows;
};
template <typename S>
constexpr int kPackTokens = 16 / sizeof(Compute<S>);
template <typename S>
using Large = Layout<kPackTokens<S>, 16, 16>;
template <typename S>
using Medium = Layout<kPackTokens<S>, 4, 8>;
using Few = Layout<1, 4, 8>;

// Blocks of the first launch, by what they do.
struct Roles {
  int64_t pack, look_up;
  Turned turned;
};

template <typename S, typename Tile>
__global__ void __launch_bounds__(kPrepareThreads)
    masked_linear_prepare(const MaskedLinearArgs args, const Prepared<S> ready, const Roles roles) {
  DEQCORE_SHARED_DOUBLES(shared);
  const SparseRows& weight = args.weight;
  int64_t block = blockIdx.x;
  if (block < roles.pack) {
    const int64_t i = block * kPrepareThreads + threadIdx.x;
    if (i >= weight.kept) return;
    const int64_t from = weight.position != nullptr ? weight.position[i] : i;
    const int place = weight.columns[i] % Tile::kColumns * Tile::kColumnBytes;
    const Entry<Compute<S>> entry{to_compute(static_cast<const S*>(args.values)[from]), place};
    ready.entries[i] = entry;
    return;
  }
  block -= roles.pack;
  if (block < roles.look_up) {
    const int64_t i = block * kPrepareThreads + threadIdx.x;
    if (i >= ready.chunks * weight.rows) return;
    ready.ends[i] = chunk_end(weight, i % weight.rows, i / weight.rows, Tile::kColumns);
    return;
  }
  turn_square(roles.turned, block - roles.look_up, reinterpret_cast<S*>(shared));
}

template <typename S, int kTokens>
DEQCORE_DEVICE void add_entry(const Entry<Compute<S>> entry, const char* tile,
                              Compute<S> (&sums)[kTokens]) {
  const auto x = *reinterpret_cast<const Pack<S, kTokens>*>(tile + entry.place);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = fma(entry.value, to_compute(x.at[t]), sums[t]);
}

// Entries first to last of a row, in their order; two small ones are read at a time.
template <typename S, int kTokens>
DEQCORE_DEVICE void add_entries(const Entry<Compute<S>>* entries, int first, int last,
                                const char* tile, Compute<S> (&sums)[kTokens]) {
  typedef Entry<Compute<S>> E;
  constexpr int kAtOnce = sizeof(E) == 8 ? 2 : 1;
  int i = first;
  if (kAtOnce == 2 && i % 2 != 0 && i < last) add_entry<S, kTokens>(entries[i++], tile, sums);
#pragma unroll 2
  for (; i + kAtOnce <= last; i += kAtOnce) {
    const auto some = *reinterpret_cast<const Pack<E, kAtOnce>*>(entries + i);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) add_entry<S, kTokens>(some.at[k], tile, sums);
  }
  if (kAtOnce == 2 && i < last) add_entry<S, kTokens>(entries[i], tile, sums);
}

// A lane's sums of one token, to kRows neighbours in y.
template <typename S, typename L>
DEQCORE_DEVICE void store_token(const MaskedLinearArgs& args, int64_t token, int64_t first_row,
                                const Compute<S> (&sums)[L::kRows][L::kTokens], int t,
                                bool aligned) {
  constexpr int kWhole = 16 / static_cast<int>(sizeof(S));
  constexpr int kWidth = kWhole < L::kRows ? kWhole : L::kRows;
  const S* const bias = static_cast<const S*>(args.bias);
  S* const y = static_cast<S*>(args.y) + token * args.weight.rows + first_row;
#pragma unroll
  for (int r = 0; r < L::kRows; r += kWidth) {
    const int64_t left = args.weight.rows - first_row - r;
    Pack<S, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      Compute<S> sum = sums[r + i][t];
      if (bias != nullptr && i < left) sum += to_compute(bias[first_row + r + i]);
      out.at[i] = from_compute<S>(sum);
    }
    if (aligned && left >= kWidth) {
      store_whole(y + r, out);
    } else {
      store<false, kWidth>(y + r, out, left);
    }
  }
}

template <typename S, typename L>
__global__ void __launch_bounds__(L::kThreads, 1)
    masked_linear_product(const MaskedLinearArgs args, const Prepared<S> ready,
                          const bool aligned) {
  using Tile = TokenTile<S, L::kTokens>;
  DEQCORE_SHARED_DOUBLES(shared);
  S* const buffers = reinterpret_cast<S*>(shared);
  const SparseRows& weight = args.weight;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // Blocks that run together share a tile of tokens, which the L2 cache then keeps.
  const int64_t row_tiles = blocks_for(weight.rows, L::kTileRows);
  const int64_t token_tile = blockIdx.x / row_tiles;
  const int64_t first_row = blockIdx.x % row_tiles * L::kTileRows + warp * L::kRows;
  const int64_t own_row = first_row + lane;  // whose entries this lane looks up
  const bool has_row = lane < L::kRows && own_row < weight.rows;

  const auto end_of = [&](int64_t chunk) {
    return has_row && chunk < ready.chunks ? ready.ends[chunk * weight.rows + own_row] : 0;
  };

  Compute<S> sums[L::kRows][L::kTokens] = {};
  int begin = has_row ? weight.offsets[own_row] : 0, end = end_of(0);
  if (begin < end) ask_for_line(ready.entries + begin);
  fetch_chunk<Tile>(ready.turned, ready.padded, weight.width, 0, token_tile, L::kThreads, buffers);
#pragma unroll 1
  for (int64_t chunk = 0; chunk < ready.chunks; ++chunk) {
    wait_for_copies();
    __syncthreads();  // all see this chunk, and none still reads the one before it
    S* const buffer = buffers + chunk % 2 * (Tile::kColumns * Tile::kWidth);
    if (chunk + 1 < ready.chunks) {
      S* const other = buffers + (chunk + 1) % 2 * (Tile::kColumns * Tile::kWidth);
      fetch_chunk<Tile>(ready.turned, ready.padded, weight.width, chunk + 1, token_tile,
                        L::kThreads, other);
    }
    // The next chunk's entries come from afar, and all warps would wait for them at once.
    const int next_end = end_of(chunk + 1);
    if (end < next_end) ask_for_line(ready.entries + end);
    const char* const own = reinterpret_cast<const char*>(buffer + lane * L::kTokens);
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int first = __shfl_sync(kWholeWarp, begin, r), last = __shfl_sync(kWholeWarp, end, r);
      add_entries<S, L::kTokens>(ready.entries, first, last, own, sums[r]);
    }
    begin = end;
    end = next_end;
  }

  const int64_t token = token_tile * Tile::kWidth + lane * L::kTokens;
#pragma unroll
  for (int t = 0; t < L::kTokens; ++t) {
    if (token + t < args.tokens) {
      store_token<S, L>(args, token + t, first_row, sums, t, aligned);
    }
  }
}

template <typename S, typename L>
Prepared<S> prepare_in(const MaskedLinearArgs& args, Pieces& pieces) {
  using Tile = TokenTile<S, L::kTokens>;
  const SparseRows& weight = args.weight;
  const int64_t padded = Tile::padded(args.tokens), chunks = Tile::chunks(weight.width);
  Prepared<S> ready{};
  ready.entries = pieces.take<Entry<Compute<S>>>(weight.kept);
  ready.ends = pieces.take<int32_t>(chunks * weight.rows);
  ready.turned = pieces.take<S>(weight.width * padded);
  ready.padded = padded;
  ready.chunks = chunks;
  return ready;
}

template <typename S, typename L>
const char* launch_layout(const MaskedLinearArgs& args, void* workspace, Stream stream) {
  using Tile = TokenTile<S, L::kTokens>;
  const SparseRows& weight = args.weight;
  Pieces pieces(workspace);
  const Prepared<S> ready = prepare_in<S, L>(args, pieces);
  const Roles roles{blocks_for(weight.kept, kPrepareThreads),
                    blocks_for(ready.chunks * weight.rows, kPrepareThreads),
                    {args.x, ready.turned, args.tokens, ready.padded, weight.width}};
  const int64_t first = roles.pack + roles.look_up + turn_blocks(roles.turned);
  const char* const error = launch(masked_linear_prepare<S, Tile>, first, kPrepareThreads,
                                   turn_shared_bytes<S>(), stream, args, ready, roles);
  if (error != nullptr) return error;

  const int64_t row_tiles = blocks_for(weight.rows, L::kTileRows);
  const int64_t blocks = row_tiles * (ready.padded / Tile::kWidth);
  const int64_t used = ready.chunks > 1 ? 2 * kChunkBytes : weight.width * Tile::kColumnBytes;
  // A lane's rows of y begin at a multiple of kRows, so at one of 16 bytes if each row of y does.
  const bool aligned = weight.rows * sizeof(S) % 16 == 0 && are_aligned(16, {args.y});
  return launch(masked_linear_product<S, L>, blocks, L::kThreads, used, stream, args, ready,
                aligned);
}

// Calls run with the layout of a path: run.operator()<S, Layout>().
template <typename S, typename Run>
auto with_layout(LinearPath path, const Run& run) {
  if (path == LinearPath::tiles || path == LinearPath::large) {
    return run.template operator()<S, Large<S>>();
  }
  if (path == LinearPath::small_tiles || path == LinearPath::medium) {
    return run.template operator()<S, Medium<S>>();
  }
  return run.template operator()<S, Few>();
}

template <typename Run>
auto with_types(Dtype type, LinearPath path, const Run& run) {
  return with_dtype(type, [&]<typename S>() { return with_layout<S>(path, run); });
}

bool is_strips(LinearPath path, Dtype type) {
  return (path == LinearPath::large || path == LinearPath::medium) && type != Dtype::f64;
}

}  // namespace

LinearPath masked_linear_path(const MaskedLinearArgs& args, Dtype type) {
  constexpr int64_t kFewTokens = 64;
  constexpr int64_t kEnoughBlocks = 256;  // about two for each multiprocessor of a large GPU
  if (masked_linear_has_blocks(args, type)) {
    if (masked_linear_has_groups(args) && takes_hopper_paths()) return LinearPath::groups;
    const int64_t tiles = blocks_for(args.tokens, 256) * (args.weight.rows / args.weight.block);
    return args.tokens <= kFewTokens || tiles < kEnoughBlocks ? LinearPath::few_blocks
                                                              : LinearPath::blocks;
  }
  const bool on_trial = takes_trial_paths();
  if (on_trial && masked_linear_can_gather(args, type)) return LinearPath::gather;
  if (args.tokens <= kFewTokens) return LinearPath::few;
  if (!on_trial) {
    const int64_t tiles = blocks_for(args.tokens, 128) * blocks_for(args.weight.rows, 256);
    return tiles >= kEnoughBlocks ? LinearPath::tiles : LinearPath::small_tiles;
  }
  const int64_t strips = blocks_for(args.tokens, 256) * blocks_for(args.weight.rows, 160);
  return strips >= kEnoughBlocks ? LinearPath::large : LinearPath::medium;
}

int64_t masked_linear_workspace_bytes(const MaskedLinearArgs& args, Dtype type, LinearPath path) {
  if (path == LinearPath::groups) return masked_linear_groups_bytes(args);
  if (is_strips(path, type))
    return masked_linear_strips_bytes(args, type, path == LinearPath::large);
  if (path == LinearPath::blocks || path == LinearPath::few_blocks) return 0;
  if (path == LinearPath::gather) return 0;
  return with_types(type, path, [&]<typename S, typename L>() {
    Pieces pieces(nullptr);
    prepare_in<S, L>(args, pieces);
    return pieces.used();
  });
}

const char* masked_linear(const MaskedLinearArgs& args, Dtype type, LinearPath path,
                          void* workspace, void* stream) {
  if (args.tokens == 0 || args.weight.rows == 0) return nullptr;
  if (const char* const error = check_gpu()) return error;
  if (path == LinearPath::groups) return masked_linear_groups(args, type, workspace, stream);
  if (is_strips(path, type))
    return masked_linear_strips(args, type, path == LinearPath::large, workspace, stream);
  if (path == LinearPath::blocks || path == LinearPath::few_blocks) {
    return masked_linear_blocks(args, type, path == LinearPath::few_blocks, stream);
  }
  if (path == LinearPath::gather) return masked_linear_gather(args, type, stream);
  return with_types(type, path, [&]<typename S, typename L>() {
    return launch_layout<S, L>(args, workspace, static_cast<Stream>(stream));
  });
}

}  // namespace deqcore::cuda
