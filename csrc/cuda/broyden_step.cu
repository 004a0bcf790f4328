// broyden_step on a GPU: push, decide, move. Oracle and meaning: deqcore/ops/broyden_step.py.
//
// Traffic of a step over k stored ones, in state-sized vectors: push reads x, f and the k steps;
// move reads them again and writes the new step, the iterate and, where it improved, the best.
// 2 k + 7 in all. Steps in bfloat16 (S) halve 2 k + 1 of these.
#include "cuda/broyden_step.h"

#include "cuda/pack.cuh"
#include "cuda/slot_ring.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

constexpr int64_t kLongChunk = 2048;  // elements of a long row that a block takes
constexpr int kManyOwn = 8;           // elements of a long row's tile that a thread takes
constexpr int kGroup = 4;             // steps whose inner products are reduced at once
constexpr int kTerms = 8;             // steps that are in flight at once without a ring

// The new step is g_weight * g and a sum over the first `count` stored ones.
struct Inverse {
  double g_weight;
  int64_t count;
};

// What a team keeps in shared memory.
template <typename X>
struct Scratch {
  int width;          // sums of a row: |g|^2, |f|^2, then s_j . g and s_j . s_newest
  double* warp_sums;  // [warps, width]
  double* sums;       // [width]
  double* gram;       // [capacity, capacity + 1] of the stored steps
  int stride;         // of gram
  double *inverse_size, *lift, *ratio;
  X* weights;  // of the stored steps in the new one
  RowState* state;
  BroydenPlan* plan;
  Inverse* inverse;
  int* flag;

  static __host__ __device__ int64_t doubles(int64_t capacity, int warps) {
    const int64_t count = (warps + 1) * (2 + 2 * capacity) + capacity * (capacity + 1) +
                          4 * capacity + kRowStateDoubles +
                          (sizeof(BroydenPlan) + sizeof(Inverse)) / 8 + 1;
    return (count + 1) / 2 * 2;  // whole packs: a ring follows
  }

  DEQCORE_DEVICE Scratch(double* at, int capacity, int warps) {
    const auto take = [&at](int count) {
      double* const taken = at;
      at += count;
      return taken;
    };
    width = 2 + 2 * capacity;
    stride = capacity + 1;
    warp_sums = take(warps * width);
    sums = take(width);
    gram = take(capacity * stride);
    inverse_size = take(capacity);
    lift = take(capacity);
    ratio = take(capacity);
    weights = reinterpret_cast<X*>(take(capacity));
    state = reinterpret_cast<RowState*>(take(kRowStateDoubles));
    plan = reinterpret_cast<BroydenPlan*>(take(sizeof(BroydenPlan) / 8));
    inverse = reinterpret_cast<Inverse*>(take(sizeof(Inverse) / 8));
    flag = reinterpret_cast<int*>(take(1));
  }
  DEQCORE_DEVICE double* sums_of(int warp) const { return warp_sums + warp * width; }
};
static_assert(sizeof(BroydenPlan) % 8 == 0);

// What the first launch leaves for the second, and its blocks for the last of their row.
struct Workspace {
  double* chunk_sums;  // [B, chunks, width]
  double* plans;       // [B, plan_doubles] a BroydenPlan and its weights
  int64_t chunk;       // elements of a row that a block of the first launch takes
  unsigned chunks;     // of a row

  Workspace(void* at, const BroydenArgs& args)
      : chunk_sums(static_cast<double*>(at)),
        plans(chunk_sums + args.batch * chunks_of(args.dim, kLongChunk) * (2 + 2 * args.capacity)),
        chunk(chunk_of(args.dim, kLongChunk)),
        chunks(static_cast<unsigned>(chunks_of(args.dim, kLongChunk))) {}

  static __host__ __device__ int64_t plan_doubles(int64_t capacity) {
    return sizeof(BroydenPlan) / 8 + capacity;
  }
};

DEQCORE_DEVICE BroydenArgs row_args(const BroydenArgs& args, RowState* state) {
  BroydenArgs out = args;
  out.rows = rows_of(state);
  return out;
}

