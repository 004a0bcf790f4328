// anderson_step on a GPU: push, decide, move. Oracle and meaning: deqcore/ops/anderson_step.py.
//
// Traffic of a step, in state-sized vectors: push reads x, f and the other m - 1 residuals and
// writes a slot of each ring; move reads m slots of H and writes the iterate. 2 m + 4 in all.
#include "cuda/anderson_step.h"

#include "cuda/anderson_row.cuh"
#include "cuda/anderson_weights.cuh"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

template <typename X, typename F>
using Row = AndersonRow<X, F>;

constexpr int kTerms = 8;  // slots of H that are in flight at once
// Residuals that are: the default memory of 5 has 4 others.
constexpr int kFewAges = 4;
template <typename X>
constexpr int kManyAges = sizeof(X) == 8 ? 6 : 8;  // as many as registers hold

// Blocks that a processor runs at once: as many as registers allow without a spill.
template <typename X, typename F, bool kAligned, int kAges>
constexpr int kPushBlocks = kAligned && kAges == kFewAges && sizeof(X) + sizeof(F) == 8 ? 3 : 2;
template <typename X>
constexpr int kMoveBlocks = sizeof(X) == 4 ? 3 : 2;

// What a team keeps in shared memory.
template <typename X>
struct Scratch {
  double* warp_sums;  // [warps, memory + 1]
  double* sums;       // [memory + 1] |f|^2, then g . g_i by age
  ByAge by_age;       // [memory, memory + 1]
  double *gamma, *alpha, *unit, *inverse;
  X* weights;        // alpha as the mix uses it
  int64_t* offsets;  // of the slots by age, in the ring
  RowState* state;
  AndersonPlan* plan;

  static __host__ __device__ int64_t doubles(int64_t memory, int warps) {
    return (warps + 1) * (memory + 1) + memory * (memory + 1) + 6 * memory + kRowStateDoubles +
           sizeof(AndersonPlan) / 8;
  }

  DEQCORE_DEVICE Scratch(double* at, int memory, int warps) {
    const auto take = [&at](int count) {
      double* const taken = at;
      at += count;
      return taken;
    };
    warp_sums = take(warps * (memory + 1));
    sums = take(memory + 1);
    by_age = {take(memory * (memory + 1)), memory + 1};
    gamma = take(memory);
    alpha = take(memory);
    unit = take(memory);
    inverse = take(memory);
    weights = reinterpret_cast<X*>(take(memory));
    offsets = reinterpret_cast<int64_t*>(take(memory));
    state = reinterpret_cast<RowState*>(take(kRowStateDoubles));
    plan = reinterpret_cast<AndersonPlan*>(take(sizeof(AndersonPlan) / 8));
  }
};
static_assert(sizeof(AndersonPlan) % 8 == 0);

// What the first launch of the split path leaves for the second.
struct Workspace {
  double* chunk_sums;  // [B, chunks, memory + 1]
  RowState* states;    // [B] as they were before the step

  Workspace(void* at, int64_t batch)
      : chunk_sums(reinterpret_cast<double*>(static_cast<RowState*>(at) + batch)),
        states(static_cast<RowState*>(at)) {}
};
static_assert(sizeof(RowState) % 16 == 0);

// One pass over [begin, end): inner products with the residuals of kAges ages from first_age. The
// first pass also stores g and h; later ones find g in the cache.
template <typename X, typename F, bool kAligned, int kAges, bool kFirst>
DEQCORE_DEVICE void push_pass(const Team& team, const AndersonArgs& args, const Row<X, F>& row,
                              const PushPlan<X>& plan, int first_age, int64_t begin, int64_t end,
                              const Scratch<X>& scratch) {
  constexpr int kWidth = kPackWidth<X>;
  const int memory = static_cast<int>(args.memory), stride = memory + 1;
  const int ages = plan.history - first_age < kAges ? plan.history - first_age : kAges;
  const int64_t slot_at = plan.slot * args.dim;
  const X* others[kAges];
  double dots[kAges];
#pragma unroll
  for (int k = 0; k < kAges; ++k) {
    const int slot = (plan.slot + memory - first_age - k) % memory;
    others[k] = row.g_ring + (k < ages ? slot : 0) * args.dim;
    dots[k] = 0.0;
  }
  double g_squared = 0.0, f_squared = 0.0;
#pragma unroll 1
  for (int64_t i = begin + team.rank * kWidth; i < end; i += team.threads * kWidth) {
    const int64_t left = end - i;
    Pack<X, kWidth> other[kAges], g;
    if constexpr (kFirst) {
      const auto x = load<kAligned, kWidth>(row.x + i, left);
      const auto f = widen<X>(load<kAligned, kWidth>(row.f + i, left));
#pragma unroll
      for (int k = 0; k < kAges; ++k) {
        if (k < ages) other[k] = load_once<kAligned, kWidth>(others[k] + i, left);
      }
      g = residual_of<F>(f, x);
      store_slot<kAligned>(row, plan, i, left, slot_at + i, x, g);
      add_dot(f, f, f_squared);
      add_dot(g, g, g_squared);
    } else {
      g = load<kAligned, kWidth>(row.g_ring + slot_at + i, left, /*again=*/true);
#pragma unroll
      for (int k = 0; k < kAges; ++k) {
        if (k < ages) other[k] = load_once<kAligned, kWidth>(others[k] + i, left);
      }
    }
#pragma unroll
    for (int k = 0; k < kAges; ++k) {
      if (k < ages) add_dot(g, other[k], dots[k]);
    }
  }
  if constexpr (kFirst) {
    store_warp_sum(team, f_squared, scratch.warp_sums, stride, 0);
    store_warp_sum(team, g_squared, scratch.warp_sums, stride, 1);
  }
#pragma unroll
  for (int k = 0; k < kAges; ++k) {
    if (k < ages) store_warp_sum(team, dots[k], scratch.warp_sums, stride, 1 + first_age + k);
  }
}

