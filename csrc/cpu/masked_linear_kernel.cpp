// y = x W^T + bias for a weight with few entries: tokens lie side by side in registers, and each
// kept weight is broadcast to them.
//
// A tile of tokens is transposed, so that a column of it is contiguous. Blocks of columns that fit
// the first-level cache are taken in turn; within one, each row of the weight adds its entries to
// sums kept transposed too. Every sum is added in the order of the columns, so that a token's
// result does not depend on the others, on the tile or on the blocks.
#include "cpu/masked_linear.h"

#include "cpu/masked_vectors.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace masked {
namespace {

// Vectors of tokens in the widest tile, and rows at a time: enough independent sums to hide the
// latency of a multiply-add, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
constexpr int kTileRows = 2;
#else
constexpr int kTileVectors = 6;
constexpr int kTileRows = 1;
#endif

// sums += the entries begin[r] to end[r] of R rows, each times its column of the tile.
template <typename T, int N, int V, int R>
[[gnu::always_inline]] inline void add_entries(const T* values, const int32_t* columns,
                                               const T* tile, const int32_t* begin,
                                               const int32_t* end, Vector<T, N> (&sums)[R][V]) {
  const auto add = [&](int r, int64_t entry) __attribute__((always_inline)) {
    const auto weight = broadcast<T, N>(values[entry]);
    const T* column = tile + static_cast<int64_t>(columns[entry]) * (N * V);
    asm("" : "+r"(column));  // or the compiler keeps V addresses instead of one and V offsets
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      sums[r][v] = fma<T, N>(weight, load<T, N>(column + v * N), sums[r][v]);
    }
  };
  int64_t entry[R];
  int32_t common = end[0] - begin[0];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    entry[r] = begin[r];
    common = end[r] - begin[r] < common ? end[r] - begin[r] : common;
  }
  const int64_t stop = entry[0] + common;
  while (entry[0] < stop) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) add(r, entry[r]++);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (; entry[r] < end[r]; ++entry[r]) add(r, entry[r]);
  }
}

// One block of columns for R rows from `row` on: sums [R, N * V].
template <typename T, int N, int V, int R>
[[gnu::always_inline]] inline void add_rows(const MaskedLinearArgs& args, int64_t block,
                                            int64_t row, const T* tile, T* sums) {
  const int32_t* starts = args.blocks.starts + block * args.weight.rows + row;
  const T* bias = static_cast<const T*>(args.bias);
  Vector<T, N> registers[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const auto first = broadcast<T, N>(block == 0 && bias ? bias[row + r] : T{0});
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      registers[r][v] = block == 0 ? first : load<T, N>(sums + (r * V + v) * N);
    }
  }
  add_entries<T, N, V, R>(static_cast<const T*>(args.values), args.weight.columns, tile, starts,
                          starts + args.weight.rows, registers);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store<T, N>(sums + (r * V + v) * N, registers[r][v]);
  }
}

// Where a task works: tokens and rows of the weight.
struct Part {
  int64_t token, tokens, first, last;
};