// Stored steps to use. The caller keeps a free slot; without one the row restarts, in bounds.
DEQCORE_DEVICE int history_of(const BroydenArgs& args, RowState* state) {
  const int64_t history = broyden_history(row_args(args, state), 0);
  return history < args.capacity ? static_cast<int>(history) : 0;
}

template <typename X, typename F, typename S>
struct Row {
  const X* x;
  const F* f;
  S* s_ring;
  X* best;
  X* x_next;
  F* z_next;

  DEQCORE_DEVICE Row(const BroydenArgs& args, int64_t row) {
    const int64_t at = row * args.dim;
    x = static_cast<const X*>(args.x) + at;
    f = static_cast<const F*>(args.f) + at;
    s_ring = static_cast<S*>(args.s_ring) + at * args.capacity;
    best = static_cast<X*>(args.best) + at;
    x_next = static_cast<X*>(args.x_next) + at;
    z_next = args.z_next == nullptr ? nullptr : static_cast<F*>(args.z_next) + at;
  }
};

// broyden_inverse of ops/broyden_step.h by one warp: the lanes keep the products s_i . z, so that
// each update is one broadcast and one multiply-add instead of a sum over the earlier steps.
// Where the last update is singular, the new step is plain.
template <typename X>
DEQCORE_DEVICE Inverse inverse_by_warp(int lane, const BroydenArgs& args, int history, int64_t step,
                                       const Scratch<X>& scratch) {
  constexpr int kParts = kBroydenMaxMemory / kWarp;
  const double* const gram = scratch.gram;
  const int stride = scratch.stride;
  const auto beta_at = [&](int64_t at) {
    return damping_at(args.damping, args.damping_length, at);
  };
  double product[kParts], weight[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = lane + part * kWarp;
    product[part] = weight[part] = 0.0;
    if (j >= history) continue;
    product[part] = scratch.sums[2 + 2 * j];
    const double size = gram[j * stride + j];
    const double beta = beta_at(step - history + j);
    scratch.inverse_size[j] = size > 0 ? 1 / size : 0.0;
    scratch.lift[j] = beta - 1;
    scratch.ratio[j] = beta / beta_at(step - history + j + 1);
  }
  __syncwarp();
  double w = 0.0;  // s_j . z_j / |s_j|^2
  for (int j = 0; j < history; ++j) {
    w = __shfl_sync(kWholeWarp, j < kWarp ? product[0] : product[kParts - 1], j % kWarp) *
        scratch.inverse_size[j];
    if (j + 1 == history) break;
    const double own = scratch.lift[j] * w, next = scratch.ratio[j] * w;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int i = lane + part * kWarp;
      if (i == j) weight[part] += own;
      if (i == j + 1) weight[part] += next;
      if (i > j && i < history) {
        product[part] += own * gram[i * stride + j] + next * gram[i * stride + j + 1];
      }
    }
  }
  double left = 1.0;
  if (history > 0) left = 1 - beta_at(step - 1) * w;
  const double beta = beta_at(step);
  if (!(fabs(left) * kBroydenMaxGrowth >= 1)) return {beta, 0};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = lane + part * kWarp;
    if (j >= history) continue;
    const double last = j + 1 == history ? scratch.lift[j] * w : 0.0;
    scratch.weights[j] = static_cast<X>(beta * (weight[part] + last) / left);
  }
  return {beta / left, history};
}

// Fetches what the Gram matrix already has of the steps.
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

// Between the phases, from scratch.sums and what fetch_gram has brought: one warp works out the
// row's status and plan, another one the new step. All threads see them afterwards.
template <typename X>
DEQCORE_DEVICE void decide(const Team& team, const BroydenArgs& args, int history, int64_t step,
                           const Scratch<X>& scratch) {
  if (team.rank == 0) {
    *scratch.plan =
        broyden_begin(row_args(args, scratch.state), 0, scratch.sums[0], scratch.sums[1]);
  }
  if (team.warp() == team.warps() - 1) {
    const int lane = team.lane(), newest = history - 1;
    for (int j = lane; j < history; j += kWarp) {
      scratch.gram[newest * scratch.stride + j] = scratch.gram[j * scratch.stride + newest] =
          scratch.sums[3 + 2 * j];
    }
    __syncwarp();
    const Inverse inverse = inverse_by_warp(lane, args, history, step, scratch);
    if (lane == 0) *scratch.inverse = inverse;
  }
  team.sync();
  if (team.rank == 0 && scratch.plan->move == BroydenMove::step) {
    scratch.plan->count = static_cast<int32_t>(scratch.inverse->count);
    scratch.plan->g_weight = scratch.inverse->g_weight;
  }
  team.sync();
}

