// broyden_step on a GPU with clusters, in one launch, as anderson_cluster.cu. Oracle:
// deqcore/ops/broyden_step.py.
//
// Traffic of a step over k stored ones, in state-sized vectors: push reads x, f and the k steps;
// move reads them again and writes the new step, the iterate and, where it improved, the best.
// 2 k + 7 in all. Steps in bfloat16 (S) halve 2 k + 1 of these.
#include "cuda/broyden_row.cuh"
#include "cuda/broyden_step.h"
#include "cuda/row_parts.cuh"
#include "cuda/slot_ring.cuh"

namespace deqcore::cuda {
namespace {

template <typename X, typename F, typename S>
using Row = BroydenRow<X, F, S>;

constexpr int kGroup = 4;  // steps whose inner products are reduced at once

// Elements of a tile that a thread takes, in packs of 16 bytes of a stored step.
template <typename X>
constexpr int kOwn = sizeof(X) == 8 ? 4 : 8;
template <typename S>
constexpr int kStepWidth = 16 / sizeof(S);

// What a block keeps in shared memory, before its ring.
template <typename X>
struct Scratch {
  RowSums row_sums;  // |g|^2, |f|^2, then s_j . g and s_j . s_newest
  double* sums;      // their totals
  double* gram;      // [capacity, stride] of the stored steps
  int stride;
  double *inverse_size, *lift, *ratio;
  X* weights;  // of the stored steps in the new one
  RowState* state;
  BroydenPlan* plan;
  double* g_weight;
  int* count;

  static __host__ __device__ int64_t doubles(int64_t capacity) {
    const int64_t width = 2 + 2 * capacity;
    const int64_t count = RowSums::doubles(width) + capacity * (capacity + 1) + 4 * capacity +
                          kRowStateDoubles + sizeof(BroydenPlan) / 8 + 2;
    return (count + 1) / 2 * 2;  // whole packs: a ring follows
  }

  DEQCORE_DEVICE Scratch(double* at, int capacity)
      : row_sums(at, 2 + 2 * capacity), sums(row_sums.totals) {
    at += RowSums::doubles(2 + 2 * capacity);
    const auto take = [&at](int count) {
      double* const taken = at;
      at += count;
      return taken;
    };
    stride = capacity + 1;
    gram = take(capacity * stride);
    inverse_size = take(capacity);
    lift = take(capacity);
    ratio = take(capacity);
    weights = reinterpret_cast<X*>(take(capacity));
    state = reinterpret_cast<RowState*>(take(kRowStateDoubles));
    plan = reinterpret_cast<BroydenPlan*>(take(sizeof(BroydenPlan) / 8));
    g_weight = take(1);
    count = reinterpret_cast<int*>(take(1));
  }
};
static_assert(sizeof(BroydenPlan) % 8 == 0);

// Starts to fetch what the Gram matrix already has of the steps: no part of it that this step
// writes.
template <typename X>
DEQCORE_DEVICE void fetch_gram(const Team& team, const BroydenArgs& args, int64_t row, int history,
                               const Scratch<X>& scratch) {
  const int capacity = static_cast<int>(args.capacity), old = history - 1;
  const double* const gram = args.gram + row * capacity * capacity;
  for (int i = team.rank; i < old * old; i += team.threads) {
    copy_async<8>(scratch.gram + i / old * scratch.stride + i % old,
                  gram + i / old * capacity + i % old);
  }
  close_copies();
}

// From scratch.sums: one warp works out the row's status and plan, another one the new step. Every
// block of the cluster does, and all threads see them afterwards.
template <typename X>
DEQCORE_DEVICE void decide(const Team& team, const BroydenArgs& args, int history, int64_t step,
                           const Scratch<X>& scratch) {
  if (team.rank == 0) {
    *scratch.plan =
        broyden_begin(row_args(args, scratch.state), 0, scratch.sums[0], scratch.sums[1]);
  }
  if (team.warp() == kBlockWarps - 1) {
    const int lane = team.lane(), newest = history - 1;
    for (int j = lane; j < history; j += kWarp) {
      scratch.gram[newest * scratch.stride + j] = scratch.gram[j * scratch.stride + newest] =
          scratch.sums[3 + 2 * j];
    }
    __syncwarp();
    double g_weight;
    const bool regular = inverse_by_warp(lane, args, history, step, scratch, &g_weight);
    if (lane == 0) {
      *scratch.count = regular ? history : 0;
      *scratch.g_weight = regular ? g_weight : damping_at(args.damping, args.damping_length, step);
    }
  }
  team.sync();
  if (team.rank == 0 && scratch.plan->move == BroydenMove::step) {
    scratch.plan->count = *scratch.count;
    scratch.plan->g_weight = *scratch.g_weight;
  }
  team.sync();
}

// By one warp of the first block, after decide: writes down the row and what its Gram matrix has
// gained.
template <typename X>
DEQCORE_DEVICE void commit(int lane, const BroydenArgs& args, int64_t row, int history,
                           const Scratch<X>& scratch) {
  const bool steps = scratch.plan->move == BroydenMove::step;
  if (lane == 0 && steps) {
    broyden_finish(row_args(args, scratch.state), 0, scratch.plan->count);
  }
  __syncwarp();
  commit_row(lane, scratch.state, args.rows, row);
  if (!steps) return;
  const int capacity = static_cast<int>(args.capacity), newest = history - 1;
  double* const gram = args.gram + row * capacity * capacity;
  for (int j = lane; j < history; j += kWarp) {
    gram[newest * capacity + j] = gram[j * capacity + newest] = scratch.sums[3 + 2 * j];
  }
}

// One thread at work on its block's share of a row: tiles of parts, one after the other.
template <typename X, typename F, typename S, bool kAligned>
struct Worker {
  static constexpr int kWidth = kStepWidth<S>, kPacks = kOwn<X> / kWidth;
  using Ring = SlotRing<S, kBlockThreads, kWidth, kPacks, kAligned>;
  using Own = typename Ring::Own;
  using Packs = Pack<X, kWidth>[kPacks];

