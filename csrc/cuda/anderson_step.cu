// anderson_step on a GPU: push, decide, move. Oracle and meaning: deqcore/ops/anderson_step.py.
//
// Traffic of a step, in state-sized vectors: push reads x, f and the other m - 1 residuals and
// writes a slot of each ring; move reads m slots of H and writes the iterate. 2 m + 4 in all, and
// one less where a thread keeps its part of the newest slot.
#include "cuda/anderson_step.h"

#include "cuda/anderson_weights.cuh"
#include "cuda/pack.cuh"
#include "cuda/slot_ring.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {
namespace {

constexpr int64_t kLongChunk = 4096;        // elements of a long row that a block takes
constexpr int kSomeOwn = 8, kManyOwn = 16;  // elements of a tile that a thread takes
constexpr int kAges = 4;                    // whose inner products are reduced at once
constexpr int kTerms = 5;                   // slots of H that are in flight at once without a ring

// What a team keeps in shared memory.
template <typename X>
struct Scratch {
  int width;          // sums of a row
  double* warp_sums;  // [warps, memory + 1]
  double* sums;       // [memory + 1] |f|^2, then g . g_i by age
  ByAge by_age;       // [memory, memory + 1]
  double *gamma, *alpha, *unit, *inverse;
  X* weights;  // alpha as the mix uses it
  int* mixed;  // how many of them are not zero
  int* flag;
  RowState* state;
  AndersonPlan* plan;

  static __host__ __device__ int64_t doubles(int64_t memory, int warps) {
    const int64_t count = (warps + 1) * (memory + 1) + memory * (memory + 1) + 5 * memory + 1 +
                          kRowStateDoubles + sizeof(AndersonPlan) / 8;
    return (count + 1) / 2 * 2;  // whole packs: a ring follows
  }

  DEQCORE_DEVICE Scratch(double* at, int memory, int warps) {
    const auto take = [&at](int count) {
      double* const taken = at;
      at += count;
      return taken;
    };
    width = memory + 1;
    warp_sums = take(warps * width);
    sums = take(memory + 1);
    by_age = {take(memory * (memory + 1)), memory + 1};
    gamma = take(memory);
    alpha = take(memory);
    unit = take(memory);
    inverse = take(memory);
    weights = reinterpret_cast<X*>(take(memory));
    mixed = reinterpret_cast<int*>(take(1));
    flag = mixed + 1;
    state = reinterpret_cast<RowState*>(take(kRowStateDoubles));
    plan = reinterpret_cast<AndersonPlan*>(take(sizeof(AndersonPlan) / 8));
  }
  DEQCORE_DEVICE double* sums_of(int warp) const { return warp_sums + warp * width; }
};
static_assert(sizeof(AndersonPlan) % 8 == 0);

// What the second launch of the split path does to a row.
struct MovePlan {
  AndersonPlan plan;
  int32_t slot;  // of age 0
  int32_t history;
};
static_assert(sizeof(MovePlan) % 8 == 0);

// What the first launch leaves for the second, and its blocks for the last of their row.
struct Workspace {
  double* chunk_sums;  // [B, chunks, memory + 1]
  double* plans;       // [B, plan_doubles] a MovePlan and its weights
  int64_t chunk;       // elements of a row that a block of the first launch takes
  unsigned chunks;     // of a row

  Workspace(void* at, const AndersonArgs& args)
      : chunk_sums(static_cast<double*>(at)),
        plans(chunk_sums + args.batch * chunks_of(args.dim, kLongChunk) * (args.memory + 1)),
        chunk(chunk_of(args.dim, kLongChunk)),
        chunks(static_cast<unsigned>(chunks_of(args.dim, kLongChunk))) {}

  static __host__ __device__ int64_t plan_doubles(int64_t memory) {
    return sizeof(MovePlan) / 8 + memory;
  }
};

// The row as its own little batch: the bookkeeping of `state`, the tensors of `args`.
DEQCORE_DEVICE AndersonArgs row_args(const AndersonArgs& args, RowState* state) {
  AndersonArgs out = args;
  out.rows = rows_of(state);
  return out;
}

template <typename X, typename F>
struct Row {
  const X* x;
  const F* f;
  X* g_ring;
  X* h_ring;
  X* best;
  X* x_next;
  F* z_next;