// By one warp, after decide: writes down the row and what its Gram matrix has gained.
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

// One of kThreads threads at work on a tile of a row: kOwn elements are its own.
template <typename X, typename F, typename S, int kThreads, int kOwn, bool kAligned>
struct Worker {
  static constexpr int kTeam = kThreads, kWidth = kPackWidth<X>, kPacks = kOwn / kWidth;
  static constexpr int kBlock = kThreads == kWarp ? kWarpsPerBlock * kWarp : kThreads;
  static constexpr int64_t kTile = int64_t{kThreads} * kOwn;
  using Kept = Scratch<X>;
  using Number = X;
  using Ring = SlotRing<S, kThreads, kWidth, kPacks, kAligned>;
  using Own = typename Ring::Own;
  using Packs = Pack<X, kWidth>[kPacks];

  const BroydenArgs& args;
  const Row<X, F, S> row;
  const Own own;
  Ring ring;
  int stages;
  int turn, pushed, turns;  // to fetch: the next, those of push, all

  // Doubles of a team's shared memory.
  static __host__ __device__ int64_t shared(int64_t capacity, int stages) {
    return Scratch<X>::doubles(capacity, kThreads / kWarp) + stages * Ring::kStageBytes / 8;
  }

  DEQCORE_DEVICE Worker(const Team& team, const BroydenArgs& args, int64_t index, int64_t begin,
                        int64_t end, double* shared, int stages)
      : args(args),
        row(args, index),
        own(team, begin, end),
        ring(shared + Scratch<X>::doubles(args.capacity, kThreads / kWarp), team, stages),
        stages(stages) {}

  DEQCORE_DEVICE void fetch_next() {
    if (turn < turns) {
      ring.fetch(row.s_ring + (turn < pushed ? turn : turn - pushed) * args.dim, own);
    } else {
      ring.skip();
    }
    ++turn;
  }

