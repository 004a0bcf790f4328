// broyden_step on a GPU: push, decide, move. Oracle and meaning: deqcore/ops/broyden_step.py.
//
// Traffic of a step over k stored ones, in state-sized vectors: push reads x, f and the k steps;
// move reads them again and writes the new step, the iterate and, where it improved, the best.
// 2 k + 7 in all; more than 8 steps take further passes over x, f and the newest step, which
// the cache still has. Steps in bfloat16 (S) halve 2 k + 1 of these.
#include "cuda/broyden_step.h"

#include "cuda/broyden_row.cuh"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

template <typename X, typename F, typename S>
using Row = BroydenRow<X, F, S>;

// Stored steps that are in flight at once, as many as registers hold.
template <bool kAligned>
constexpr int kSlotsOf = kAligned ? 8 : 4;

// Blocks of whole rows that a processor runs at once: as many as registers allow without a spill.
template <typename S>
constexpr int kRowBlocks = sizeof(S) == 4 ? 2 : 1;

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

  static __host__ __device__ int64_t doubles(int64_t capacity, int warps) {
    return (warps + 1) * (2 + 2 * capacity) + capacity * (capacity + 1) + 4 * capacity +
           kRowStateDoubles + sizeof(BroydenPlan) / 8;
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
  }
};
static_assert(sizeof(BroydenPlan) % 8 == 0);

// What the first launch of the split path leaves for the second.
struct Workspace {
  double* chunk_sums;  // [B, chunks, width]
  RowState* states;    // [B] as they were before the step

  Workspace(void* at, int64_t batch)
      : chunk_sums(reinterpret_cast<double*>(static_cast<RowState*>(at) + batch)),
        states(static_cast<RowState*>(at)) {}
};

// One pass over [begin, end): inner products of the steps from `first` on with g and with the
// newest step; the first pass adds up the norms as well.
template <typename X, typename F, typename S, bool kAligned, bool kFirst>
DEQCORE_DEVICE void push_pass(const Team& team, const BroydenArgs& args, const Row<X, F, S>& row,
                              int first, int history, int64_t begin, int64_t end,
                              const Scratch<X>& scratch) {
  constexpr int kWidth = kPackWidth<X>, kSlots = kSlotsOf<kAligned>;
  constexpr bool kNarrow = sizeof(S) < sizeof(X);  // then the newest step is held as X alone
  const int slots = history - first < kSlots ? history - first : kSlots;
  const int newest = history - 1 - first;  // among the slots of this pass, if it is there
  const S* const steps = row.s_ring + first * args.dim;
  const S* const newest_step = row.s_ring + (history - 1) * args.dim;
  double with_g[kSlots], with_newest[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) with_g[k] = with_newest[k] = 0.0;
  double g_squared = 0.0, f_squared = 0.0;
#pragma unroll 1
  for (int64_t i = begin + team.rank * kWidth; i < end; i += team.threads * kWidth) {
    const int64_t left = end - i;
    const auto x = load<kAligned, kWidth>(row.x + i, left, !kFirst);
    const auto f = widen<X>(load<kAligned, kWidth>(row.f + i, left, !kFirst));
    Pack<S, kWidth> s[kSlots];
    Pack<X, kWidth> s_newest;
    if (history > 0) {
      s_newest = widen<X>(load<kAligned, kWidth>(newest_step + i, left, !kFirst));
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (k == newest) {
        if constexpr (!kNarrow) s[k] = s_newest;
      } else if (k < slots) {
        s[k] = load_once<kAligned, kWidth>(steps + k * args.dim + i, left);
      }
    }
    const auto g = residual_of<F>(f, x);
    if constexpr (kFirst) {
      add_dot(g, g, g_squared);
      add_dot(f, f, f_squared);
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (k < slots) {
        const auto step = kNarrow && k == newest ? s_newest : widen<X>(s[k]);
        add_dot(step, g, with_g[k]);
        add_dot(step, s_newest, with_newest[k]);
      }
    }
  }
  double* const sums = scratch.warp_sums;
  if constexpr (kFirst) {
    store_warp_sum(team, g_squared, sums, scratch.width, 0);
    store_warp_sum(team, f_squared, sums, scratch.width, 1);
  }
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k < slots) {
      store_warp_sum(team, with_g[k], sums, scratch.width, 2 + 2 * (first + k));
      store_warp_sum(team, with_newest[k], sums, scratch.width, 3 + 2 * (first + k));
    }
  }
}

// Phase 1 on [begin, end); leaves each warp's part of the sums in scratch.
template <typename X, typename F, typename S, bool kAligned>
DEQCORE_DEVICE void push(const Team& team, const BroydenArgs& args, const Row<X, F, S>& row,
                         int history, int64_t begin, int64_t end, const Scratch<X>& scratch) {
  push_pass<X, F, S, kAligned, true>(team, args, row, 0, history, begin, end, scratch);
  constexpr int kSlots = kSlotsOf<kAligned>;
#pragma unroll 1
  for (int first = kSlots; first < history; first += kSlots) {
    push_pass<X, F, S, kAligned, false>(team, args, row, first, history, begin, end, scratch);
  }
}

