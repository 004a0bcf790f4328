// What the bindings of the masked matmuls share: reading a pattern, spreading work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/masked.h"

namespace deqcore::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ValueType value_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ValueType::f64;
    case ScalarType::Float:
      return ValueType::f32;
    case ScalarType::BFloat16:
      return ValueType::bf16;
    case ScalarType::Half:
      return ValueType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
  }
}

inline int64_t sum_size(ValueType type) {
  return type == ValueType::f64 ? sizeof(double) : sizeof(float);
}

inline bool is_half(ValueType type) { return type == ValueType::bf16 || type == ValueType::f16; }

// A pattern is one int32 tensor: offsets of the rows, columns of the entries, offsets of the
// columns, rows of the entries taken by column, and where in row order each of these is.
inline SparseRows read_pattern(const Tensor& pattern, int64_t kept, int64_t rows, int64_t columns,
                               int64_t block, bool transposed) {
  const int64_t expected = rows + columns + 2 + 3 * kept;
  STD_TORCH_CHECK(pattern.scalar_type() == ScalarType::Int && pattern.is_contiguous() &&
                      pattern.dim() == 1 && pattern.numel() == expected,
                  "pattern: expected a contiguous int32 tensor of ", expected, " entries, for ",
                  kept, " values of a ", rows, " x ", columns, " weight; got ", pattern.numel(),
                  "; use SparsityPattern");
  STD_TORCH_CHECK(block == 1 || block == 16 || block == 32 || block == 64,
                  "block: expected 1, 16, 32 or 64, got ", block);
  STD_TORCH_CHECK(rows % block == 0 && columns % block == 0, "block: ", block,
                  " does not divide a ", rows, " x ", columns, " weight");
  const int32_t* by_row = pattern.const_data_ptr<int32_t>();
  const int32_t* by_column = by_row + rows + 1 + kept;
  if (!transposed) return {by_row, by_row + rows + 1, nullptr, rows, columns, kept, block};
  return {by_column, by_column + columns + 1, by_column + columns + 1 + kept, columns, rows, kept,
          block};
}

inline void check_matrix(const Tensor& tensor, const char* name, ScalarType dtype,
                         int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == columns, name, ": expected (tokens, ",
                  columns, "), got ", tensor.dim(), " dimensions, the last of ",
                  tensor.dim() ? tensor.size(-1) : 0);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected the values' dtype");
}

// How many columns of a transposed tile to take at a time: they should fit the first-level cache,
// but each row should find some entries among them.
inline int64_t columns_at_a_time(const SparseRows& entries, int64_t column_bytes,
                                 int64_t first_cache, int64_t entries_per_row) {
  constexpr int64_t kSecondCache = 256 << 10;  // a share of it
  const int64_t cells = entries.rows * entries.width;
  const int64_t wanted = entries_per_row * cells / std::max<int64_t>(entries.kept, 1);
  const int64_t least = first_cache / column_bytes, most = kSecondCache / column_bytes;
  const int64_t columns = std::min(std::max(wanted, least), most);
  const int64_t rounded = (columns + 15) / 16 * 16;
  return std::max<int64_t>(1, std::min(rounded, entries.width));
}

inline std::vector<int32_t> find_starts(const SparseRows& entries, int64_t columns) {
  const int64_t rows = entries.rows;
  const int64_t blocks = std::max<int64_t>(1, (entries.width + columns - 1) / columns);
  std::vector<int32_t> starts((blocks + 1) * rows);
  torch::stable::parallel_for(0, rows, 1 << 10, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t at = entries.offsets[row];
      const int32_t stop = entries.offsets[row + 1];
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t limit = block * columns;
        while (block > 0 && at < stop && entries.columns[at] < limit) ++at;
        starts[block * rows + row] = at;
      }
      starts[blocks * rows + row] = stop;
    }
  });
  return starts;
}

inline std::unique_ptr<char[]> uninitialised(int64_t bytes) {
  return std::make_unique_for_overwrite<char[]>(bytes);
}

// Rows (or rows of blocks) into `count` parts with about as many entries each: [count + 1].
inline std::vector<int64_t> balance_rows(const SparseRows& entries, int64_t rows, int64_t count) {
  const int64_t size = rows > 0 ? entries.rows / rows : 1;
  std::vector<int64_t> bounds{0};
  for (int64_t part = 1; part < count; ++part) {
    int64_t row = bounds.back();
    while (row < rows && entries.offsets[row * size] * count < part * entries.kept) ++row;
    bounds.push_back(row);
  }
  bounds.push_back(rows);
  return bounds;
}

}  // namespace deqcore::cpu