  // Begins to fetch the steps: the first `pushing` ones, then the first `moving` ones.
  DEQCORE_DEVICE void fetch(int pushing, int moving) {
    turn = 0;
    pushed = pushing;
    turns = pushing + moving;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) fetch_next();
  }

  DEQCORE_DEVICE void load_evaluation(Packs& x, Packs& f) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      x[p] = load<kAligned, kWidth>(row.x + own.at(p), own.left(p));
      f[p] = widen<X>(load<kAligned, kWidth>(row.f + own.at(p), own.left(p)));
    }
  }

  // Phase 1: adds each warp's part of the inner products to its sums. The newest step comes from
  // memory once.
  DEQCORE_DEVICE void push(const Team& team, int history, double* sums, bool begins) {
    Packs x, f;
    load_evaluation(x, f);
    Pack<double, kWidth> g[kPacks], newest[kPacks];
    const S* const newest_step = row.s_ring + (history - 1) * args.dim;
    double norms[2] = {0.0, 0.0};  // of g and f
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      if (history > 0) {
        newest[p] = in_doubles(load<kAligned, kWidth>(newest_step + own.at(p), own.left(p)));
      }
      g[p] = in_doubles(residual_of<F>(f[p], x[p]));
      add_dot(g[p], g[p], norms[0]);
      add_dot(in_doubles(f[p]), in_doubles(f[p]), norms[1]);
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

  DEQCORE_DEVICE static void add_both(const Pack<double, kWidth>& step,
                                      const Pack<double, kWidth>& g,
                                      const Pack<double, kWidth>& newest, double* dots) {
    add_dot(step, g, dots[0]);
    add_dot(step, newest, dots[1]);
  }

  // Phase 2, from x and f as load_evaluation has them. kRing: the steps come through the ring.
  template <bool kRing>
  DEQCORE_DEVICE void move(const BroydenPlan& plan, const X* weights, const Packs& x,
                           const Packs& f) {
    if (kRing && (plan.move != BroydenMove::step || plan.count == 0)) wait_for_copies();
    if (plan.move != BroydenMove::step) return copy(plan.move);
    Packs step = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      add_scaled(step[p], static_cast<X>(plan.g_weight), residual_of<F>(f[p], x[p]));
      if (plan.improved) store<kAligned, kWidth>(row.best + own.at(p), x[p], own.left(p));
    }
    if constexpr (kRing) {
      add_from_ring(plan.count, weights, step);
    } else {
      add_from_memory(plan.count, weights, step);
    }
    S* const new_step = row.s_ring + plan.count * args.dim;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      const auto stored = narrowed<S>(step[p]);
      store<kAligned, kWidth>(new_step + own.at(p), stored, own.left(p));
      auto value = x[p];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value.at[e] += to_compute(stored.at[e]);
      store_at(p, value);
    }
  }

  DEQCORE_DEVICE void add_from_ring(int count, const X* weights, Packs& step) {
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      ring.wait();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (own.has(p)) add_scaled(step[p], weights[j], widen<X>(ring.pack(p)));
      }
      ring.release();
      fetch_next();
    }
  }

  DEQCORE_DEVICE void add_from_memory(int count, const X* weights, Packs& step) const {
#pragma unroll 1
    for (int first = 0; first < count; first += kTerms) {
      Pack<S, kWidth> s[kTerms][kPacks];
      const S* from = row.s_ring + first * args.dim + own.first;
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (first + k >= count || !own.has(p)) continue;
          s[k][p] = load_once<kAligned, kWidth>(from + p * Own::kStride, own.left(p));
        }
        from += args.dim;
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (first + k >= count || !own.has(p)) continue;
          add_scaled(step[p], weights[first + k], widen<X>(s[k][p]));
        }
      }
    }
  }

  // Phase 2 where no step is taken.
  DEQCORE_DEVICE void copy(BroydenMove move) const {
    if (move == BroydenMove::copy_x && row.x_next == row.x && row.z_next == nullptr) return;
    const X* const from = move == BroydenMove::copy_best ? row.best : row.x;
#pragma unroll 1
    for (int p = 0; p < kPacks; ++p) {
      if (own.has(p)) store_at(p, load<kAligned, kWidth>(from + own.at(p), own.left(p)));
    }
  }

  DEQCORE_DEVICE void store_at(int p, const Pack<X, kWidth>& value) const {
    F* const z_next = row.z_next == nullptr ? nullptr : row.z_next + own.at(p);
    store_iterate<kAligned, kWidth>(row.x_next + own.at(p), z_next, value, own.left(p));
  }
};

// One launch: a team takes a row, its tile, from push to move.
template <typename W, int kBlocks>
__global__ void __launch_bounds__(W::kBlock, kBlocks)
    broyden_whole_row(const BroydenArgs args, const int stages) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int thread = static_cast<int>(threadIdx.x), member = thread / W::kTeam;
  const Team team{thread % W::kTeam, W::kTeam};
  const int64_t index = int64_t{blockIdx.x} * (W::kBlock / W::kTeam) + member;
  if (index >= args.batch) return;  // the whole team leaves
  double* const at = shared + member * W::shared(args.capacity, stages);
  const typename W::Kept scratch(at, static_cast<int>(args.capacity), team.warps());
  W worker(team, args, index, 0, args.dim, at, stages);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) return worker.copy(BroydenMove::copy_x);
  const int history = history_of(args, scratch.state);
  const int64_t step = scratch.state->counters[kSteps] + 1;
  fetch_gram(team, args, index, history, scratch);
  worker.fetch(history > 0 ? history - 1 : 0, history);
  worker.push(team, history, scratch.sums_of(team.warp()), true);
  typename W::Packs x, f;
  worker.load_evaluation(x, f);
  wait_for_groups_but(stages);
  add_warp_sums(team, scratch.warp_sums, scratch.width, 2 + 2 * history, scratch.sums);
  decide(team, args, history, step, scratch);
  if (team.warp() == 0) commit(team.lane(), args, index, history, scratch);
  worker.template move<true>(*scratch.plan, scratch.weights, x, f);
  wait_for_copies();
}