  DEQCORE_DEVICE Row(const AndersonArgs& args, int64_t row) {
    const int64_t at = row * args.dim;
    x = static_cast<const X*>(args.x) + at;
    f = static_cast<const F*>(args.f) + at;
    g_ring = static_cast<X*>(args.g_ring) + at * args.memory;
    h_ring = static_cast<X*>(args.h_ring) + at * args.memory;
    best = args.best == nullptr ? nullptr : static_cast<X*>(args.best) + at;
    x_next = static_cast<X*>(args.x_next) + at;
    z_next = args.z_next == nullptr ? nullptr : static_cast<F*>(args.z_next) + at;
  }
};

DEQCORE_DEVICE int slot_of_step(int64_t step, int64_t memory) {
  return static_cast<int>(static_cast<uint32_t>(step - 1) % static_cast<uint32_t>(memory));
}

// What a step knows of its row beforehand.
template <typename X>
struct PushPlan {
  int history;    // slots, this step's included, whose inner products are wanted
  int slot;       // of this step
  bool evicts;    // the slot holds the best iterate: save it
  X damping;      // of this step
  X old_damping;  // of the slot's previous use

  DEQCORE_DEVICE PushPlan(const AndersonArgs& args, RowState* state) {
    const AndersonArgs one = row_args(args, state);
    const int64_t step = state->counters[kSteps] + 1;
    history = static_cast<int>(anderson_history(one, 0));
    slot = slot_of_step(step, args.memory);
    evicts = anderson_evicts_best(one, 0);
    damping = static_cast<X>(damping_at(args.damping, args.damping_length, step));
    old_damping = static_cast<X>(damping_at(args.damping, args.damping_length, step - args.memory));
  }
};

// What a thread fetches in turn: residuals from age 1 on, then iterates from `first_age` on.
template <typename X>
struct Turns {
  const X *g_ring, *h_ring;
  int64_t dim;
  int slot, memory;
  int residuals, first_age, count;
  int next = 0;

