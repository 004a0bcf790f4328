// masked_linear's CUDA kernels for blocks of 16, 32 or 64 in bfloat16 or float16: a block of
// threads takes a tile of tokens and one row of blocks, and multiplies block by block on tensor
// cores, while the next block and its columns of x are copied beside it. One launch, no scratch
// memory. No torch.
//
// A warp takes 64 tokens and all kBlock rows. For 16 columns it loads 4 tiles of x and kBlock / 16
// of the weight (4 passes of 128 bytes of shared memory each) for kBlock / 2 tile products of 2048
// multiply-adds: 1 pass for each product at 64, 1.5 at 32, 2.5 at 16. The L2 cache gives
// 2 / kBlock bytes of x, and 2 / 256 bytes of the weight, for each multiply-add. mma.sync reaches
// the full rate of the tensor cores of sm_80 and not of sm_90, where that takes wgmma.
#include "cuda/masked_blocks.cuh"
#include "cuda/masked_linear.h"
#include "cuda/path.h"

namespace deqcore::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// kSide: of a block of the weight; kRows: groups of 16 tokens that a warp takes.
template <int kSideOfABlock, int kGroups>
struct Shape {
  static constexpr int kSide = kSideOfABlock;
  static constexpr int kRows = kGroups;
  static constexpr int kTokens = kWarps * 16 * kRows;
  static constexpr int kRowBytes = 2 * kSide;
  static constexpr int kStage = (kTokens + kSide) * kRowBytes;  // bytes of x and of the block
};

// Where the blocks of one row of blocks are.
struct BlockRow {
  int first;  // entry
  int count;  // blocks
};

// Starts copying block k of a row of blocks, and its columns of x for a tile of tokens.
template <typename S, typename Sh, bool kTurned>
DEQCORE_DEVICE void fetch_block(const MaskedLinearArgs& args, const BlockRow& blocks, int k,
                                int64_t token, char* to) {
  using Rows = BankedRows<Sh::kRowBytes>;
  constexpr int kNumbers = 16 / static_cast<int>(sizeof(S));
  const SparseRows& weight = args.weight;
  const int entry = blocks.first + k * Sh::kSide;
  const S* const x = static_cast<const S*>(args.x) + weight.columns[entry];
  for (int i = static_cast<int>(threadIdx.x); i < Sh::kTokens * Rows::kPieces; i += kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    // Tokens past the last one stand for others; their results are dropped.
    const int64_t at = token + row < args.tokens ? token + row : args.tokens - 1;
    count_read(16, false);
    copy_async_16(to + Rows::place(row, piece), x + at * weight.width + piece * kNumbers);
  }
  char* const block = to + Sh::kTokens * Sh::kRowBytes;
  const S* const values = static_cast<const S*>(args.values);
  for (int i = static_cast<int>(threadIdx.x); i < Sh::kSide * Rows::kPieces; i += kThreads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    // A row of the block as it is stored: of the weight, or a column of its transpose.
    const int at = kTurned ? weight.position[entry + row] : entry + row * blocks.count * Sh::kSide;
    count_read(16, false);
    copy_async_16(block + Rows::place(row, piece), values + at + piece * kNumbers);
  }
}

// kTurned: the weight is the transpose of what is stored.
template <typename S, typename Sh, bool kTurned>
__global__ void __launch_bounds__(kThreads, 2)
    masked_linear_by_blocks(const MaskedLinearArgs args) {
  DEQCORE_SHARED_DOUBLES(shared);
  char* const stages = reinterpret_cast<char*>(shared);
  const SparseRows& weight = args.weight;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // Blocks of threads that run together share a tile of tokens, which the L2 cache then keeps.
  const int64_t block_rows = weight.rows / Sh::kSide;
  const int64_t row = blockIdx.x % block_rows * Sh::kSide;
  const int64_t token = blockIdx.x / block_rows * Sh::kTokens;
  const int first = weight.offsets[row];
  const BlockRow blocks{first, (weight.offsets[row + 1] - first) / Sh::kSide};

  WarpTile<S, Sh::kRows, Sh::kSide / 16> tile;
  tile.clear();
  if (blocks.count > 0) fetch_block<S, Sh, kTurned>(args, blocks, 0, token, stages);
#pragma unroll 1
  for (int k = 0; k < blocks.count; ++k) {
    wait_for_copies();
    __syncthreads();  // all see this block, and none still reads the one before it
    const char* const x = stages + k % 2 * Sh::kStage;
    if (k + 1 < blocks.count) {
      fetch_block<S, Sh, kTurned>(args, blocks, k + 1, token, stages + (k + 1) % 2 * Sh::kStage);
    }
    const char* const block = x + Sh::kTokens * Sh::kRowBytes;
#pragma unroll
    for (int at = 0; at < Sh::kSide; at += 16) {
      tile.template add<Sh::kRowBytes, false, kTurned>(x, warp * 16 * Sh::kRows, block, 0, at,
                                                       lane);
    }
  }

  const S* const bias = static_cast<const S*>(args.bias);
  S* const y = static_cast<S*>(args.y) + row;
  if (bias != nullptr) tile.add_to_columns(lane, bias + row);
  tile.each_pair(lane, [&](int m, int n, const Pack<S, 2>& pair) {
    const int64_t at = token + warp * 16 * Sh::kRows + m;
    if (at < args.tokens) store_whole(y + at * weight.rows + n, pair);
  });
}

template <typename S, typename Sh>
const char* launch_shape(const MaskedLinearArgs& args, Stream stream) {
  const int64_t blocks = args.weight.rows / Sh::kSide * blocks_for(args.tokens, Sh::kTokens);
  return args.weight.position == nullptr ? launch(masked_linear_by_blocks<S, Sh, false>, blocks,
                                                  kThreads, 2 * Sh::kStage, stream, args)
                                         : launch(masked_linear_by_blocks<S, Sh, true>, blocks,
                                                  kThreads, 2 * Sh::kStage, stream, args);
}

template <typename S, int kGroups>
const char* launch_side(const MaskedLinearArgs& args, Stream stream) {
  if (args.weight.block == 16) return launch_shape<S, Shape<16, kGroups>>(args, stream);
  if (args.weight.block == 32) return launch_shape<S, Shape<32, kGroups>>(args, stream);
  return launch_shape<S, Shape<64, kGroups>>(args, stream);
}

}  // namespace

bool masked_linear_has_blocks(const MaskedLinearArgs& args, Dtype type) {
  return is_half(type) && args.weight.block > 1 && are_aligned(16, {args.x, args.values, args.y});
}

const char* masked_linear_blocks(const MaskedLinearArgs& args, Dtype type, bool few_tokens,
                                 void* stream) {
  const Stream on = static_cast<Stream>(stream);
  if (type == Dtype::bf16) {
    return few_tokens ? launch_side<BFloat16, 1>(args, on) : launch_side<BFloat16, 4>(args, on);
  }
  return few_tokens ? launch_side<Half, 1>(args, on) : launch_side<Half, 4>(args, on);
}

}  // namespace deqcore::cuda