// By one warp: what the second launch is to do to a row.
template <typename X>
DEQCORE_DEVICE void hand_over(int lane, const BroydenPlan& plan, const X* weights, double* to) {
  if (lane == 0) *reinterpret_cast<BroydenPlan*>(to) = plan;
  X* const to_weights = reinterpret_cast<X*>(to + sizeof(BroydenPlan) / 8);
  for (int j = lane; j < plan.count; j += kWarp) to_weights[j] = weights[j];
}

// First of two launches: a block takes a chunk of a row, and the last one that is done with its own
// decides on the row.
template <typename W, int kBlocks>
__global__ void __launch_bounds__(W::kBlock, kBlocks)
    broyden_push_chunk(const BroydenArgs args, const Workspace workspace, const int stages) {
  let_next_launch_start();
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), W::kTeam};
  const int64_t index = blockIdx.x / workspace.chunks;
  const unsigned chunk = blockIdx.x % workspace.chunks;
  const typename W::Kept scratch(shared, static_cast<int>(args.capacity), team.warps());
  double* const plan_at = workspace.plans + index * Workspace::plan_doubles(args.capacity);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) {
    const BroydenPlan frozen{BroydenMove::copy_x, false, 0, 0.0};
    if (chunk == 0 && team.warp() == 0) hand_over(team.lane(), frozen, scratch.weights, plan_at);
    return;
  }
  const int history = history_of(args, scratch.state);
  const int64_t step = scratch.state->counters[kSteps] + 1;
  const int64_t first = chunk * workspace.chunk;
  const int64_t last = end_of(args.dim, first + workspace.chunk);
#pragma unroll 1
  for (int64_t begin = first; begin == first || begin < last; begin += W::kTile) {
    W worker(team, args, index, begin, last, shared, stages);
    worker.fetch(history > 0 ? history - 1 : 0, 0);
    worker.push(team, history, scratch.sums_of(team.warp()), begin == first);
  }
  const int width = 2 + 2 * history;
  add_warp_sums(team, scratch.warp_sums, scratch.width, width,
                workspace.chunk_sums + int64_t{blockIdx.x} * scratch.width);
  int32_t* const arrived = args.rows.counters + index * kCounters + kArrived;
  if (!is_last(team, arrived, workspace.chunks, scratch.flag)) return;
  fetch_gram(team, args, index, history, scratch);
  add_chunk_sums(team, workspace.chunk_sums + index * workspace.chunks * scratch.width,
                 workspace.chunks, scratch.width, width, scratch.sums);
  wait_for_copies();
  team.sync();
  decide(team, args, history, step, scratch);
  if (team.warp() != 0) return;
  commit(team.lane(), args, index, history, scratch);
  hand_over(team.lane(), *scratch.plan, scratch.weights, plan_at);
}

template <typename W>
__host__ __device__ int64_t tiles_of(int64_t dim) {
  return dim > 0 ? (dim + W::kTile - 1) / W::kTile : 1;
}

// Second launch: the next iterate and the new step. Rows come in reverse, so that what was read
// last is still in the cache.
template <typename W, int kBlocks>
__global__ void __launch_bounds__(W::kBlock, kBlocks)
    broyden_move_tile(const BroydenArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), W::kTeam};
  const unsigned tiles = static_cast<unsigned>(tiles_of<W>(args.dim));
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / tiles, begin = block % tiles * W::kTile;
  W worker(team, args, index, begin, args.dim, nullptr, 0);

  wait_for_launch_before();
  const int doubles = static_cast<int>(Workspace::plan_doubles(args.capacity));
  for (int i = team.rank; i < doubles; i += W::kTeam) {
    shared[i] = workspace.plans[index * doubles + i];
  }
  team.sync();
  const BroydenPlan plan = *reinterpret_cast<const BroydenPlan*>(shared);
  typename W::Packs x, f;
  if (plan.move == BroydenMove::step) worker.load_evaluation(x, f);
  const auto* weights = reinterpret_cast<const typename W::Number*>(shared + sizeof(plan) / 8);
  worker.template move<false>(plan, weights, x, f);
}