  DEQCORE_DEVICE const X* source() const {
    const bool is_g = next < residuals;
    const int age = is_g ? 1 + next : first_age + next - residuals;
    const int at = slot - age + (age > slot ? memory : 0);
    return (is_g ? g_ring : h_ring) + at * dim;
  }
};

// The residual and the damped iterate of one pack go into the step's slot; returns the latter.
template <bool kAligned, typename X, typename F, int kWidth>
DEQCORE_DEVICE Pack<X, kWidth> store_slot(const Row<X, F>& row, const PushPlan<X>& plan, int64_t at,
                                          int left, int64_t slot_at, const Pack<X, kWidth>& x,
                                          const Pack<X, kWidth>& g) {
  if (plan.evicts) {
    const auto old_g = load<kAligned, kWidth>(row.g_ring + slot_at, left);
    const auto old_h = load<kAligned, kWidth>(row.h_ring + slot_at, left);
    store<kAligned, kWidth>(row.best + at, rebuilt(old_h, plan.old_damping, old_g), left);
  }
  Pack<X, kWidth> h = x;
  add_scaled(h, plan.damping, g);
  store<kAligned, kWidth>(row.g_ring + slot_at, g, left);
  store<kAligned, kWidth>(row.h_ring + slot_at, h, left);
  return h;
}

// Fetches what the Gram matrix already has of the mixed slots, by age.
template <typename X>
DEQCORE_DEVICE void fetch_gram(const Team& team, const AndersonArgs& args, int64_t row, int history,
                               int slot, const Scratch<X>& scratch) {
  const int memory = static_cast<int>(args.memory), old = history - 1;
  const double* const gram = args.gram + row * memory * memory;
  const auto slot_of = [=](int age) { return slot - age + (age > slot ? memory : 0); };
  for (int i = team.rank; i < old * old; i += team.threads) {
    const int a = 1 + i / old, b = 1 + i % old;
    copy_async<8>(&scratch.by_age(a, b), gram + slot_of(a) * memory + slot_of(b));
  }
  close_copies();
}

// By one warp: the mixing weights, from scratch.sums and what fetch_gram has brought.
template <typename X>
DEQCORE_DEVICE void solve(int lane, const AndersonArgs& args, int history,
                          const Scratch<X>& scratch) {
  for (int age = lane; age < history; age += kWarp) {
    scratch.by_age(0, age) = scratch.by_age(age, 0) = scratch.sums[1 + age];
  }
  __syncwarp();
  int mixed = 0;
  if (history <= kFewColumns + 1) {
    if (lane != 0) return;
    double alpha[kFewColumns + 1];
    weights_of_few(scratch.by_age, history, args.options, alpha);
#pragma unroll
    for (int age = 0; age <= kFewColumns; ++age) {
      if (age >= history) break;
      scratch.weights[age] = static_cast<X>(alpha[age]);
      mixed += alpha[age] != 0;
    }
  } else {
    weights_by_warp(lane, scratch.by_age, history, args.options, scratch.gamma, scratch.alpha,
                    scratch.unit, scratch.inverse);
    for (int first = 0; first < history; first += kWarp) {
      const int age = first + lane;
      const bool used = age < history && scratch.alpha[age] != 0;
      mixed += __popc(__ballot_sync(kWholeWarp, used));
      if (age < history) scratch.weights[age] = static_cast<X>(scratch.alpha[age]);
    }
  }
  if (lane == 0) *scratch.mixed = mixed;
}

// Between the phases, from scratch.sums: one warp works out the row's status and plan, another one
// its mixing weights. All threads see them afterwards.
template <typename X>
DEQCORE_DEVICE void decide(const Team& team, const AndersonArgs& args, int history,
                           const Scratch<X>& scratch) {
  if (team.rank == 0) {
    *scratch.plan =
        anderson_plan(row_args(args, scratch.state), 0, history, scratch.sums[1], scratch.sums[0]);
  }
  if (team.warp() == team.warps() - 1) solve(team.lane(), args, history, scratch);
  team.sync();
}

// By one warp, after decide: writes down the row and what its Gram matrix has gained.
template <typename X>
DEQCORE_DEVICE void commit(int lane, const AndersonArgs& args, int64_t row, int history, int slot,
                           const Scratch<X>& scratch) {
  const int memory = static_cast<int>(args.memory);
  double* const gram = args.gram + row * memory * memory;
  if (lane == 0 && scratch.plan->move == AndersonMove::mix) {
    scratch.state->counters[kMixed] = *scratch.mixed;
  }
  __syncwarp();
  commit_row(lane, scratch.state, args.rows, row);
  for (int age = lane; age < history; age += kWarp) {
    const int other = slot - age + (age > slot ? memory : 0);
    gram[slot * memory + other] = gram[other * memory + slot] = scratch.sums[1 + age];
  }
}

// One of kThreads threads at work on a tile of a row: kOwn elements are its own.
template <typename X, typename F, int kThreads, int kOwn, bool kAligned>
struct Worker {
  static constexpr int kWidth = kPackWidth<X>, kPacks = kOwn / kWidth;
  static constexpr int kTeam = kThreads;
  static constexpr int kBlock = kThreads == kWarp ? kWarpsPerBlock * kWarp : kThreads;
  static constexpr int64_t kTile = int64_t{kThreads} * kOwn;
  using Kept = Scratch<X>;
  using Plan = PushPlan<X>;
  using Ring = SlotRing<X, kThreads, kWidth, kPacks, kAligned>;
  using Own = typename Ring::Own;
  using Packs = Pack<X, kWidth>[kPacks];

  const AndersonArgs& args;
  const Row<X, F> row;
  const Own own;
  Ring ring;
  Turns<X> turns;
  int stages;

  // Doubles of a team's shared memory.
  static __host__ __device__ int64_t shared(int64_t memory, int stages) {
    return Scratch<X>::doubles(memory, kThreads / kWarp) + stages * Ring::kStageBytes / 8;
  }

  DEQCORE_DEVICE Worker(const Team& team, const AndersonArgs& args, int64_t index, int64_t begin,
                        int64_t end, double* shared, int stages)
      : args(args),
        row(args, index),
        own(team, begin, end),
        ring(shared + Scratch<X>::doubles(args.memory, kThreads / kWarp), team, stages),
        stages(stages) {}