// Between the phases, by one warp: the row's status, its plan and the weights of the new step, from
// scratch.sums. Only the team that `commits` changes the row and its Gram matrix.
template <typename X>
DEQCORE_DEVICE void decide(int lane, const BroydenArgs& args, int64_t row, bool commits,
                           const Scratch<X>& scratch) {
  RowState* const state = scratch.state;
  const BroydenArgs one = row_args(args, state);
  const int history = history_of(args, state);
  const int64_t step = state->counters[kSteps] + 1;
  double* const gram = args.gram + row * args.capacity * args.capacity;
  for (int at = lane; at < history * history; at += kWarp) {
    const int i = at / history, j = at % history;
    const bool fresh = i + 1 == history || j + 1 == history;
    const int other = i + 1 == history ? j : i;
    scratch.gram[i * scratch.stride + j] =
        fresh ? scratch.sums[3 + 2 * other] : gram[i * args.capacity + j];
  }
  __syncwarp();
  if (lane == 0) *scratch.plan = broyden_begin(one, 0, scratch.sums[0], scratch.sums[1]);
  __syncwarp();
  const bool takes_step = scratch.plan->move == BroydenMove::step;
  if (takes_step) {
    double g_weight;
    const bool regular = inverse_by_warp(lane, args, history, step, scratch, &g_weight);
    __syncwarp();
    if (lane == 0) {
      const int count = regular ? history : 0;
      broyden_finish(one, 0, count);
      scratch.plan->count = count;
      scratch.plan->g_weight =
          regular ? g_weight : damping_at(args.damping, args.damping_length, step);
    }
    __syncwarp();
  }
  if (!commits) return;
  commit_row(lane, state, args.rows, row);
  if (!takes_step) return;
  for (int j = lane; j < history; j += kWarp) {
    gram[(history - 1) * args.capacity + j] = gram[j * args.capacity + history - 1] =
        scratch.sums[3 + 2 * j];
  }
}

// Phase 2 on [begin, end): the next iterate, as scratch.plan says.
template <typename X, typename F, typename S, bool kAligned>
DEQCORE_DEVICE void move(const Team& team, const BroydenArgs& args, const Row<X, F, S>& row,
                         int64_t begin, int64_t end, const Scratch<X>& scratch) {
  constexpr int kWidth = kPackWidth<X>, kSlots = kSlotsOf<kAligned>;
  const BroydenPlan plan = *scratch.plan;
  const bool steps = plan.move == BroydenMove::step;
  if (plan.move == BroydenMove::copy_x && row.x_next == row.x && row.z_next == nullptr) return;
  const X g_weight = static_cast<X>(plan.g_weight);
  S* const new_step = row.s_ring + plan.count * args.dim;
#pragma unroll 1
  for (int64_t i = begin + team.rank * kWidth; i < end; i += team.threads * kWidth) {
    const int64_t left = end - i;
    Pack<X, kWidth> value;
    if (plan.move == BroydenMove::copy_best) {
      value = load<kAligned, kWidth>(row.best + i, left);
    } else {
      value = load<kAligned, kWidth>(row.x + i, left);
    }
    if (steps) {
      const auto f = widen<X>(load<kAligned, kWidth>(row.f + i, left));
      if (plan.improved) store<kAligned, kWidth>(row.best + i, value, left);
      const auto g = residual_of<F>(f, value);
      Pack<X, kWidth> step{};
      add_scaled(step, g_weight, g);
#pragma unroll 1
      for (int first = 0; first < plan.count; first += kSlots) {
        const int slots = plan.count - first;
        const S* const from = row.s_ring + first * args.dim + i;
        Pack<S, kWidth> s[kSlots];
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
          if (k < slots) s[k] = load_once<kAligned, kWidth>(from + k * args.dim, left);
        }
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
          if (k < slots) add_scaled(step, scratch.weights[first + k], widen<X>(s[k]));
        }
      }
      const auto stored = narrowed<S>(step);
      store<kAligned, kWidth>(new_step + i, stored, left);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) value.at[e] += to_compute(stored.at[e]);
    }
    store_iterate<kAligned, kWidth>(row.x_next + i,
                                    row.z_next == nullptr ? nullptr : row.z_next + i, value, left);
  }
}

// One launch: a team takes a row from push to move. Rows are short here, so that further passes
// over a row find it in the cache.
template <typename X, typename F, typename S, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, kRowBlocks<S>)
    broyden_whole_row(const BroydenArgs args, const int team_threads) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int thread = static_cast<int>(threadIdx.x), member = thread / team_threads;
  const Team team{thread % team_threads, team_threads};
  const int64_t index =
      int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / team_threads) + member;
  if (index >= args.batch) return;  // the whole team leaves
  const int capacity = static_cast<int>(args.capacity);
  const Scratch<X> scratch(shared + member * Scratch<X>::doubles(capacity, team.warps()), capacity,
                           team.warps());
  const Row<X, F, S> row(args, index);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (scratch.state->active) {
    const int history = history_of(args, scratch.state);
    push<X, F, S, kAligned>(team, args, row, history, 0, args.dim, scratch);
    add_warp_sums(team, scratch.warp_sums, scratch.width, 2 + 2 * history, scratch.sums);
    if (team.warp() == 0) decide(team.lane(), args, index, /*commits=*/true, scratch);
  } else if (team.rank == 0) {
    *scratch.plan = {BroydenMove::copy_x, false, 0, 0.0};
  }
  team.sync();
  move<X, F, S, kAligned>(team, args, row, 0, args.dim, scratch);
}

