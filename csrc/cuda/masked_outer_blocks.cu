// masked_outer's CUDA kernels for blocks of 16, 32 or 64 in bfloat16 or float16: a block of threads
// takes one block of the weight and sums over all tokens on tensor cores, while the next tokens are
// copied beside it. One launch, no scratch memory. No torch.
//
// A sum runs over groups of 16 tokens in their order, whatever the number of tokens. For 16 tokens
// a warp loads as many tiles of each operand as its part of the block has (4 passes of 128 bytes of
// shared memory each): 2 passes for each product of 2048 multiply-adds at 64, 4 at 32 and 16. The
// L2 cache gives 4 / kSide bytes for each multiply-add. There are no more blocks of threads than
// kept blocks: a small weight does not fill a large GPU.
#include "cuda/masked_blocks.cuh"
#include "cuda/masked_outer.h"
#include "cuda/path.h"

namespace deqcore::cuda {
namespace {

constexpr int kTokens = 64;  // copied at a time

// How a block is shared out: kSplit x kSplit warps, kParts x kParts groups of 16 each.
template <int kSideOfABlock>
struct Shape {
  static constexpr int kSide = kSideOfABlock;
  static constexpr int kSplit = kSide == 16 ? 1 : 2;
  static constexpr int kParts = kSide / 16 / kSplit;
  static constexpr int kThreads = kSplit * kSplit * kWarp;
  static constexpr int kRowBytes = 2 * kSide;
  static constexpr int kOperand = kTokens * kRowBytes;  // bytes
  static constexpr int kStage = 2 * kOperand;
};

// Starts copying kTokens tokens of kSide neighbouring columns; zeros after the last token.
template <typename S, typename Sh>
DEQCORE_DEVICE void fetch_tokens(const void* from, int64_t stride, int64_t column, int64_t token,
                                 int64_t tokens, char* to) {
  using Rows = BankedRows<Sh::kRowBytes>;
  constexpr int kNumbers = 16 / static_cast<int>(sizeof(S));
  const S* const source = static_cast<const S*>(from) + column;
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * Rows::kPieces; i += Sh::kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    const bool there = token + row < tokens;
    if (there) count_read(16, false);
    const int64_t at = there ? token + row : 0;
    copy_async_16(to + Rows::place(row, piece), source + at * stride + piece * kNumbers, there);
  }
}

// The row of blocks that kept block `index` is in: the last one that begins no later.
DEQCORE_DEVICE int64_t block_row_of(const SparseRows& entries, int side, int64_t index) {
  const int64_t entry = index * side * side;
  int64_t low = 0, high = entries.rows / side;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (entries.offsets[middle * side] <= entry) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename S, typename Sh>
__global__ void __launch_bounds__(Sh::kThreads) masked_outer_by_blocks(const MaskedOuterArgs args) {
  DEQCORE_SHARED_DOUBLES(shared);
  char* const stages = reinterpret_cast<char*>(shared);
  const SparseRows& entries = args.entries;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = block_row_of(entries, Sh::kSide, blockIdx.x) * Sh::kSide;
  const int first = entries.offsets[row], length = entries.offsets[row + 1] - first;
  const int along = static_cast<int>(int64_t{blockIdx.x} - first / (Sh::kSide * Sh::kSide)) *
                    Sh::kSide;  // entries of the row before this block
  const int64_t column = entries.columns[first + along];
  const auto fetch = [&](int64_t token, char* to) {
    fetch_tokens<S, Sh>(args.left, entries.rows, row, token, args.tokens, to);
    fetch_tokens<S, Sh>(args.right, entries.width, column, token, args.tokens, to + Sh::kOperand);
  };

  constexpr int kShare = 16 * Sh::kParts;  // rows and columns of a warp
  const int own_row = warp / Sh::kSplit * kShare, own_column = warp % Sh::kSplit * kShare;
  WarpTile<S, Sh::kParts, Sh::kParts> tile;
  tile.clear();
  const int64_t steps = blocks_for(args.tokens, kTokens);
  if (steps > 0) fetch(0, stages);
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies();
    __syncthreads();  // all see these tokens, and none still reads those before them
    const char* const left = stages + step % 2 * Sh::kStage;
    if (step + 1 < steps) fetch((step + 1) * kTokens, stages + (step + 1) % 2 * Sh::kStage);
#pragma unroll
    for (int k = 0; k < kTokens; k += 16) {
      tile.template add<Sh::kRowBytes, true, true>(left, own_row, left + Sh::kOperand, own_column,
                                                   k, lane);
    }
  }
  S* const values = static_cast<S*>(args.values) + first + along;
  tile.each_pair(lane, [&](int m, int n, const Pack<S, 2>& pair) {
    store<true, 2>(values + int64_t{own_row + m} * length + own_column + n, pair, 2);
  });
}

template <typename S, typename Sh>
const char* launch_shape(const MaskedOuterArgs& args, Stream stream) {
  const int64_t blocks = args.entries.kept / (Sh::kSide * Sh::kSide);
  return launch(masked_outer_by_blocks<S, Sh>, blocks, Sh::kThreads, 2 * Sh::kStage, stream, args);
}

template <typename S>
const char* launch_side(const MaskedOuterArgs& args, Stream stream) {
  if (args.entries.block == 16) return launch_shape<S, Shape<16>>(args, stream);
  if (args.entries.block == 32) return launch_shape<S, Shape<32>>(args, stream);
  return launch_shape<S, Shape<64>>(args, stream);
}

}  // namespace

bool masked_outer_has_blocks(const MaskedOuterArgs& args, Dtype type) {
  return is_half(type) && args.entries.block > 1 &&
         are_aligned(16, {args.left, args.right, args.values});
}

const char* masked_outer_blocks(const MaskedOuterArgs& args, Dtype type, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  return type == Dtype::bf16 ? launch_side<BFloat16>(args, on) : launch_side<Half>(args, on);
}

}  // namespace deqcore::cuda
