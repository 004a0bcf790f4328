// The gradient of the kept weights: for each, the dot product over tokens of a column of `left` and
// one of `right`. Both are transposed tile by tile, so that a column is contiguous; a row of left
// stays in registers while its entries are taken four at a time.
#include "cpu/masked_outer.h"

#include "cpu/masked_tile.h"
#include "cpu/prefetch.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace {

constexpr int kTileVectors = 6;  // in the widest tile
constexpr int kEntries = 4;      // taken together

// values[0..count) += the dot products of `left` with up to four columns of the tile.
template <typename T, int N, int V>
[[gnu::always_inline]] inline void add_dots(const Vector<T, N> (&left)[V], const T* tile,
                                            const int32_t* columns, int64_t count, bool fresh,
                                            T* values) {
  const T* column[kEntries];
#pragma GCC unroll 4
  for (int i = 0; i < kEntries; ++i) {
    column[i] = tile + static_cast<int64_t>(columns[i < count ? i : 0]) * (N * V);
    asm("" : "+r"(column[i]));  // or the compiler keeps V addresses instead of one and V offsets
  }
  Vector<T, N> sums[kEntries] = {};
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < kEntries; ++i) {
      sums[i] = multiply_add<T, N>(left[v], load<T, N>(column[i] + v * N), sums[i]);
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
Ahead next_tile(const void* source, const MaskedOuterArgs& args, const OuterTile& tile,
                int64_t columns, int64_t calls) {
  const int64_t left = args.tokens - tile.next;
  const int64_t tokens = left < 0 ? 0 : left < tile.width ? left : tile.width;
  const int64_t begin = tokens * tile.first / args.entries.rows;
  const int64_t end = tokens * tile.last / args.entries.rows;
  return Ahead(static_cast<const S*>(source) + (tile.next + begin) * columns, end - begin,
               columns * sizeof(S), columns * sizeof(S), calls);
}

template <typename S, int N, int V>
void add_tile(const MaskedOuterArgs& args, const OuterTile& tile) {
  typedef Compute<S> T;
  const SparseRows& entries = args.entries;
  const T* left_tile = static_cast<const T*>(tile.left);
  const T* right_tile = static_cast<const T*>(tile.right);
  T* values = static_cast<T*>(args.values);
  const int64_t step = args.blocks.columns;
  const int64_t calls = (tile.last - tile.first) * ((entries.width + step - 1) / step);
  Ahead lefts = next_tile<S>(args.left, args, tile, entries.rows, calls);
  Ahead rights = next_tile<S>(args.right, args, tile, entries.width, calls);
  for (int64_t block = 0; block * step < entries.width; ++block) {
    const int32_t* starts = args.blocks.starts + block * entries.rows;
    const int32_t* ends = starts + entries.rows;
    for (int64_t row = tile.first; row < tile.last; ++row) {
      lefts.fetch<false>();
      rights.fetch<false>();
      if (starts[row] == ends[row]) continue;
      Vector<T, N> left[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) left[v] = load<T, N>(left_tile + (row * V + v) * N);
      int64_t entry = starts[row];
      for (; entry + kEntries <= ends[row]; entry += kEntries) {
        add_dots<T, N, V>(left, right_tile, entries.columns + entry, kEntries, tile.fresh,
                          values + entry);
      }
      if (entry < ends[row]) {
        add_dots<T, N, V>(left, right_tile, entries.columns + entry, ends[row] - entry, tile.fresh,
                          values + entry);
      }
    }
  }
}

// Calls run.operator()<N, V>() for tiles of `width` tokens: V vectors of N.
template <typename T, typename Run>
void with_tile(int64_t width, const Run& run) {
  constexpr int N = kLanes<T>;
  if constexpr (N >= 16) {
    if (width == N / 4) return run.template operator()<N / 4, 1>();
  }
  if constexpr (N >= 8) {
    if (width == N / 2) return run.template operator()<N / 2, 1>();
  }
  if (width == N) return run.template operator()<N, 1>();
  if (width == 2 * N) return run.template operator()<N, 2>();
  run.template operator()<N, kTileVectors>();
}

}  // namespace

int64_t masked_outer_tile(Dtype type, int64_t tokens) {
  const int64_t lanes = kRegisterBytes / (type == Dtype::f64 ? 8 : 4);
  if (lanes >= 16 && tokens <= lanes / 4) return lanes / 4;
  if (lanes >= 8 && tokens <= lanes / 2) return lanes / 2;
  if (tokens <= lanes) return lanes;
  if (tokens <= 2 * lanes) return 2 * lanes;
  return kTileVectors * lanes;
}

void masked_outer_transpose(const void* source, Dtype type, int64_t tokens, int64_t columns,
                            int64_t width, void* out) {
  with_dtype(type, [&]<typename S>() {
    typedef Compute<S> T;
    with_tile<T>(width, [&]<int N, int V>() {
      transpose_in<S, N, N * V>(static_cast<const S*>(source), columns, tokens, columns,
                                static_cast<T*>(out));
    });
  });
}

void masked_outer(const MaskedOuterArgs& args, Dtype type, const OuterTile& tile) {
  with_dtype(type, [&]<typename S>() {
    with_tile<Compute<S>>(tile.width, [&]<int N, int V>() { add_tile<S, N, V>(args, tile); });
  });
}

void masked_outer_round(const void* sums, Dtype type, void* out, int64_t begin, int64_t end) {
  with_dtype(type, [&]<typename S>() {
    typedef Compute<S> T;
    constexpr int N = kLanes<T>;
    const T* from = static_cast<const T*>(sums);
    S* to = static_cast<S*>(out);
    int64_t i = begin;
    for (; i + N <= end; i += N) {
      store_as<S, N>(to + i, load<T, N>(from + i));
    }
    if (i < end) store_part<S, N>(to + i, load_part<T, N>(from + i, end - i), end - i);
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
