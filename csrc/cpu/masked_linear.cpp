// Binding of masked_linear for CPU tensors.
#include "cpu/masked_linear.h"

#include <optional>

#include "cpu/masked_work.h"
#include "ops/masked_linear_binding.h"
#include "ops/torch.h"

namespace deqcore::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // multiply-adds worth a thread of their own

// Values, and bias, in the order and type that the kernels want.
struct Operands {
  const void* values;
  const void* bias;
  std::unique_ptr<char[]> value_copy, bias_copy;
};

Operands prepare(const SparseRows& weight, const Tensor& values, const std::optional<Tensor>& bias,
                 Dtype type, bool packs_blocks) {
  Operands out{values.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, {}, {}};
  const int64_t size = compute_size(type);
  if (packs_blocks || weight.position != nullptr || is_half(type)) {
    out.value_copy = uninitialised(weight.kept * size);
    void* copy = out.value_copy.get();
    if (packs_blocks) {
      torch::stable::parallel_for(
          0, weight.rows / weight.block, 1, [&](int64_t begin, int64_t end) {
            DEQCORE_DISPATCH_ISA(masked_pack_blocks, weight, out.values, type, copy, begin, end);
          });
    } else {
      torch::stable::parallel_for(0, weight.kept, kGrain, [&](int64_t begin, int64_t end) {
        DEQCORE_DISPATCH_ISA(masked_values, weight, out.values, type, copy, begin, end);
      });
    }
    out.values = copy;
  }
  if (bias && is_half(type)) {
    out.bias_copy = uninitialised(weight.rows * size);
    const SparseRows in_order{nullptr, nullptr, nullptr, weight.rows, 0, weight.rows, 1};
    DEQCORE_DISPATCH_ISA(masked_values, in_order, out.bias, type, out.bias_copy.get(), int64_t{0},
                         weight.rows);
    out.bias = out.bias_copy.get();
  }
  return out;
}

Tensor masked_linear_op(const Tensor& x, const Tensor& values, const Tensor& pattern,
                        std::optional<Tensor> bias, int64_t rows, int64_t columns, int64_t block,
                        bool transposed, bool /*dense_outer: of the derivative*/) {
  const MaskedLinearOperands checked =
      masked_linear_operands(x, values, pattern, bias, rows, columns, block, transposed);
  const Dtype type = checked.type;
  const SparseRows& weight = checked.weight;
  if (bias) bias = torch::stable::contiguous(*bias);
  const Tensor inputs = torch::stable::contiguous(x), kept = torch::stable::contiguous(values);
  const int64_t tokens = x.size(0);
  Tensor y = torch::stable::new_empty(x, {tokens, weight.rows});
  if (y.numel() == 0) return y;

  // For fewer tokens than lanes, packing blocks would cost more than it saves.
  const bool by_blocks = block > 1 && tokens >= 4;
  const Operands operands = prepare(weight, kept, bias, type, by_blocks);
  const int64_t tile = DEQCORE_DISPATCH_ISA(masked_linear_tile, type);
  const int64_t column_bytes = std::min(tokens, tile) * compute_size(type);
  const int64_t step = columns_at_a_time(weight, column_bytes, /*first_cache=*/32 << 10,
                                         /*entries_per_row=*/24);
  const std::vector<int32_t> starts =
      by_blocks ? std::vector<int32_t>{} : find_starts(weight, step);

  const int64_t tiles = (tokens + tile - 1) / tile;
  const int64_t work = weight.kept * tokens + x.numel() + y.numel();
  const int64_t tasks = std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / kGrain);
  const int64_t row_chunks = std::max<int64_t>(1, tasks / tiles);
  const MaskedLinearArgs args{
      .x = inputs.const_data_ptr(),
      .values = operands.values,
      .bias = operands.bias,
      .y = y.mutable_data_ptr(),
      .weight = weight,
      .blocks = {starts.data(), step},
      .tokens = tokens,
      .row_chunks = row_chunks,
  };
  const int64_t total = tiles * row_chunks;
  torch::stable::parallel_for(
      0, total, (total + tasks - 1) / tasks, [&](int64_t begin, int64_t end) {
        if (by_blocks) {
          DEQCORE_DISPATCH_ISA(masked_linear_blocks, args, type, begin, end);
        } else {
          DEQCORE_DISPATCH_ISA(masked_linear, args, type, begin, end);
        }
      });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&masked_linear_op));
}

}  // namespace deqcore::cpu