// Phase 1 on [begin, end); leaves each warp's part of the sums in scratch.
template <typename X, typename F, bool kAligned, int kAges>
DEQCORE_DEVICE void push(const Team& team, const AndersonArgs& args, const Row<X, F>& row,
                         const PushPlan<X>& plan, int64_t begin, int64_t end,
                         const Scratch<X>& scratch) {
  push_pass<X, F, kAligned, kAges, true>(team, args, row, plan, 1, begin, end, scratch);
#pragma unroll 1
  for (int age = 1 + kAges; age < plan.history; age += kAges) {
    push_pass<X, F, kAligned, kAges, false>(team, args, row, plan, age, begin, end, scratch);
  }
}

// Between the phases, by one warp: the row's status, its plan and its mixing weights, from
// scratch.sums. Only the team that `commits` changes the row and its Gram matrix.
template <typename X>
DEQCORE_DEVICE void decide(int lane, const AndersonArgs& args, int64_t row, bool commits,
                           const Scratch<X>& scratch) {
  RowState* const state = scratch.state;
  const AndersonArgs one = row_args(args, state);
  const int memory = static_cast<int>(args.memory);
  const int history = static_cast<int>(anderson_history(one, 0));
  const int slot = state->counters[kSteps] % memory;
  double* const gram = args.gram + row * memory * memory;
  const auto slot_of = [=](int age) { return (slot + memory - age) % memory; };
  for (int i = lane; i < history * history; i += kWarp) {
    const int a = i / history, b = i % history;
    const bool fresh = a == 0 || b == 0;
    scratch.by_age(a, b) = fresh ? scratch.sums[1 + a + b] : gram[slot_of(a) * memory + slot_of(b)];
  }
  __syncwarp();
  if (lane == 0) {
    *scratch.plan = anderson_plan(one, 0, history, scratch.sums[1], scratch.sums[0]);
  }
  __syncwarp();
  if (scratch.plan->move == AndersonMove::mix) {
    weights_by_warp(lane, scratch.by_age, history, args.options, scratch.gamma, scratch.alpha,
                    scratch.unit, scratch.inverse);
    int mixed = 0;
    for (int first = 0; first < history; first += kWarp) {
      const int age = first + lane;
      const bool used = age < history && scratch.alpha[age] != 0;
      mixed += __popc(__ballot_sync(kWholeWarp, used));
      if (age < history) {
        scratch.weights[age] = static_cast<X>(scratch.alpha[age]);
        scratch.offsets[age] = slot_of(age) * args.dim;
      }
    }
    if (lane == 0) state->counters[kMixed] = mixed;
    __syncwarp();
  }
  if (!commits) return;
  commit_row(lane, state, args.rows, row);
  for (int age = lane; age < history; age += kWarp) {
    gram[slot * memory + slot_of(age)] = gram[slot_of(age) * memory + slot] = scratch.sums[1 + age];
  }
}

// sum_i weights_i h_i of one pack. The first kTerms slots come in registers, with bit k of `used`
// for slot k; an unused slot may hold NaN and is never read.
template <bool kAligned, typename X, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> mix_pack(const X* const (&sources)[kTerms],
                                        const X (&weights)[kTerms], unsigned used, const X* h_ring,
                                        const Scratch<X>& scratch, int history, int64_t at,
                                        int64_t left) {
  Pack<X, kWidth> value{}, h[kTerms];
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (used >> k & 1) h[k] = load_once<kAligned, kWidth>(sources[k] + at, left);
  }
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (used >> k & 1) add_scaled(value, weights[k], h[k]);
  }
  for (int first = kTerms; first < history; first += kTerms) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const int age = first + k;
      if (age < history && scratch.weights[age] != 0) {
        h[k] = load_once<kAligned, kWidth>(h_ring + scratch.offsets[age] + at, left);
      }
    }
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const int age = first + k;
      if (age < history && scratch.weights[age] != 0) {
        add_scaled(value, scratch.weights[age], h[k]);
      }
    }
  }
  return value;
}

