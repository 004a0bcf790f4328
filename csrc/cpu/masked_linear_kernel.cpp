// y = x W^T + bias for a weight with few entries: tokens lie side by side in registers, and each
// kept weight is broadcast to them.
//
// A tile of tokens is transposed, so that a column of it is contiguous. Blocks of columns that fit
// the first-level cache are taken in turn; within one, each row of the weight adds its entries to
// sums kept transposed too. Every sum is added in the order of the columns, so that a token's
// result does not depend on the others, on the tile or on the blocks.
#include "cpu/masked_linear.h"

#include "cpu/masked_tile.h"
#include "cpu/prefetch.h"

namespace deqcore::cpu::DEQCORE_ISA {
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
      sums[r][v] = multiply_add<T, N>(weight, load<T, N>(column + v * N), sums[r][v]);
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
    for (int r = 0; r < R; ++r) {
      asm("" : "+r"(entry[r]));  // or it keeps two pointers for each row instead of one index
      add(r, entry[r]++);
    }
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
void multiply_tile(const MaskedLinearArgs& args, const Part& part, Compute<S>* tile,
                   Compute<S>* sums) {
  typedef Compute<S> T;
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

// A single token needs no tile: its columns are contiguous as they are. Four rows are taken at a
// time, since a row's sum must wait for each multiply-add before the next.
template <typename S>
void multiply_token(const MaskedLinearArgs& args, const Part& part, Compute<S>* copy) {
  typedef Compute<S> T;
  const int64_t width = args.weight.width;
  const T* x = static_cast<const T*>(args.x) + part.token * width;
  if constexpr (sizeof(S) != sizeof(T)) {
    const S* stored = static_cast<const S*>(args.x) + part.token * width;
    for (int64_t i = 0; i < width; ++i) copy[i] = to_compute(stored[i]);
    x = copy;
  }
  const T* values = static_cast<const T*>(args.values);
  const T* bias = static_cast<const T*>(args.bias);
  const int32_t *columns = args.weight.columns, *offsets = args.weight.offsets;
  const auto add = [=](T sum, int64_t entry) __attribute__((always_inline)) {
    return multiply_add(values[entry], x[columns[entry]], sum);
  };
  const auto finish = [&](int64_t row, T sum, int64_t entry) {
    for (; entry < offsets[row + 1]; ++entry) sum = add(sum, entry);
    static_cast<S*>(args.y)[part.token * args.weight.rows + row] = from_compute<S>(sum);
  };
  const auto first = [&](int64_t row) { return bias ? bias[row] : T{0}; };
  const auto length = [&](int64_t row) { return offsets[row + 1] - offsets[row]; };
  int64_t row = part.first;
  for (; row + 4 <= part.last; row += 4) {
    T a = first(row), b = first(row + 1), c = first(row + 2), d = first(row + 3);
    int64_t i = offsets[row], j = offsets[row + 1], k = offsets[row + 2], l = offsets[row + 3];
    const int32_t low = length(row) < length(row + 1) ? length(row) : length(row + 1);
    const int32_t high = length(row + 2) < length(row + 3) ? length(row + 2) : length(row + 3);
    for (const int64_t stop = i + (low < high ? low : high); i < stop; ++i, ++j, ++k, ++l) {
      asm("" : "+r"(i), "+r"(j), "+r"(k), "+r"(l));  // or it keeps two pointers for each of them
      a = add(a, i);
      b = add(b, j);
      c = add(c, k);
      d = add(d, l);
    }
    finish(row, a, i);
    finish(row + 1, b, j);
    finish(row + 2, c, k);
    finish(row + 3, d, l);
  }
  for (; row < part.last; ++row) finish(row, first(row), offsets[row]);
}

// In the narrowest tile that holds the part's tokens.
template <typename S, int V>
void multiply(const MaskedLinearArgs& args, const Part& part, Compute<S>* tile, Compute<S>* sums) {
  constexpr int N = kLanes<Compute<S>>;
  if constexpr (V > 1) {
    if (part.tokens <= N * (V - 1)) return multiply<S, V - 1>(args, part, tile, sums);
  } else {
    if (part.tokens == 1) return multiply_token<S>(args, part, tile);
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

int64_t masked_linear_tile(Dtype type) {
  const int64_t size = type == Dtype::f64 ? sizeof(double) : sizeof(float);
  return kTileVectors * (kRegisterBytes / size);
}

void masked_linear(const MaskedLinearArgs& args, Dtype type, int64_t begin, int64_t end) {
  with_dtype(type, [&]<typename S>() {
    typedef Compute<S> T;
    constexpr int64_t kTile = kLanes<T> * kTileVectors;
    const int64_t rows = args.weight.rows, step = args.blocks.columns;
    const int64_t chunk = (rows + args.row_chunks - 1) / args.row_chunks;
    const int64_t rounded = (args.tokens + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t wide = args.tokens < kTile ? rounded : kTile;
    const int64_t width = args.weight.width;
    Scratch<T> tile(width < step ? width * wide : step * wide < width ? width : step * wide);
    Scratch<T> sums(chunk * wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / args.row_chunks * kTile;
      const int64_t first = task % args.row_chunks * chunk;
      const Part part{token, args.tokens - token < kTile ? args.tokens - token : kTile, first,
                      first + chunk < rows ? first + chunk : rows};
      if (part.first >= part.last) continue;
      multiply<S, kTileVectors>(args, part, tile.data(), sums.data());
    }
  });
}

void masked_values(const SparseRows& rows, const void* values, Dtype type, void* out, int64_t begin,
                   int64_t end) {
  with_dtype(type, [&]<typename S>() {
    const S* from = static_cast<const S*>(values);
    auto* to = static_cast<Compute<S>*>(out);
    if (rows.position == nullptr) {
      for (int64_t i = begin; i < end; ++i) to[i] = to_compute(from[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) to[i] = to_compute(from[rows.position[i]]);
    }
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