// First of two launches: a block takes a chunk of a row.
template <typename X, typename F, typename S, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, 2)
    broyden_push_chunk(const BroydenArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int64_t chunks = chunks_of(args.dim);
  const int64_t index = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const Scratch<X> scratch(shared, static_cast<int>(args.capacity), team.warps());

  if (team.warp() == 0) {
    read_row(team.lane(), args.rows, index, scratch.state);
    __syncwarp();
    if (chunk == 0) copy_row(team.lane(), scratch.state, workspace.states + index);
  }
  team.sync();
  if (!scratch.state->active) return;
  const int history = history_of(args, scratch.state);
  const int64_t begin = chunk * chunk_of(args.dim);
  const int64_t end = end_of_chunk(args.dim, begin);
  push<X, F, S, kAligned>(team, args, Row<X, F, S>(args, index), history, begin, end, scratch);
  add_warp_sums(team, scratch.warp_sums, scratch.width, 2 + 2 * history,
                workspace.chunk_sums + (index * chunks + chunk) * scratch.width);
}

// Second launch: every block of a row works out the same plan; the first one writes it down. Rows
// come in reverse, so that what was read last is still in the cache.
template <typename X, typename F, typename S, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, 2)
    broyden_move_chunk(const BroydenArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int64_t chunks = chunks_of(args.dim);
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / chunks, chunk = block % chunks;
  const Scratch<X> scratch(shared, static_cast<int>(args.capacity), team.warps());

  if (team.warp() == 0) copy_row(team.lane(), workspace.states + index, scratch.state);
  team.sync();
  if (scratch.state->active) {
    const int width = 2 + 2 * history_of(args, scratch.state);
    add_chunk_sums(team, workspace.chunk_sums + index * chunks * scratch.width, chunks,
                   scratch.width, width, scratch.sums);
    if (team.warp() == 0) decide(team.lane(), args, index, /*commits=*/chunk == 0, scratch);
  } else if (team.rank == 0) {
    *scratch.plan = {BroydenMove::copy_x, false, 0, 0.0};
  }
  team.sync();
  const int64_t begin = chunk * chunk_of(args.dim);
  const int64_t end = end_of_chunk(args.dim, begin);
  move<X, F, S, kAligned>(team, args, Row<X, F, S>(args, index), begin, end, scratch);
}

template <typename X, typename F, typename S, bool kAligned>
const char* launch_step(const BroydenArgs& args, Path path, void* workspace, Stream stream) {
  const int64_t capacity = args.capacity;
  if (path == Path::warp) {
    const int64_t blocks = (args.batch + kWarpsPerBlock - 1) / kWarpsPerBlock;
    const int64_t shared = kWarpsPerBlock * Scratch<X>::doubles(capacity, 1) * 8;
    return launch(broyden_whole_row<X, F, S, kAligned>, blocks, kWarpsPerBlock * kWarp, shared,
                  stream, args, kWarp);
  }
  const int64_t shared = Scratch<X>::doubles(capacity, kBlockThreads / kWarp) * 8;
  if (path == Path::block) {
    return launch(broyden_whole_row<X, F, S, kAligned>, args.batch, kBlockThreads, shared, stream,
                  args, kBlockThreads);
  }
  const Workspace work(workspace, args.batch);
  const int64_t blocks = args.batch * chunks_of(args.dim);
  const char* const error = launch(broyden_push_chunk<X, F, S, kAligned>, blocks, kBlockThreads,
                                   shared, stream, args, work);
  if (error != nullptr) return error;
  return launch(broyden_move_chunk<X, F, S, kAligned>, blocks, kBlockThreads, shared, stream, args,
                work);
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
  if (args.dim > kWarpPathDim && takes_hopper_paths()) return Path::cluster;
  return choose_path(args.dim, Scratch<double>::doubles(args.memory, 1));
}

int64_t broyden_workspace_bytes(const BroydenArgs& args, Path path) {
  if (path != Path::split) return 0;
  const int64_t sums = chunks_of(args.dim) * (2 + 2 * args.capacity) * 8;
  return args.batch * (static_cast<int64_t>(sizeof(RowState)) + sums);
}

const char* broyden_step(const BroydenArgs& args, Path path, void* workspace, void* stream) {
  if (args.batch == 0) return nullptr;
  if (path == Path::cluster) return broyden_step_by_clusters(args, stream);
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
