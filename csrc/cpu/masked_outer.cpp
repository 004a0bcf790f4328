// Binding of masked_outer for CPU tensors.
#include "cpu/masked_outer.h"

#include <cstring>

#include "cpu/masked_work.h"
#include "ops/masked_outer_binding.h"
#include "ops/torch.h"

namespace deqcore::cpu {
namespace {

// Tiles are transposed a few at a time, one for each thread, into memory that stays in the caches.
void outer_by_tiles(MaskedOuterArgs args, Dtype type, int64_t threads) {
  const SparseRows& entries = args.entries;
  const int64_t width = DEQCORE_DISPATCH_ISA(masked_outer_tile, type, args.tokens);
  const int64_t size = compute_size(type);
  const int64_t step = columns_at_a_time(entries, width * size, /*first_cache=*/32 << 10,
                                         /*entries_per_row=*/24);
  const std::vector<int32_t> starts = find_starts(entries, step);
  args.blocks = {starts.data(), step};

  const int64_t tiles = (args.tokens + width - 1) / width;
  const int64_t batch = std::min(threads, tiles);
  const int64_t left_bytes = entries.rows * width * size,
                right_bytes = entries.width * width * size;
  const auto memory = uninitialised(batch * (left_bytes + right_bytes) + 64);
  char* lefts = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
  char* rights = lefts + batch * left_bytes;
  const std::vector<int64_t> bounds = balance_rows(entries, entries.rows, threads);
  const int64_t stored = stored_size(type);

  for (int64_t first = 0; first < tiles; first += batch) {
    const int64_t count = std::min(batch, tiles - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = (first + i) * width;
        const auto transpose = [&](const void* source, int64_t columns, char* out) {
          const void* from = static_cast<const char*>(source) + token * columns * stored;
          DEQCORE_DISPATCH_ISA(masked_outer_transpose, from, type, args.tokens - token, columns,
                               width, out);
        };
        transpose(args.left, entries.rows, lefts + i * left_bytes);
        transpose(args.right, entries.width, rights + i * right_bytes);
      }
    });
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        const OuterTile tile{
            .left = lefts + i * left_bytes,
            .right = rights + i * right_bytes,
            .width = width,
            .next = (first + i + batch) * width,
            .first = bounds[begin],
            .last = bounds[end],
            .fresh = first + i == 0,
        };
        DEQCORE_DISPATCH_ISA(masked_outer, args, type, tile);
      }
    });
  }
}

Tensor masked_outer_op(const Tensor& left, const Tensor& right, const Tensor& pattern, int64_t rows,
                       int64_t columns, int64_t block) {
  const MaskedOuterOperands checked =
      masked_outer_operands(left, right, pattern, rows, columns, block);
  const Dtype type = checked.type;
  const SparseRows& entries = checked.entries;
  const int64_t kept = entries.kept, tokens = left.size(0);
  const Tensor lefts = torch::stable::contiguous(left), rights = torch::stable::contiguous(right);
  Tensor values = torch::stable::new_empty(left, {kept});
  if (kept == 0) return values;
  void* out = values.mutable_data_ptr();
  if (tokens == 0) return std::memset(out, 0, kept * values.element_size()), values;

  const auto sums = uninitialised(is_half(type) ? kept * compute_size(type) : 0);
  const MaskedOuterArgs args{
      .left = lefts.const_data_ptr(),
      .right = rights.const_data_ptr(),
      .values = is_half(type) ? sums.get() : out,
      .entries = entries,
      .blocks = {},
      .tokens = tokens,
  };
  const int64_t work = kept * tokens + left.numel() + right.numel();
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / (1 << 15));
  if (block > 1) {
    const std::vector<int64_t> bounds = balance_rows(entries, rows / block, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      DEQCORE_DISPATCH_ISA(masked_outer_blocks, args, type, bounds[begin], bounds[end]);
    });
  } else {
    outer_by_tiles(args, type, threads);
  }
  if (is_half(type)) {
    torch::stable::parallel_for(0, kept, 1 << 15, [&](int64_t begin, int64_t end) {
      DEQCORE_DISPATCH_ISA(masked_outer_round, sums.get(), type, out, begin, end);
    });
  }
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) { m.impl("masked_outer", TORCH_BOX(&masked_outer_op)); }

}  // namespace deqcore::cpu
