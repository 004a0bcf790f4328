// The masked matmuls for a weight of whole blocks (16, 32 or 64 square): small dense products, with
// rows of the weight (of the values' gradient: columns) side by side in registers.
//
// Sums are added in the same order as by the kernels for single entries: over the columns here,
// over the tokens there.
#include "cpu/masked_linear.h"
#include "cpu/masked_outer.h"
#include "cpu/masked_tile.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 12;  // tokens, or rows, at a time: times two vectors they fill the registers
#elif defined(__AVX2__)
constexpr int kGroup = 6;
#else
constexpr int kGroup = 4;
#endif

// The part of x [tokens, width] from `token` on, as the type of sums.
template <typename S>
const Compute<S>* read_panel(const void* source, int64_t width, int64_t token, int64_t tokens,
                             Scratch<Compute<S>>& panel) {
  const S* from = static_cast<const S*>(source) + token * width;
  if constexpr (sizeof(S) == sizeof(Compute<S>)) {
    return from;
  } else {
    constexpr int N = kLanes<Compute<S>>;
    const int64_t count = tokens * width;
    int64_t i = 0;
    for (; i + N <= count; i += N)
      store<Compute<S>, N>(panel.data() + i, load_as<Compute<S>, N>(from + i));
    for (; i < count; ++i) panel.data()[i] = to_compute(from[i]);
    return panel.data();
  }
}