  const BroydenArgs& args;
  const int64_t index;
  const Team team;
  const Share<Own> share;
  Ring ring;
  int stages;
  // What is fetched next: step `step` of a tile, for push (where the newest comes by itself) and
  // then, backwards, for move.
  bool pushing = true;
  int tile = 0, step = 0;
  int history = 0;

  DEQCORE_DEVICE Worker(const BroydenArgs& args, int64_t index, const Team& team,
                        const Share<Own>& share, double* room, int stages)
      : args(args),
        index(index),
        team(team),
        share(share),
        ring(room, team.rank, stages),
        stages(stages) {}

  DEQCORE_DEVICE Row<X, F, S> row() const { return Row<X, F, S>(args, index); }

  DEQCORE_DEVICE void fetch_next() {
    if (pushing && step + 1 >= history) {
      step = 0;
      if (tile + 1 < share.tiles && history > 1) {
        ++tile;
      } else {
        pushing = false;
        tile = share.tiles - 1;
      }
    } else if (!pushing && step >= history) {
      step = 0;
      --tile;
    }
    if (tile < 0 || history == 0) return ring.skip();
    ring.fetch(row().s_ring + step * args.dim, share[tile]);
    ++step;
  }

  DEQCORE_DEVICE void fetch(int stored) {
    history = stored;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) fetch_next();
  }

  DEQCORE_DEVICE void load_evaluation(const Own& own, Packs& x, Packs& f) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      x[p] = load<kAligned, kWidth>(row().x + own.at(p), own.left(p));
      f[p] = widen<X>(load<kAligned, kWidth>(row().f + own.at(p), own.left(p)));
    }
  }

  DEQCORE_DEVICE static void add_both(const Pack<double, kWidth>& step,
                                      const Pack<double, kWidth>& g,
                                      const Pack<double, kWidth>& newest, double* dots) {
    add_dot(step, g, dots[0]);
    add_dot(step, newest, dots[1]);
  }

  // Phase 1 of a tile: adds each warp's part of the inner products to its sums.
  DEQCORE_DEVICE void push(const Own& own, double* sums, bool begins) {
    Packs x, f;
    load_evaluation(own, x, f);
    Pack<double, kWidth> g[kPacks], newest[kPacks];
    const S* const newest_step = row().s_ring + (history - 1) * args.dim;
    double norms[2] = {0.0, 0.0};  // of g and f
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      if (history > 0) {
        newest[p] = in_doubles(load<kAligned, kWidth>(newest_step + own.at(p), own.left(p)));
      }
      g[p] = in_doubles(residual_of<F>(f[p], x[p]));
      add_dot(g[p], g[p], norms[0]);
      add_dot(f[p], f[p], norms[1]);
    }
    keep_warp_sums(team.lane(), norms, 2, begins, sums);
#pragma unroll 1
    for (int first = 0; first < history; first += kGroup) {
      double dots[2 * kGroup];  // with g, with the newest
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        dots[2 * k] = dots[2 * k + 1] = 0.0;
        if (first + k + 1 == history) {
#pragma unroll
          for (int p = 0; p < kPacks; ++p) {
            if (own.has(p)) add_both(newest[p], g[p], newest[p], dots + 2 * k);
          }
        } else if (first + k < history) {
          ring.wait();
#pragma unroll
          for (int p = 0; p < kPacks; ++p) {
            if (own.has(p)) add_both(in_doubles(ring.pack(p)), g[p], newest[p], dots + 2 * k);
          }
          ring.release();
          fetch_next();
        }
      }
      keep_warp_sums(team.lane(), dots, 2 * (history - first), begins, sums + 2 + 2 * first);
    }
  }

  // Phase 2 of a tile, where a step is taken.
  DEQCORE_DEVICE void move(const Own& own, const BroydenPlan& plan, const X* weights) {
    Packs x, step = {};
    load_evaluation(own, x, step);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      const auto g = residual_of<F>(step[p], x[p]);
      step[p] = {};
      add_scaled(step[p], static_cast<X>(plan.g_weight), g);
      if (plan.improved) put<kAligned, kWidth>(row().best + own.at(p), x[p], own.left(p));
    }