  DEQCORE_DEVICE void fetch_next() {
    if (turns.next < turns.count) {
      ring.fetch(turns.source(), own);
    } else {
      ring.skip();
    }
    ++turns.next;
  }

  // Begins to fetch `residuals` slots of G, from age 1 on, and of H, from first_age on.
  DEQCORE_DEVICE void fetch(int slot, int residuals, int first_age, int iterates) {
    turns = {
        row.g_ring, row.h_ring,          args.dim, slot, static_cast<int>(args.memory), residuals,
        first_age,  residuals + iterates};
#pragma unroll 1
    for (int i = 0; i < stages; ++i) fetch_next();
  }

  // Phase 1: stores g and h, h in `newest` too, and adds each warp's part of the inner products to
  // its sums.
  DEQCORE_DEVICE void push(const Team& team, const PushPlan<X>& plan, double* sums, bool begins,
                           Packs& newest) {
    Packs f;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      newest[p] = load<kAligned, kWidth>(row.x + own.at(p), own.left(p));
      f[p] = widen<X>(load<kAligned, kWidth>(row.f + own.at(p), own.left(p)));
    }
    Pack<double, kWidth> g[kPacks];
    double norms[2] = {0.0, 0.0};  // of f and g
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      const auto residual = residual_of<F>(f[p], newest[p]);
      newest[p] = store_slot<kAligned>(row, plan, own.at(p), own.left(p),
                                       plan.slot * args.dim + own.at(p), newest[p], residual);
      g[p] = in_doubles(residual);
      add_dot(in_doubles(f[p]), in_doubles(f[p]), norms[0]);
      add_dot(g[p], g[p], norms[1]);
    }
    keep_warp_sums(team.lane(), norms, 2, begins, sums);
#pragma unroll 1
    for (int first = 1; first < plan.history; first += kAges) {
      double dots[kAges];
#pragma unroll
      for (int k = 0; k < kAges; ++k) {
        dots[k] = 0.0;
        if (first + k >= plan.history) continue;
        ring.wait();
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (own.has(p)) add_dot(g[p], in_doubles(ring.pack(p)), dots[k]);
        }
        ring.release();
        fetch_next();
      }
      keep_warp_sums(team.lane(), dots, plan.history - first, begins, sums + 1 + first);
    }
  }

  // Phase 2 where the iterates come through the ring, but for the newest one. An unused slot may
  // hold NaN.
  DEQCORE_DEVICE void move(const AndersonPlan& plan, int history, const X* weights,
                           const Packs& newest) {
    if (plan.move != AndersonMove::mix) return copy(plan);
    Packs value = {};
    if (weights[0] != 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (own.has(p)) add_scaled(value[p], weights[0], newest[p]);
      }
    }