// Phase 2 on [begin, end): the next iterate, as scratch.plan says.
template <typename X, typename F, bool kAligned>
DEQCORE_DEVICE void move(const Team& team, const AndersonArgs& args, const Row<X, F>& row,
                         int64_t begin, int64_t end, const Scratch<X>& scratch) {
  constexpr int kWidth = kPackWidth<X>;
  const AndersonPlan plan = *scratch.plan;
  if (plan.move == AndersonMove::copy_x && row.x_next == row.x && row.z_next == nullptr) return;
  const X* const g_slot = row.g_ring + plan.slot * args.dim;
  const X* const h_slot = row.h_ring + plan.slot * args.dim;
  const X damping = static_cast<X>(plan.damping);
  const int history = plan.move == AndersonMove::mix ? scratch.state->counters[kHistory] : 0;
  const X* sources[kTerms];
  X weights[kTerms];
  unsigned used = 0;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    weights[k] = k < history ? scratch.weights[k] : X{0};
    sources[k] = k < history ? row.h_ring + scratch.offsets[k] : row.h_ring;
    if (weights[k] != 0) used |= 1u << k;
  }
#pragma unroll 1
  for (int64_t i = begin + team.rank * kWidth; i < end; i += team.threads * kWidth) {
    const int64_t left = end - i;
    Pack<X, kWidth> value;
    switch (plan.move) {
      case AndersonMove::mix:
        value = mix_pack<kAligned, X, kWidth>(sources, weights, used, row.h_ring, scratch, history,
                                              i, left);
        break;
      case AndersonMove::copy_x:
        value = load<kAligned, kWidth>(row.x + i, left);
        break;
      case AndersonMove::best_kept:
        value = load<kAligned, kWidth>(row.best + i, left);
        break;
      case AndersonMove::plain_in_ring:
        value = load<kAligned, kWidth>(h_slot + i, left);
        break;
      case AndersonMove::best_in_ring:
        value = rebuilt(load<kAligned, kWidth>(h_slot + i, left), damping,
                        load<kAligned, kWidth>(g_slot + i, left));
        break;
    }
    store_iterate<kAligned, kWidth>(row.x_next + i,
                                    row.z_next == nullptr ? nullptr : row.z_next + i, value, left);
  }
}

// One launch: a team takes a row from push to move. Rows are short here, so that further passes
// over a residual find it in the cache.
template <typename X, typename F, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, 2)
    anderson_whole_row(const AndersonArgs args, const int team_threads) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int thread = static_cast<int>(threadIdx.x), member = thread / team_threads;
  const Team team{thread % team_threads, team_threads};
  const int64_t index =
      int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / team_threads) + member;
  if (index >= args.batch) return;  // the whole team leaves
  const int memory = static_cast<int>(args.memory);
  const Scratch<X> scratch(shared + member * Scratch<X>::doubles(memory, team.warps()), memory,
                           team.warps());
  const Row<X, F> row(args, index);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (scratch.state->active) {
    const PushPlan<X> plan(args, scratch.state);
    push<X, F, kAligned, kFewAges>(team, args, row, plan, 0, args.dim, scratch);
    add_warp_sums(team, scratch.warp_sums, memory + 1, plan.history + 1, scratch.sums);
    if (team.warp() == 0) decide(team.lane(), args, index, /*commits=*/true, scratch);
  } else if (team.rank == 0) {
    *scratch.plan = {AndersonMove::copy_x, 0, 0.0};
  }
  team.sync();
  move<X, F, kAligned>(team, args, row, 0, args.dim, scratch);
}

// First of two launches: a block takes a chunk of a row.
template <typename X, typename F, bool kAligned, int kAges>
__global__ void __launch_bounds__(kBlockThreads, kPushBlocks<X, F, kAligned, kAges>)
    anderson_push_chunk(const AndersonArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int64_t chunks = chunks_of(args.dim);
  const int64_t index = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int memory = static_cast<int>(args.memory), width = memory + 1;
  const Scratch<X> scratch(shared, memory, team.warps());

  if (team.warp() == 0) {
    read_row(team.lane(), args.rows, index, scratch.state);
    __syncwarp();
    if (chunk == 0) copy_row(team.lane(), scratch.state, workspace.states + index);
  }
  team.sync();
  if (!scratch.state->active) return;
  const PushPlan<X> plan(args, scratch.state);
  const int64_t begin = chunk * chunk_of(args.dim);
  const int64_t end = end_of_chunk(args.dim, begin);
  push<X, F, kAligned, kAges>(team, args, Row<X, F>(args, index), plan, begin, end, scratch);
  add_warp_sums(team, scratch.warp_sums, width, plan.history + 1,
                workspace.chunk_sums + (index * chunks + chunk) * width);
}

