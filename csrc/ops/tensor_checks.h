// What a binding checks of its tensors, on every device, and what it reads from them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "ops/check.h"
#include "ops/dtype.h"
#include "ops/rows.h"
#include "ops/sparse_rows.h"
#include "ops/torch.h"

namespace deqcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

inline std::string shape_text(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return shape_text(sizes);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another one";
  }
}

// Any dtype, any strides.
inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  DEQCORE_CHECK(same, name, ": expected shape ", shape_text(shape), ", got ", shape_text(tensor));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  DEQCORE_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype_name(dtype),
                ", got ", dtype_name(tensor.scalar_type()));
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  check_dtype(tensor, name, dtype);
  check_shape(tensor, name, shape);
  DEQCORE_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// `dimensions` says them as the message should: "(batch, dim)".
inline void check_dimensions(const Tensor& tensor, const char* name, int64_t count,
                             const char* dimensions) {
  DEQCORE_CHECK(tensor.dim() == count, name, ": expected ", dimensions, ", got ",
                shape_text(tensor));
}

inline Dtype check_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(name, ": expected float64, float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

// Of the step ops: x [B, D] and f [B, D], whose dtype it returns; x has the one it is computed in.
inline Dtype check_states(const Tensor& x, const Tensor& f) {
  check_dimensions(x, "x", 2, "(batch, dim)");
  const Dtype type = check_dtype(f, "f");
  const bool wide = type == Dtype::f64;
  check(x, "x", wide ? ScalarType::Double : ScalarType::Float, {x.size(0), x.size(1)});
  check(f, "f", f.scalar_type(), {x.size(0), x.size(1)});
  return type;
}

// z_next, [B, D] in f's dtype, or null where it has no columns because f's dtype is x's.
inline void* check_z_next(const Tensor& z_next, const Tensor& f, Dtype type) {
  if (!is_half(type)) return nullptr;
  check(z_next, "z_next", f.scalar_type(), {f.size(0), f.size(1)});
  return z_next.mutable_data_ptr();
}

inline Rows check_rows(const Tensor& status, const Tensor& counters, const Tensor& residuals,
                       const Tensor& remaining, int64_t batch) {
  check(status, "status", ScalarType::Char, {batch});
  check(counters, "counters", ScalarType::Int, {batch, kCounters});
  check(residuals, "residuals", ScalarType::Double, {batch, kResiduals});
  check(remaining, "remaining", ScalarType::Int, {1});
  return {static_cast<int8_t*>(status.mutable_data_ptr()),
          static_cast<int32_t*>(counters.mutable_data_ptr()),
          static_cast<double*>(residuals.mutable_data_ptr()),
          static_cast<int32_t*>(remaining.mutable_data_ptr())};
}

inline const double* check_damping(const Tensor& damping) {
  check_dimensions(damping, "damping", 1, "(steps)");
  check(damping, "damping", ScalarType::Double, {damping.size(0)});
  DEQCORE_CHECK(damping.size(0) > 0, "damping: expected at least one entry");
  return static_cast<const double*>(damping.const_data_ptr());
}

// The op's numbers, as the structs that `Parts` names; see ops/numbers.h. On the CPU.
template <typename... Parts>
std::tuple<Parts...> read_numbers(const Tensor& options, std::tuple<Parts...>*) {
  check(options, "options", ScalarType::Double, {(Parts::kCount + ...)});
  const double* from = static_cast<const double*>(options.const_data_ptr());
  const auto next = [&from](int64_t count) { return (from += count) - count; };
  return std::tuple<Parts...>{Parts::read(next(Parts::kCount))...};
}

template <typename Numbers>
Numbers check_numbers(const Tensor& options) {
  return read_numbers(options, static_cast<Numbers*>(nullptr));
}

// Of the masked matmuls: the pattern, one int32 tensor: offsets of the rows, columns of the
// entries, offsets of the columns, rows of the entries taken by column, and where in row order each
// of these is.
inline SparseRows check_pattern(const Tensor& pattern, int64_t kept, int64_t rows, int64_t columns,
                                int64_t block, bool transposed) {
  const int64_t expected = rows + columns + 2 + 3 * kept;
  DEQCORE_CHECK(pattern.scalar_type() == ScalarType::Int && pattern.is_contiguous() &&
                    pattern.dim() == 1 && pattern.numel() == expected,
                "pattern: expected a contiguous int32 tensor of ", expected, " entries, for ", kept,
                " values of a ", rows, " x ", columns, " weight; got ", pattern.numel(),
                "; use SparsityPattern");
  DEQCORE_CHECK(block == 1 || block == 16 || block == 32 || block == 64,
                "block: expected 1, 16, 32 or 64, got ", block);
  DEQCORE_CHECK(rows % block == 0 && columns % block == 0, "block: ", block, " does not divide a ",
                rows, " x ", columns, " weight");
  const int32_t* by_row = pattern.const_data_ptr<int32_t>();
  const int32_t* by_column = by_row + rows + 1 + kept;
  if (!transposed) return {by_row, by_row + rows + 1, nullptr, rows, columns, kept, block};
  return {by_column, by_column + columns + 1, by_column + columns + 1 + kept, columns, rows, kept,
          block};
}

// How many values a pattern of that size keeps.
inline int64_t kept_entries(const Tensor& pattern, int64_t rows, int64_t columns) {
  return (pattern.numel() - rows - columns - 2) / 3;
}

// [tokens, columns], in the values' dtype.
inline void check_matrix(const Tensor& tensor, const char* name, ScalarType dtype,
                         int64_t columns) {
  DEQCORE_CHECK(tensor.dim() == 2 && tensor.size(1) == columns, name, ": expected (tokens, ",
                columns, "), got ", shape_text(tensor));
  check_dtype(tensor, name, dtype);
}

}  // namespace deqcore