// N * V outputs of G tokens: y [G, rows] from x [G, width], over all blocks of one row of blocks.
template <typename S, int N, int V, int G>
[[gnu::always_inline]] inline void multiply_group(const MaskedLinearArgs& args, const Compute<S>* x,
                                                  const Compute<S>* packed, const int32_t* columns,
                                                  int64_t blocks, int64_t row, S* y) {
  typedef Compute<S> T;
  const int64_t size = args.weight.block, width = args.weight.width;
  const T* bias = static_cast<const T*>(args.bias);
  Vector<T, N> sums[G][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const auto first = bias ? load<T, N>(bias + row + v * N) : Vector<T, N>{};
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) sums[g][v] = first;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const T* weight = packed + b * size * size;
    const T* inputs = x + columns[b * size];
    for (int64_t c = 0; c < size; ++c) {
      Vector<T, N> weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = load<T, N>(weight + c * size + v * N);
#pragma GCC unroll 16
      for (int g = 0; g < G; ++g) {
        const auto input = broadcast<T, N>(inputs[g * width + c]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[g][v] = multiply_add<T, N>(weights[v], input, sums[g][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_as<S, N>(y + g * args.weight.rows + row + v * N, sums[g][v]);
    }
  }
}

template <typename S, int V>
void multiply_panel(const MaskedLinearArgs& args, const Compute<S>* x, int64_t token,
                    int64_t tokens, int64_t first, int64_t last) {
  constexpr int N = kLanes<Compute<S>>;
  const int64_t size = args.weight.block, rows = args.weight.rows, width = args.weight.width;
  S* y = static_cast<S*>(args.y) + token * rows;
  for (int64_t row = first * size; row < last * size; row += size) {
    const int64_t start = args.weight.offsets[row];
    const int32_t* columns = args.weight.columns + start;
    const int64_t blocks = (args.weight.offsets[row + 1] - start) / size;
    for (int64_t part = 0; part < size; part += N * V) {
      // Entries of a row of blocks start where those of its first row do.
      const auto* packed = static_cast<const Compute<S>*>(args.values) + start + part;
      int64_t t = 0;
      for (; t + kGroup <= tokens; t += kGroup) {
        multiply_group<S, N, V, kGroup>(args, x + t * width, packed, columns, blocks, row + part,
                                        y + t * rows);
      }
      for (; t + 4 <= tokens; t += 4) {
        multiply_group<S, N, V, 4>(args, x + t * width, packed, columns, blocks, row + part,
                                   y + t * rows);
      }
      for (; t < tokens; ++t) {
        multiply_group<S, N, V, 1>(args, x + t * width, packed, columns, blocks, row + part,
                                   y + t * rows);
      }
    }
  }
}

// values [G rows, N * V columns] += left^T right over the tokens of a panel.
template <typename T, int N, int V, int G>
[[gnu::always_inline]] inline void add_outer(const T* left, int64_t left_width, const T* right,
                                             int64_t right_width, int64_t tokens, bool fresh,
                                             T* values, int64_t stride) {
  Vector<T, N> sums[G][V];
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[g][v] = fresh ? Vector<T, N>{} : load<T, N>(values + g * stride + v * N);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Vector<T, N> inputs[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) inputs[v] = load<T, N>(right + t * right_width + v * N);
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) {
      const auto gradient = broadcast<T, N>(left[t * left_width + g]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[g][v] = multiply_add<T, N>(gradient, inputs[v], sums[g][v]);
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<T, N>(values + g * stride + v * N, sums[g][v]);
  }
}

template <typename T, int V>
void outer_panel(const MaskedOuterArgs& args, const T* left, const T* right, int64_t tokens,
                 bool fresh, int64_t first, int64_t last) {
  constexpr int N = kLanes<T>;
  constexpr int G = kGroup >= 8 ? 8 : 4;  // rows at a time, a divisor of every block size
  const SparseRows& entries = args.entries;
  const int64_t size = entries.block;
  for (int64_t row = first * size; row < last * size; row += size) {
    const int64_t start = entries.offsets[row], kept = entries.offsets[row + 1] - start;
    for (int64_t entry = 0; entry < kept; entry += size) {
      const T* inputs = right + entries.columns[start + entry];
      for (int64_t r = 0; r < size; r += G) {
        for (int64_t c = 0; c < size; c += N * V) {
          T* values = static_cast<T*>(args.values) + start + r * kept + entry + c;
          add_outer<T, N, V, G>(left + row + r, entries.rows, inputs + c, entries.width, tokens,
                                fresh, values, kept);
        }
      }
    }
  }
}

// Calls run.operator()<V>() for the number of vectors side by side in a block.
template <typename T, typename Run>
void with_vectors(int64_t size, const Run& run) {
  if (size < 2 * kLanes<T>) {
    run.template operator()<1>();
  } else {
    run.template operator()<2>();
  }
}

}  // namespace

void masked_linear_blocks(const MaskedLinearArgs& args, Dtype type, int64_t begin, int64_t end) {
  with_dtype(type, [&]<typename S>() {
    typedef Compute<S> T;
    const int64_t tile = masked_linear_tile(type);
    const int64_t rows = args.weight.rows / args.weight.block;
    const int64_t chunk = (rows + args.row_chunks - 1) / args.row_chunks;
    Scratch<T> panel(sizeof(S) == sizeof(T) ? 0 : tile * args.weight.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / args.row_chunks * tile;
      const int64_t tokens = args.tokens - token < tile ? args.tokens - token : tile;
      const int64_t first = task % args.row_chunks * chunk;
      const int64_t last = first + chunk < rows ? first + chunk : rows;
      const T* x = read_panel<S>(args.x, args.weight.width, token, tokens, panel);
      with_vectors<T>(args.weight.block,
                      [&]<int V>() { multiply_panel<S, V>(args, x, token, tokens, first, last); });
    }
  });
}

void masked_outer_blocks(const MaskedOuterArgs& args, Dtype type, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = 128;  // tokens of left and right that stay in the second-level cache
  with_dtype(type, [&]<typename S>() {
    typedef Compute<S> T;
    const int64_t rows = args.entries.rows, width = args.entries.width;
    constexpr bool kConverts = sizeof(S) != sizeof(T);
    Scratch<T> lefts(kConverts ? kPanel * rows : 0), rights(kConverts ? kPanel * width : 0);
    for (int64_t token = 0; token == 0 || token < args.tokens; token += kPanel) {
      const int64_t tokens = args.tokens - token < kPanel ? args.tokens - token : kPanel;
      const T* left = read_panel<S>(args.left, rows, token, tokens, lefts);
      const T* right = read_panel<S>(args.right, width, token, tokens, rights);
      with_vectors<T>(args.entries.block, [&]<int V>() {
        outer_panel<T, V>(args, left, right, tokens, token == 0, begin, end);
      });
    }
  });
}

void masked_pack_blocks(const SparseRows& rows, const void* values, Dtype type, void* out,
                        int64_t begin, int64_t end) {
  with_dtype(type, [&]<typename S>() {
    const S* from = static_cast<const S*>(values);
    const int64_t size = rows.block;
    for (int64_t row = begin * size; row < end * size; row += size) {
      const int64_t start = rows.offsets[row], kept = rows.offsets[row + 1] - start;
      auto* packed = static_cast<Compute<S>*>(out) + start;
      for (int64_t r = 0; r < size; ++r) {
        for (int64_t i = 0; i < kept; ++i) {
          const int64_t entry = start + r * kept + i;
          const S value = from[rows.position ? rows.position[entry] : entry];
          packed[i * size + r] = to_compute(value);  // i = block * size + column
        }
      }
    }
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