#pragma unroll 1
    for (int age = 1; age < history; ++age) {
      const X weight = weights[age];
      ring.wait();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (weight != 0 && own.has(p)) add_scaled(value[p], weight, ring.pack(p));
      }
      ring.release();
      fetch_next();
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (own.has(p)) store_at(p, value[p]);
    }
  }

  // Phase 2 without a ring.
  DEQCORE_DEVICE void mix(int slot, int history, const X* weights) const {
    const int memory = static_cast<int>(args.memory);
    Packs value = {};
#pragma unroll 1
    for (int first = 0; first < history; first += kTerms) {
      Packs h[kTerms];
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        const int age = first + k;
        if (age >= history || weights[age] == 0) continue;
        const X* const from = row.h_ring + (slot - age + (age > slot ? memory : 0)) * args.dim;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (own.has(p)) h[k][p] = load_once<kAligned, kWidth>(from + own.at(p), own.left(p));
        }
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (first + k >= history || weights[first + k] == 0) continue;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (own.has(p)) add_scaled(value[p], weights[first + k], h[k][p]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (own.has(p)) store_at(p, value[p]);
    }
  }

  // Phase 2 where nothing is mixed.
  DEQCORE_DEVICE void copy(const AndersonPlan& plan) const {
    if (plan.move == AndersonMove::copy_x && row.x_next == row.x && row.z_next == nullptr) return;
    const X* from = row.x;
    if (plan.move == AndersonMove::best_kept) from = row.best;
    if (plan.move == AndersonMove::plain_in_ring || plan.move == AndersonMove::best_in_ring) {
      from = row.h_ring + plan.slot * args.dim;
    }
    const X* const g_slot = row.g_ring + plan.slot * args.dim;
#pragma unroll 1
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) break;
      auto value = load<kAligned, kWidth>(from + own.at(p), own.left(p));
      if (plan.move == AndersonMove::best_in_ring) {
        value = rebuilt(value, static_cast<X>(plan.damping),
                        load<kAligned, kWidth>(g_slot + own.at(p), own.left(p)));
      }
      store_at(p, value);
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
    anderson_whole_row(const AndersonArgs args, const int stages) {
  DEQCORE_SHARED_DOUBLES(shared);
  const int thread = static_cast<int>(threadIdx.x), member = thread / W::kTeam;
  const Team team{thread % W::kTeam, W::kTeam};
  const int64_t index = int64_t{blockIdx.x} * (W::kBlock / W::kTeam) + member;
  if (index >= args.batch) return;  // the whole team leaves
  double* const at = shared + member * W::shared(args.memory, stages);
  const typename W::Kept scratch(at, static_cast<int>(args.memory), team.warps());
  W worker(team, args, index, 0, args.dim, at, stages);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) return worker.copy({AndersonMove::copy_x, 0, 0.0});
  const typename W::Plan plan(args, scratch.state);
  fetch_gram(team, args, index, plan.history, plan.slot, scratch);
  worker.fetch(plan.slot, plan.history - 1, 1, plan.history - 1);
  typename W::Packs newest;
  worker.push(team, plan, scratch.sums_of(team.warp()), true, newest);
  add_warp_sums(team, scratch.warp_sums, scratch.width, plan.history + 1, scratch.sums);
  decide(team, args, plan.history, scratch);
  if (team.warp() == 0) commit(team.lane(), args, index, plan.history, plan.slot, scratch);
  worker.move(*scratch.plan, plan.history, scratch.weights, newest);
  wait_for_copies();
}

// One pass over [begin, end): inner products with the residuals of kAges ages from first_age, each
// warp's part of them into `sums`. The first pass also stores g and h; later ones find g in the
// cache.
template <typename X, typename F, bool kAligned, bool kFirst>
DEQCORE_DEVICE void push_pass(const Team& team, const AndersonArgs& args, const Row<X, F>& row,
                              const PushPlan<X>& plan, int first_age, int64_t begin, int64_t end,
                              double* sums) {
  constexpr int kWidth = kPackWidth<X>;
  const int memory = static_cast<int>(args.memory);
  const int ages = plan.history - first_age < kAges ? plan.history - first_age : kAges;
  const int64_t slot_at = plan.slot * args.dim;
  const X* others[kAges];
#pragma unroll
  for (int k = 0; k < kAges; ++k) {
    const int age = k < ages ? first_age + k : 0;
    others[k] = row.g_ring + (plan.slot - age + (age > plan.slot ? memory : 0)) * args.dim;
  }
  double parts[8] = {};  // of |f|^2 and |g|^2, then of the inner products
#pragma unroll 1
  for (int64_t i = begin + team.rank * kWidth; i < end; i += kBlockThreads * kWidth) {
    const int64_t left = end - i;
    Pack<X, kWidth> other[kAges], g;
    if constexpr (kFirst) {
      const auto x = load_once<kAligned, kWidth>(row.x + i, left);
      const auto f = widen<X>(load_once<kAligned, kWidth>(row.f + i, left));
#pragma unroll
      for (int k = 0; k < kAges; ++k) {
        if (k < ages) other[k] = load_once<kAligned, kWidth>(others[k] + i, left);
      }
      g = residual_of<F>(f, x);
      store_slot<kAligned>(row, plan, i, left, slot_at + i, x, g);
      add_dot(in_doubles(f), in_doubles(f), parts[0]);
      add_dot(in_doubles(g), in_doubles(g), parts[1]);
    } else {
      g = load<kAligned, kWidth>(row.g_ring + slot_at + i, left, /*again=*/true);
#pragma unroll
      for (int k = 0; k < kAges; ++k) {
        if (k < ages) other[k] = load_once<kAligned, kWidth>(others[k] + i, left);
      }
    }
#pragma unroll
    for (int k = 0; k < kAges; ++k) {
      if (k < ages) add_dot(in_doubles(g), in_doubles(other[k]), parts[2 + k]);
    }
  }
  const double sum = joint_warp_sums(team.lane(), parts);
  const int index = team.lane() / (kWarp / 8);
  const bool wanted = index < 2 ? kFirst : index - 2 < ages;
  if (team.lane() % (kWarp / 8) == 0 && wanted) {
    sums[index < 2 ? index : index - 1 + first_age] = sum;
  }
}