#pragma unroll 1
    for (int j = 0; j < plan.count; ++j) {
      ring.wait();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (own.has(p)) add_scaled(step[p], weights[j], widen<X>(ring.pack(p)));
      }
      ring.release();
      fetch_next();
    }
    S* const new_step = row().s_ring + plan.count * args.dim;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      const auto stored = narrowed<S>(step[p]);
      put<kAligned, kWidth>(new_step + own.at(p), stored, own.left(p));
      auto value = x[p];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value.at[e] += to_compute(stored.at[e]);
      store_at(own, p, value);
    }
  }

  // Phase 2 of the whole share where none is.
  DEQCORE_DEVICE void copy(BroydenMove move) const {
    const Row<X, F, S> at = row();
    if (move == BroydenMove::copy_x && at.x_next == at.x && at.z_next == nullptr) return;
    const X* const from = move == BroydenMove::copy_best ? at.best : at.x;
#pragma unroll 1
    for (int i = 0; i < share.tiles; ++i) {
      const Own here = share[i];
#pragma unroll 1
      for (int p = 0; p < kPacks; ++p) {
        if (!here.has(p)) break;
        store_at(here, p, load<kAligned, kWidth>(from + here.at(p), here.left(p)));
      }
    }
  }

  DEQCORE_DEVICE void store_at(const Own& own, int p, const Pack<X, kWidth>& value) const {
    const Row<X, F, S> at = row();
    F* const z_next = at.z_next == nullptr ? nullptr : at.z_next + own.at(p);
    put_iterate<kAligned, kWidth>(at.x_next + own.at(p), z_next, value, own.left(p));
  }
};

// kMany: the cluster has more blocks than one.
template <typename X, typename F, typename S, bool kAligned, bool kMany>
__global__ void __launch_bounds__(kBlockThreads, 2)
    broyden_cluster(const BroydenArgs args, const RowParts parts, const int stages) {
  DEQCORE_SHARED_DOUBLES(shared);
  using W = Worker<X, F, S, kAligned>;
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int capacity = static_cast<int>(args.capacity);
  const int block = kMany ? rank_in_cluster() : 0;
  const int64_t index = blockIdx.x / static_cast<unsigned>(parts.blocks);
  const Scratch<X> scratch(shared, capacity);
  const Share<typename W::Own> share(parts, args.dim, team.rank, block);
  W worker(args, index, team, share, shared + Scratch<X>::doubles(capacity), stages);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) return worker.copy(BroydenMove::copy_x);
  const int history = history_of(args, scratch.state);
  const int64_t step = scratch.state->counters[kSteps] + 1;
  const int width = 2 + 2 * history;
  scratch.row_sums.template start<kMany>(team.rank, parts, width);
  fetch_gram(team, args, index, history, scratch);
  worker.fetch(history);
#pragma unroll 1
  for (int tile = 0; tile < share.tiles; ++tile) {
    double* const sums = scratch.row_sums.of_warp(tile, parts, team.warp());
    worker.push(share[tile], sums, tile % parts.tiles == 0);
  }
  // By now the Gram matrix has come: the first wait for a step is for what was asked for before.
  scratch.row_sums.template exchange<kMany>(team, parts, block, width);
  decide(team, args, history, step, scratch);
  if (block == 0 && team.warp() == 0) commit(team.lane(), args, index, history, scratch);
  const BroydenPlan plan = *scratch.plan;
  if (plan.move != BroydenMove::step || plan.count == 0) wait_for_copies();
  if (plan.move == BroydenMove::step) {
#pragma unroll 1
    for (int tile = share.tiles - 1; tile >= 0; --tile) {
      worker.move(share[tile], plan, scratch.weights);
    }
  } else {
    worker.copy(plan.move);
  }
  wait_for_copies();
}

template <typename X, typename F, typename S, bool kAligned>
const char* launch_cluster(const BroydenArgs& args, Stream stream) {
  using W = Worker<X, F, S, kAligned>;
  return launch_by_clusters<W>(broyden_cluster<X, F, S, kAligned, true>,
                               broyden_cluster<X, F, S, kAligned, false>, args,
                               Scratch<X>::doubles(args.capacity) * 8, 2 * args.capacity, stream);
}

template <typename X, typename F, typename S>
const char* launch_typed(const BroydenArgs& args, Stream stream) {
  constexpr int kWidth = kStepWidth<S>;
  const bool aligned =
      args.dim % kWidth == 0 && are_aligned(kWidth * sizeof(X), {args.x, args.best, args.x_next}) &&
      are_aligned(16, {args.s_ring}) && are_aligned(kWidth * sizeof(F), {args.f, args.z_next});
  return aligned ? launch_cluster<X, F, S, true>(args, stream)
                 : launch_cluster<X, F, S, false>(args, stream);
}

}  // namespace

const char* broyden_step_by_clusters(const BroydenArgs& args, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  return with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    if constexpr (sizeof(X) == sizeof(float)) {
      if (args.narrow) return launch_typed<X, F, BFloat16>(args, on);
    }
    return launch_typed<X, F, X>(args, on);
  });
}

}  // namespace deqcore::cuda