template <typename W, int kBlocks>
const char* launch_whole(const BroydenArgs& args, Stream stream) {
  constexpr int kTeams = W::kBlock / W::kTeam;
  if (args.dim > W::kTile) return "a row is too long for its path";
  const int stages = stages_of(2 * args.capacity, kTeams * W::Ring::kStageBytes,
                               kTeams * W::shared(args.capacity, 0) * 8);
  return launch(broyden_whole_row<W, kBlocks>, (args.batch + kTeams - 1) / kTeams, W::kBlock,
                kTeams * W::shared(args.capacity, stages) * 8, stream, args, stages);
}

template <typename W, int kBlocks>
const char* launch_push(const BroydenArgs& args, const Workspace& work, Stream stream) {
  const int stages =
      stages_of(args.capacity, W::Ring::kStageBytes, W::shared(args.capacity, 0) * 8);
  return launch(broyden_push_chunk<W, kBlocks>, args.batch * work.chunks, W::kBlock,
                W::shared(args.capacity, stages) * 8, stream, args, work, stages);
}

template <typename W, int kBlocks>
const char* launch_move(const BroydenArgs& args, const Workspace& work, Stream stream) {
  return launch_early(broyden_move_tile<W, kBlocks>, args.batch * tiles_of<W>(args.dim), W::kBlock,
                      Workspace::plan_doubles(args.capacity) * 8, stream, args, work);
}

template <typename X, typename F, typename S, bool kAligned>
const char* launch_step(const BroydenArgs& args, Path path, void* workspace, Stream stream) {
  if (path == Path::warp) {
    return args.dim <= kWarp * kFewOwn
               ? launch_whole<Worker<X, F, S, kWarp, kFewOwn, kAligned>, 2>(args, stream)
               : launch_whole<Worker<X, F, S, kWarp, kManyOwn, kAligned>, 2>(args, stream);
  }
  using Few = Worker<X, F, S, kBlockThreads, kFewOwn, kAligned>;
  using Many = Worker<X, F, S, kBlockThreads, kManyOwn, kAligned>;
  if (path == Path::block) {
    return args.dim <= kBlockThreads * kFewOwn ? launch_whole<Few, 2>(args, stream)
                                               : launch_whole<Many, 2>(args, stream);
  }
  const Workspace work(workspace, args);
  const char* const error = args.dim <= kShortChunksDim
                                ? launch_push<Few, 2>(args, work, stream)
                                : launch_push<Many, sizeof(X) == 8 ? 1 : 2>(args, work, stream);
  if (error != nullptr) return error;
  // 16 bytes of a step for each thread.
  using Mover = Worker<X, F, S, kBlockThreads, sizeof(S) == 2 ? 8 : 4, kAligned>;
  return launch_move < Mover, kAligned && sizeof(X) == 4 ? 3 : 2 > (args, work, stream);
}

template <typename X, typename F, typename S>
const char* launch_typed(const BroydenArgs& args, Path path, void* workspace, Stream stream) {
  constexpr int kWidth = kPackWidth<X>;
  const bool aligned = args.dim % kWidth == 0 &&
                       are_aligned(16, {args.x, args.best, args.x_next}) &&
                       are_aligned(kWidth * sizeof(S), {args.s_ring}) &&
                       are_aligned(kWidth * sizeof(F), {args.f, args.z_next});
  return aligned ? launch_step<X, F, S, true>(args, path, workspace, stream)
                 : launch_step<X, F, S, false>(args, path, workspace, stream);
}

}  // namespace

Path broyden_path(const BroydenArgs& args) {
  return choose_path(args.dim, kManyOwn, Scratch<double>::doubles(args.memory, 1));
}

int64_t broyden_workspace_bytes(const BroydenArgs& args, Path path) {
  if (path != Path::split) return 0;
  const int64_t sums = chunks_of(args.dim, kLongChunk) * (2 + 2 * args.capacity);
  return args.batch * (sums + Workspace::plan_doubles(args.capacity)) * 8;
}

const char* broyden_step(const BroydenArgs& args, Path path, void* workspace, void* stream) {
  if (args.batch == 0) return nullptr;
  const Stream on = static_cast<Stream>(stream);
  return with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    if constexpr (sizeof(X) == sizeof(float)) {
      if (args.narrow) return launch_typed<X, F, BFloat16>(args, path, workspace, on);
    }
    return launch_typed<X, F, X>(args, path, workspace, on);
  });
}

}  // namespace deqcore::cuda
