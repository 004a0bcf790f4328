// Bindings of masked_to_dense, masked_expand and masked_from_dense for CPU tensors: they move
// numbers and compute nothing, so that one version of all but masked_expand serves every
// instruction set.
#include <atomic>
#include <cstring>

#include "cpu/masked_expand.h"
#include "ops/masked_dense_binding.h"
#include "ops/torch.h"

namespace deqcore::cpu {
namespace {

constexpr int64_t kGrain = 64;  // rows

// Calls run(uint16_t{}), run(uint32_t{}) or run(uint64_t{}) for numbers of that size.
template <typename Run>
void with_size(Dtype type, const Run& run) {
  if (type == Dtype::f64) return run(uint64_t{});
  if (type == Dtype::f32) return run(uint32_t{});
  return run(uint16_t{});
}

Tensor masked_to_dense(const Tensor& values, const Tensor& pattern, int64_t rows, int64_t columns) {
  const MaskedDenseOperands checked = masked_to_dense_operands(values, pattern, rows, columns);
  const SparseRows& entries = checked.entries;
  const Tensor kept = torch::stable::contiguous(values);
  Tensor dense = torch::stable::new_empty(values, {rows, columns});
  if (dense.numel() == 0) return dense;
  with_size(checked.type, [&]<typename Bits>(Bits) {
    const Bits* from = static_cast<const Bits*>(kept.const_data_ptr());
    Bits* to = static_cast<Bits*>(dense.mutable_data_ptr());
    const int32_t *offsets = entries.offsets, *places = entries.columns;
    torch::stable::parallel_for(0, rows, kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Bits* out = to + row * columns;
        std::memset(out, 0, columns * sizeof(Bits));
#pragma GCC unroll 4
        for (int64_t i = offsets[row], last = offsets[row + 1]; i < last; ++i) {
          out[places[i]] = from[i];
        }
      }
    });
  });
  return dense;
}

Tensor masked_expand(const Tensor& values, const Tensor& words, const Tensor& pattern, int64_t rows,
                     int64_t columns) {
  const MaskedDenseOperands checked = masked_to_dense_operands(values, pattern, rows, columns);
  const SparseRows& entries = checked.entries;
  const int64_t cells = rows * columns;
  DEQCORE_CHECK(words.scalar_type() == ScalarType::Byte && words.is_contiguous() &&
                    words.numel() == (cells + 7) / 8,
                "words: expected a contiguous uint8 tensor of ", (cells + 7) / 8, " entries, got ",
                words.numel());
  const Tensor kept = torch::stable::contiguous(values);
  Tensor dense = torch::stable::new_empty(values, {rows, columns});
  if (cells == 0) return dense;
  const MaskedExpandArgs args{kept.const_data_ptr(),
                              static_cast<const uint8_t*>(words.const_data_ptr()),
                              dense.mutable_data_ptr(), kept.numel(), cells};
  // A thread begins where a row's place in the values is known, and a byte of its bits.
  const int64_t step = columns % kExpandCells == 0 ? 1 : rows;
  std::atomic<bool> done = true;
  torch::stable::parallel_for(
      0, rows / step, step == 1 ? kGrain : 1, [&](int64_t from, int64_t to) {
        const int64_t first = from * step, last = to * step;
        const bool mine =
            DEQCORE_DISPATCH_ISA(masked_expand, args, checked.type, entries.offsets[first],
                                 first * columns, last * columns);
        if (!mine) done = false;
      });
  return done ? dense : masked_to_dense(values, pattern, rows, columns);
}

Tensor masked_from_dense(const Tensor& dense, const Tensor& pattern) {
  const MaskedDenseOperands checked = masked_from_dense_operands(dense, pattern);
  const SparseRows& entries = checked.entries;
  const int64_t rows = entries.rows, columns = entries.width;
  const Tensor source = torch::stable::contiguous(dense);
  Tensor values = torch::stable::new_empty(dense, {entries.kept});
  if (entries.kept == 0) return values;
  with_size(checked.type, [&]<typename Bits>(Bits) {
    const Bits* from = static_cast<const Bits*>(source.const_data_ptr());
    Bits* to = static_cast<Bits*>(values.mutable_data_ptr());
    const int32_t *offsets = entries.offsets, *places = entries.columns;
    torch::stable::parallel_for(0, rows, kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Bits* in = from + row * columns;
#pragma GCC unroll 4
        for (int64_t i = offsets[row], last = offsets[row + 1]; i < last; ++i) {
          to[i] = in[places[i]];
        }
      }
    });
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deqcore, CPU, m) {
  m.impl("masked_to_dense", TORCH_BOX(&masked_to_dense));
  m.impl("masked_expand", TORCH_BOX(&masked_expand));
  m.impl("masked_from_dense", TORCH_BOX(&masked_from_dense));
}

}  // namespace deqcore::cpu