// By one warp: what the second launch is to do to a row.
template <typename X>
DEQCORE_DEVICE void hand_over(int lane, const AndersonPlan& plan, int history, int slot,
                              const X* weights, double* to) {
  if (lane == 0) *reinterpret_cast<MovePlan*>(to) = {plan, slot, history};
  if (plan.move != AndersonMove::mix) return;
  X* const to_weights = reinterpret_cast<X*>(to + sizeof(MovePlan) / 8);
  for (int age = lane; age < history; age += kWarp) to_weights[age] = weights[age];
}

// First of two launches: a block takes a chunk of a row, and the last one that is done with its own
// decides on the row.
template <typename X, typename F, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, sizeof(X) == 4 ? 3 : 2)
    anderson_push_chunk(const AndersonArgs args, const Workspace workspace) {
  let_next_launch_start();
  DEQCORE_SHARED_DOUBLES(shared);
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int64_t index = blockIdx.x / workspace.chunks;
  const unsigned chunk = blockIdx.x % workspace.chunks;
  const int memory = static_cast<int>(args.memory);
  const Scratch<X> scratch(shared, memory, team.warps());
  const Row<X, F> row(args, index);
  double* const plan_at = workspace.plans + index * Workspace::plan_doubles(memory);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) {
    const AndersonPlan frozen{AndersonMove::copy_x, 0, 0.0};
    if (chunk == 0 && team.warp() == 0) {
      hand_over<X>(team.lane(), frozen, 0, 0, nullptr, plan_at);
    }
    return;
  }
  const PushPlan<X> plan(args, scratch.state);
  const int64_t begin = chunk * workspace.chunk, end = end_of(args.dim, begin + workspace.chunk);
  double* const sums = scratch.sums_of(team.warp());
  push_pass<X, F, kAligned, true>(team, args, row, plan, 1, begin, end, sums);
#pragma unroll 1
  for (int age = 1 + kAges; age < plan.history; age += kAges) {
    push_pass<X, F, kAligned, false>(team, args, row, plan, age, begin, end, sums);
  }
  add_warp_sums(team, scratch.warp_sums, scratch.width, plan.history + 1,
                workspace.chunk_sums + int64_t{blockIdx.x} * scratch.width);
  int32_t* const arrived = args.rows.counters + index * kCounters + kArrived;
  if (!is_last(team, arrived, workspace.chunks, scratch.flag)) return;
  fetch_gram(team, args, index, plan.history, plan.slot, scratch);
  add_chunk_sums(team, workspace.chunk_sums + index * workspace.chunks * scratch.width,
                 workspace.chunks, scratch.width, plan.history + 1, scratch.sums);
  wait_for_copies();
  team.sync();
  decide(team, args, plan.history, scratch);
  if (team.warp() != 0) return;
  commit(team.lane(), args, index, plan.history, plan.slot, scratch);
  hand_over(team.lane(), *scratch.plan, plan.history, plan.slot, scratch.weights, plan_at);
}

template <typename W>
__host__ __device__ int64_t tiles_of(int64_t dim) {
  return dim > 0 ? (dim + W::kTile - 1) / W::kTile : 1;
}

// Of a thread of the second launch.
constexpr int kMovePacks = 2;

