// The gradient of the kept weights: for each, the dot product over tokens of a column of `left` and
// one of `right`. Both are transposed tile by tile, so that a column is contiguous; a row of left
// stays in registers while its entries are taken four at a time.
#include "cpu/masked_outer.h"

#include "cpu/masked_vectors.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace masked {
namespace {

constexpr int kTileVectors = 6;
constexpr int kEntries = 4;

template <typename T>
constexpr int kTile = kTileVectors * kLanes<T>;

// values[0..count) += the dot products of `left` with up to four columns of the tile.
template <typename T>
[[gnu::always_inline]] inline void add_dots(const Vector<T, kLanes<T>> (&left)[kTileVectors],
                                            const T* tile, const int32_t* columns, int64_t count,
                                            bool fresh, T* values) {
  constexpr int N = kLanes<T>;
  const T* column[kEntries];
#pragma GCC unroll 4
  for (int i = 0; i < kEntries; ++i) {
    column[i] = tile + static_cast<int64_t>(columns[i < count ? i : 0]) * kTile<T>;
    asm("" : "+r"(column[i]));
  }
  Vector<T, N> sums[kEntries] = {};
#pragma GCC unroll 8
  for (int v = 0; v < kTileVectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < kEntries; ++i) {
      sums[i] = fma<T, N>(left[v], load<T, N>(column[i] + v * N), sums[i]);
    }
  }
  T totals[kEntries];
  add_lanes<T, N>(sums, totals);
  if (count == kEntries) {
    for (int i = 0; i < kEntries; ++i) values[i] = fresh ? totals[i] : values[i] + totals[i];
  } else {
    for (int i = 0; i < count; ++i) values[i] = fresh ? totals[i] : values[i] + totals[i];
  }
}

// This caller's share of the rows of a tile that will be transposed later.
template <typename S>
Ahead next_tile(const void* source, const MaskedOuterArgs& args, int64_t columns, int64_t token,
                int64_t first, int64_t last, int64_t calls) {
  const int64_t left = args.tokens - token;
  const int64_t tokens = left < 0 ? 0 : left < kTile<Sum<S>> ? left : kTile<Sum<S>>;
  const int64_t begin = tokens * first / args.entries.rows, end = tokens * last / args.entries.rows;
  return Ahead(static_cast<const S*>(source) + (token + begin) * columns, end - begin,
               columns * sizeof(S), columns * sizeof(S), calls);
}

template <typename S>
void add_tile(const MaskedOuterArgs& args, const Sum<S>* left_tile, const Sum<S>* right_tile,
              int64_t token, int64_t next, int64_t first, int64_t last) {
  typedef Sum<S> T;
  constexpr int N = kLanes<T>;
  const SparseRows& entries = args.entries;
  const bool fresh = token == 0;
  const int64_t calls =
      (last - first) * ((entries.width + args.blocks.columns - 1) / args.blocks.columns);
  Ahead lefts = next_tile<S>(args.left, args, entries.rows, next, first, last, calls);
  Ahead rights = next_tile<S>(args.right, args, entries.width, next, first, last, calls);
  T* values = static_cast<T*>(args.values);
  const int64_t step = args.blocks.columns;
  for (int64_t block = 0; block * step < entries.width; ++block) {
    const int32_t* starts = args.blocks.starts + block * entries.rows;
    const int32_t* ends = starts + entries.rows;
    for (int64_t row = first; row < last; ++row) {
      lefts.fetch<false>();
      rights.fetch<false>();
      if (starts[row] == ends[row]) continue;
      Vector<T, N> left[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        left[v] = load<T, N>(left_tile + row * kTile<T> + v * N);
      }
      int64_t entry = starts[row];
      for (; entry + kEntries <= ends[row]; entry += kEntries) {
        add_dots<T>(left, right_tile, entries.columns + entry, kEntries, fresh, values + entry);
      }
      if (entry < ends[row]) {
        add_dots<T>(left, right_tile, entries.columns + entry, ends[row] - entry, fresh,
                    values + entry);
      }
    }
  }
}

}  // namespace
}  // namespace masked

int64_t masked_outer_tile(ValueType type) {
  return type == ValueType::f64 ? masked::kTile<double> : masked::kTile<float>;
}

void masked_outer_transpose(const void* source, ValueType type, int64_t tokens, int64_t columns,
                            int64_t token, void* out) {
  masked::with_value_type(type, [&]<typename S>() {
    typedef masked::Sum<S> T;
    masked::transpose_in<S, masked::kLanes<T>, masked::kTile<T>>(
        static_cast<const S*>(source) + token * columns, columns, tokens - token, columns,
        static_cast<T*>(out));
  });
}

void masked_outer(const MaskedOuterArgs& args, ValueType type, const void* left_tile,
                  const void* right_tile, int64_t token, int64_t next, int64_t first,
                  int64_t last) {
  masked::with_value_type(type, [&]<typename S>() {
    typedef masked::Sum<S> T;
    masked::add_tile<S>(args, static_cast<const T*>(left_tile), static_cast<const T*>(right_tile),
                        token, next, first, last);
  });
}

void masked_outer_round(const void* sums, ValueType type, void* out, int64_t begin, int64_t end) {
  masked::with_value_type(type, [&]<typename S>() {
    typedef masked::Sum<S> T;
    constexpr int N = masked::kLanes<T>;
    const T* from = static_cast<const T*>(sums);
    S* to = static_cast<S*>(out);
    int64_t i = begin;
    for (; i + N <= end; i += N) {
      masked::store_sum<S, N>(to + i, masked::load<T, N>(from + i));
    }
    if (i < end) masked::store_part<S, N>(to + i, masked::load_part<T, N>(from + i, end - i), end - i);
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