// One tile of at most N * V tokens. tile: columns of one block; sums: the part's rows.
template <typename S, int N, int V>
void multiply_tile(const MaskedLinearArgs& args, const Part& part, Sum<S>* tile, Sum<S>* sums) {
  typedef Sum<S> T;
  constexpr int W = N * V;
  constexpr int R = V >= 3 ? kTileRows : V == 2 ? 2 : 4;
  const int64_t width = args.weight.width, rows = args.weight.rows, step = args.blocks.columns;
  const int64_t blocks = width > 0 ? (width + step - 1) / step : 1;
  const int64_t calls = (part.last - part.first) / R;
  const int64_t ahead = args.tokens - part.token - W < W ? args.tokens - part.token - W : W;
  const S* x = static_cast<const S*>(args.x) + part.token * width;
  S* y = static_cast<S*>(args.y) + part.token * rows + part.first;

  // While one block is multiplied, fetch the next one of x (or the next tile's first), and make
  // room for a share of y.
  const int64_t share = (part.last - part.first) / blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t column = block * step;
    const int64_t columns = width - column < step ? width - column : step;
    const bool more = block + 1 < blocks;
    const int64_t next = more ? column + step : 0;
    const int64_t next_columns = width - next < step ? width - next : step;
    Ahead inputs(x + (more ? 0 : W * width) + next, more ? part.tokens : ahead,
                 next_columns * sizeof(S), width * sizeof(S), calls);
    Ahead outputs(y + block * share, part.tokens, share * sizeof(S), rows * sizeof(S), calls);

    transpose_in<S, N, W>(x + column, width, part.tokens, columns, tile);
    const T* shifted = tile - column * W;
    int64_t row = part.first;
    for (; row + R <= part.last; row += R) {
      inputs.fetch<false>();
      outputs.fetch<true>();
      add_rows<T, N, V, R>(args, block, row, shifted, sums + (row - part.first) * W);
    }
    for (; row < part.last; ++row) {
      add_rows<T, N, V, 1>(args, block, row, shifted, sums + (row - part.first) * W);
    }
  }
  transpose_out<S, N, W>(sums, part.last - part.first, y, rows, part.tokens);
}

// In the narrowest tile that holds the part's tokens.
template <typename S, int V>
void multiply(const MaskedLinearArgs& args, const Part& part, Sum<S>* tile, Sum<S>* sums) {
  constexpr int N = kLanes<Sum<S>>;
  if constexpr (V > 1) {
    if (part.tokens <= N * (V - 1)) return multiply<S, V - 1>(args, part, tile, sums);
  } else {
    if constexpr (N >= 16) {
      if (part.tokens <= N / 4) return multiply_tile<S, N / 4, 1>(args, part, tile, sums);
    }
    if constexpr (N >= 8) {
      if (part.tokens <= N / 2) return multiply_tile<S, N / 2, 1>(args, part, tile, sums);
    }
  }
  multiply_tile<S, N, V>(args, part, tile, sums);
}

}  // namespace
}  // namespace masked

int64_t masked_linear_tile(ValueType type) {
  const int64_t size = type == ValueType::f64 ? sizeof(double) : sizeof(float);
  return masked::kTileVectors * (masked::kVectorBytes / size);
}

void masked_linear(const MaskedLinearArgs& args, ValueType type, int64_t begin, int64_t end) {
  masked::with_value_type(type, [&]<typename S>() {
    typedef masked::Sum<S> T;
    constexpr int64_t kLanes = masked::kLanes<T>;
    constexpr int64_t kTile = kLanes * masked::kTileVectors;
    const int64_t rows = args.weight.rows, step = args.blocks.columns;
    const int64_t chunk = (rows + args.row_chunks - 1) / args.row_chunks;
    const int64_t wide = args.tokens < kTile ? (args.tokens + kLanes - 1) / kLanes * kLanes : kTile;
    masked::Scratch<T> tile((args.weight.width < step ? args.weight.width : step) * wide);
    masked::Scratch<T> sums(chunk * wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / args.row_chunks * kTile;
      const int64_t first = task % args.row_chunks * chunk;
      const masked::Part part{token, args.tokens - token < kTile ? args.tokens - token : kTile,
                              first, first + chunk < rows ? first + chunk : rows};
      if (part.first >= part.last) continue;
      masked::multiply<S, masked::kTileVectors>(args, part, tile.data(), sums.data());
    }
  });
}

void masked_values(const SparseRows& rows, const void* values, ValueType type, void* out,
                   int64_t begin, int64_t end) {
  masked::with_value_type(type, [&]<typename S>() {
    const S* from = static_cast<const S*>(values);
    auto* to = static_cast<masked::Sum<S>*>(out);
    if (rows.position == nullptr) {
      for (int64_t i = begin; i < end; ++i) to[i] = masked::to_sum(from[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) to[i] = masked::to_sum(from[rows.position[i]]);
    }
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