// Second launch: the next iterate. Rows come in reverse, so that the slots which were written last
// are still in the cache.
template <typename X, typename F, bool kAligned>
__global__ void __launch_bounds__(kBlockThreads, sizeof(X) == 4 ? 4 : 3)
    anderson_move_tile(const AndersonArgs args, const Workspace workspace) {
  DEQCORE_SHARED_DOUBLES(shared);
  using W = Worker<X, F, kBlockThreads, kMovePacks * kPackWidth<X>, kAligned>;
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int memory = static_cast<int>(args.memory);
  const unsigned tiles = static_cast<unsigned>(tiles_of<W>(args.dim));
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t index = block / tiles, begin = block % tiles * W::kTile;
  const W worker(team, args, index, begin, args.dim, nullptr, 0);

  wait_for_launch_before();
  const int doubles = static_cast<int>(Workspace::plan_doubles(memory));
  for (int i = team.rank; i < doubles; i += kBlockThreads) {
    shared[i] = workspace.plans[index * doubles + i];
  }
  team.sync();
  const MovePlan plan = *reinterpret_cast<const MovePlan*>(shared);
  if (plan.plan.move != AndersonMove::mix) return worker.copy(plan.plan);
  worker.mix(plan.slot, plan.history, reinterpret_cast<const X*>(shared + sizeof(MovePlan) / 8));
}

template <typename W, int kBlocks>
const char* launch_whole(const AndersonArgs& args, Stream stream) {
  constexpr int kTeams = W::kBlock / W::kTeam;
  if (args.dim > W::kTile) return "a row is too long for its path";
  const int stages = stages_of(2 * (args.memory - 1), kTeams * W::Ring::kStageBytes,
                               kTeams * W::shared(args.memory, 0) * 8);
  return launch(anderson_whole_row<W, kBlocks>, (args.batch + kTeams - 1) / kTeams, W::kBlock,
                kTeams * W::shared(args.memory, stages) * 8, stream, args, stages);
}

template <typename X, typename F, bool kAligned>
const char* launch_split(const AndersonArgs& args, const Workspace& work, Stream stream) {
  using W = Worker<X, F, kBlockThreads, kMovePacks * kPackWidth<X>, kAligned>;
  const char* const error =
      launch(anderson_push_chunk<X, F, kAligned>, args.batch * work.chunks, kBlockThreads,
             Scratch<X>::doubles(args.memory, kBlockThreads / kWarp) * 8, stream, args, work);
  if (error != nullptr) return error;
  return launch_early(anderson_move_tile<X, F, kAligned>, args.batch * tiles_of<W>(args.dim),
                      kBlockThreads, Workspace::plan_doubles(args.memory) * 8, stream, args, work);
}

template <typename X, typename F, bool kAligned>
const char* launch_step(const AndersonArgs& args, Path path, void* workspace, Stream stream) {
  if (path == Path::split) {
    return launch_split<X, F, kAligned>(args, Workspace(workspace, args), stream);
  }
  constexpr int kManyBlocks = sizeof(X) == 8 ? 1 : 2;  // as registers allow
  if (path == Path::warp) {
    if (args.dim <= kWarp * kFewOwn) {
      return launch_whole<Worker<X, F, kWarp, kFewOwn, kAligned>, 2>(args, stream);
    }
    if (args.dim <= kWarp * kSomeOwn) {
      return launch_whole<Worker<X, F, kWarp, kSomeOwn, kAligned>, 2>(args, stream);
    }
    return launch_whole<Worker<X, F, kWarp, kManyOwn, kAligned>, kManyBlocks>(args, stream);
  }
  if (args.dim <= kBlockThreads * kFewOwn) {
    return launch_whole<Worker<X, F, kBlockThreads, kFewOwn, kAligned>, 2>(args, stream);
  }
  return launch_whole<Worker<X, F, kBlockThreads, kManyOwn, kAligned>, kManyBlocks>(args, stream);
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
  return choose_path(args.dim, kManyOwn, Scratch<double>::doubles(args.memory, 1));
}

int64_t anderson_workspace_bytes(const AndersonArgs& args, Path path) {
  if (path != Path::split) return 0;
  const int64_t sums = chunks_of(args.dim, kLongChunk) * (args.memory + 1);
  return args.batch * (sums + Workspace::plan_doubles(args.memory)) * 8;
}

const char* anderson_step(const AndersonArgs& args, Path path, void* workspace, void* stream) {
  if (args.batch == 0) return nullptr;
  const Stream on = static_cast<Stream>(stream);
  return with_dtype(args.type, [&]<typename F>() {
    return launch_typed<Compute<F>, F>(args, path, workspace, on);
  });
}

}  // namespace deqcore::cuda