// Second launch: every block of a row works out the same plan; the first one writes it down. Rows
// come in reverse, so that the slots which were written last are still in the cache.
template <typename X, typename F, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, kMoveBlocks<X>)
    anderson_move_chunk(const AndersonArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int64_t chunks = chunks_of(args.dim);
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / chunks, chunk = block % chunks;
  const int memory = static_cast<int>(args.memory), width = memory + 1;
  const Scratch<X> scratch(shared, memory, team.warps());

  if (team.warp() == 0) copy_row(team.lane(), workspace.states + index, scratch.state);
  team.sync();
  if (scratch.state->active) {
    const int history = static_cast<int>(anderson_history(row_args(args, scratch.state), 0));
    add_chunk_sums(team, workspace.chunk_sums + index * chunks * width, chunks, width, history + 1,
                   scratch.sums);
    if (team.warp() == 0) decide(team.lane(), args, index, /*commits=*/chunk == 0, scratch);
  } else if (team.rank == 0) {
    *scratch.plan = {AndersonMove::copy_x, 0, 0.0};
  }
  team.sync();
  const int64_t begin = chunk * chunk_of(args.dim);
  const int64_t end = end_of_chunk(args.dim, begin);
  move<X, F, kAligned>(team, args, Row<X, F>(args, index), begin, end, scratch);
}

template <typename X, typename F, bool kAligned>
const char* launch_step(const AndersonArgs& args, Path path, void* workspace, Stream stream) {
  const int64_t memory = args.memory;
  if (path == Path::warp) {
    const int64_t blocks = (args.batch + kWarpsPerBlock - 1) / kWarpsPerBlock;
    const int64_t shared = kWarpsPerBlock * Scratch<X>::doubles(memory, 1) * 8;
    return launch(anderson_whole_row<X, F, kAligned>, blocks, kWarpsPerBlock * kWarp, shared,
                  stream, args, kWarp);
  }
  const int64_t shared = Scratch<X>::doubles(memory, kBlockThreads / kWarp) * 8;
  if (path == Path::block) {
    return launch(anderson_whole_row<X, F, kAligned>, args.batch, kBlockThreads, shared, stream,
                  args, kBlockThreads);
  }
  const Workspace work(workspace, args.batch);
  const int64_t blocks = args.batch * chunks_of(args.dim);
  const bool few = !kAligned || memory <= kFewAges + 1;
  const auto push_kernel =
                 few ? anderson_push_chunk<X, F, kAligned, kFewAges> : anderson_push_chunk < X,
             F, kAligned, kAligned ? kManyAges<X> : kFewAges > ;
  const char* const error = launch(push_kernel, blocks, kBlockThreads, shared, stream, args, work);
  if (error != nullptr) return error;
  return launch(anderson_move_chunk<X, F, kAligned>, blocks, kBlockThreads, shared, stream, args,
                work);
}

template <typename X, typename F>
const char* launch_typed(const AndersonArgs& args, Path path, void* workspace, Stream stream) {
  constexpr int kWidth = kPackWidth<X>;
  const bool aligned =
      args.dim % kWidth == 0 &&
      are_aligned(16, {args.x, args.g_ring, args.h_ring, args.best, args.x_next}) &&
      are_aligned(kWidth * sizeof(F), {args.f, args.z_next});
  return aligned ? launch_step<X, F, true>(args, path, workspace, stream)
                 : launch_step<X, F, false>(args, path, workspace, stream);
}

}  // namespace

Path anderson_path(const AndersonArgs& args) {
  if (args.dim > kWarpPathDim && takes_hopper_paths()) return Path::cluster;
  return choose_path(args.dim, Scratch<double>::doubles(args.memory, 1));
}

int64_t anderson_workspace_bytes(const AndersonArgs& args, Path path) {
  if (path != Path::split) return 0;
  const int64_t sums = chunks_of(args.dim) * (args.memory + 1) * 8;
  return args.batch * (static_cast<int64_t>(sizeof(RowState)) + sums);
}

const char* anderson_step(const AndersonArgs& args, Path path, void* workspace, void* stream) {
  if (args.batch == 0) return nullptr;
  if (path == Path::cluster) return anderson_step_by_clusters(args, stream);
  const Stream on = static_cast<Stream>(stream);
  return with_dtype(args.type, [&]<typename F>() {
    return launch_typed<Compute<F>, F>(args, path, workspace, on);
  });
}

}  // namespace deqcore::cuda
