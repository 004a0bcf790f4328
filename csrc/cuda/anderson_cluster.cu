// anderson_step on a GPU with clusters, in one launch: the blocks of a cluster take a row from push
// to move. What two launches hand on through memory they add up in shared memory, and the iterates
// are on their way while the small problem is solved. Oracle: deqcore/ops/anderson_step.py.
//
// Traffic of a step, in state-sized vectors: 2 m + 4, and one less where a thread keeps its part of
// the newest iterate.
#include "cuda/anderson_row.cuh"
#include "cuda/anderson_step.h"
#include "cuda/anderson_weights.cuh"
#include "cuda/row_parts.cuh"
#include "cuda/slot_ring.cuh"

namespace deqcore::cuda {
namespace {

template <typename X, typename F>
using Row = AndersonRow<X, F>;

constexpr int kPacks = 4;  // of a tile that a thread takes
constexpr int kAges = 4;   // whose inner products are reduced at once

// What a block keeps in shared memory, before its ring.
template <typename X>
struct Scratch {
  RowSums row_sums;  // |f|^2, then g . g_i by age
  ByAge by_age;      // [memory, memory + 1]
  double *gamma, *alpha, *unit, *inverse;
  X* weights;  // alpha as the mix uses it
  int* mixed;  // how many of them are not zero
  RowState* state;
  AndersonPlan* plan;

  static __host__ __device__ int64_t doubles(int64_t memory) {
    const int64_t width = memory + 1;
    const int64_t count = RowSums::doubles(width) + memory * width + 5 * memory + 1 +
                          kRowStateDoubles + sizeof(AndersonPlan) / 8;
    return (count + 1) / 2 * 2;  // whole packs: a ring follows
  }

  DEQCORE_DEVICE Scratch(double* at, int memory) : row_sums(at, memory + 1) {
    at += RowSums::doubles(memory + 1);
    const auto take = [&at](int count) {
      double* const taken = at;
      at += count;
      return taken;
    };
    by_age = {take(memory * (memory + 1)), memory + 1};
    gamma = take(memory);
    alpha = take(memory);
    unit = take(memory);
    inverse = take(memory);
    weights = reinterpret_cast<X*>(take(memory));
    mixed = reinterpret_cast<int*>(take(1));
    state = reinterpret_cast<RowState*>(take(kRowStateDoubles));
    plan = reinterpret_cast<AndersonPlan*>(take(sizeof(AndersonPlan) / 8));
  }
};
static_assert(sizeof(AndersonPlan) % 8 == 0);

DEQCORE_DEVICE int slot_before(int slot, int age, int memory) {
  return slot - age + (age > slot ? memory : 0);
}

// Starts to fetch what the Gram matrix already has of the mixed slots, by age: no part of it that
// this step writes.
template <typename X>
DEQCORE_DEVICE void fetch_gram(const Team& team, const AndersonArgs& args, int64_t row, int history,
                               int slot, const Scratch<X>& scratch) {
  const int memory = static_cast<int>(args.memory), old = history - 1;
  const double* const gram = args.gram + row * memory * memory;
  for (int i = team.rank; i < old * old; i += team.threads) {
    const int a = 1 + i / old, b = 1 + i % old;
    copy_async<8>(&scratch.by_age(a, b),
                  gram + slot_before(slot, a, memory) * memory + slot_before(slot, b, memory));
  }
  close_copies();
}

// By one warp: the mixing weights, from the sums and what fetch_gram has brought.
template <typename X>
DEQCORE_DEVICE void solve(int lane, const AndersonArgs& args, int history,
                          const Scratch<X>& scratch) {
  for (int age = lane; age < history; age += kWarp) {
    scratch.by_age(0, age) = scratch.by_age(age, 0) = scratch.row_sums.totals[1 + age];
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

// From the sums: one warp works out the row's status and plan, another one its mixing weights.
// Every block of the cluster does, and all threads see them afterwards.
template <typename X>
DEQCORE_DEVICE void decide(const Team& team, const AndersonArgs& args, int history,
                           const Scratch<X>& scratch) {
  if (team.rank == 0) {
    *scratch.plan = anderson_plan(row_args(args, scratch.state), 0, history,
                                  scratch.row_sums.totals[1], scratch.row_sums.totals[0]);
  }
  if (team.warp() == kBlockWarps - 1) solve(team.lane(), args, history, scratch);
  team.sync();
}

// By one warp of the first block, after decide: writes down the row and what its Gram matrix has
// gained.
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
    const int other = slot_before(slot, age, memory);
    gram[slot * memory + other] = gram[other * memory + slot] = scratch.row_sums.totals[1 + age];
  }
}

// One thread at work on its block's share of a row: tiles of parts, one after the other.
template <typename X, typename F, bool kAligned>
struct Worker {
  static constexpr int kWidth = kPackWidth<X>;
  using Ring = SlotRing<X, kBlockThreads, kWidth, kPacks, kAligned>;
  using Own = typename Ring::Own;
  using Packs = Pack<X, kWidth>[kPacks];
  static constexpr int kKeptBytes = Ring::kStageBytes;

  const AndersonArgs& args;
  const int64_t index;
  const Team team;
  const Share<Own> share;
  Pack<X, kWidth>* const kept;  // in shared memory: the newest iterate of the tile pushed last
  Ring ring;
  int stages;
  // What is fetched next: age `age` of a tile, of residuals and then, backwards, of iterates.
  bool pushing = true;
  int tile = 0, age = 1;
  Own own_of_tile;
  int slot = 0, history = 0;

  DEQCORE_DEVICE Worker(const AndersonArgs& args, int64_t index, const Team& team,
                        const Share<Own>& share, double* room, int stages)
      : args(args),
        index(index),
        team(team),
        share(share),
        kept(reinterpret_cast<Pack<X, kWidth>*>(room) + team.rank),
        ring(room + kKeptBytes / 8, team.rank, stages),
        stages(stages) {}

  DEQCORE_DEVICE Row<X, F> row() const { return Row<X, F>(args, index); }

  DEQCORE_DEVICE void fetch_next() {
    if (tile < 0 || history < 2) return ring.skip();
    if (age == 1) own_of_tile = share[tile];
    const X* const from = pushing ? row().g_ring : row().h_ring;
    ring.fetch(from + slot_before(slot, age, static_cast<int>(args.memory)) * args.dim,
               own_of_tile);
    if (++age < history) return;
    age = 1;
    if (!pushing) {
      --tile;
    } else if (tile + 1 < share.tiles) {
      ++tile;
    } else {
      pushing = false;
    }
  }

  // Begins to fetch: all but the newest slot, which this step makes.
  DEQCORE_DEVICE void fetch(const PushPlan<X>& plan) {
    slot = plan.slot;
    history = plan.history;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) fetch_next();
  }

  // Phase 1 of a tile: stores g and h, and adds each warp's part of the inner products to its sums.
  DEQCORE_DEVICE void push(const PushPlan<X>& plan, const Own& own, double* sums, bool begins) {
    Packs x, f;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      x[p] = load<kAligned, kWidth>(row().x + own.at(p), own.left(p));
      f[p] = widen<X>(load<kAligned, kWidth>(row().f + own.at(p), own.left(p)));
    }
    Pack<double, kWidth> g[kPacks];
    double norms[2] = {0.0, 0.0};  // of f and g
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!own.has(p)) continue;
      const auto residual = residual_of<F>(f[p], x[p]);
      kept[p * kBlockThreads] = store_slot<kAligned>(
          row(), plan, own.at(p), own.left(p), plan.slot * args.dim + own.at(p), x[p], residual);
      g[p] = in_doubles(residual);
      add_dot(f[p], f[p], norms[0]);
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

  // Phase 2 of a tile: the older iterates come through the ring, the newest one from where it was
  // kept, or where this thread has written it. An unused slot may hold NaN.
  DEQCORE_DEVICE void mix(const Own& own, const X* weights, bool is_kept) {
    Packs value = {};
    const X newest = weights[0];
    const X* const from = row().h_ring + slot * args.dim;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (newest == 0 || !own.has(p)) continue;
      add_scaled(value[p], newest,
                 is_kept ? kept[p * kBlockThreads]
                         : load<kAligned, kWidth>(from + own.at(p), own.left(p)));
    }
#pragma unroll 1
    for (int of = 1; of < history; ++of) {
      const X weight = weights[of];
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
      if (own.has(p)) store_at(own, p, value[p]);
    }
  }

  // Phase 2 of the whole share where nothing is mixed.
  DEQCORE_DEVICE void copy(const AndersonPlan& plan) const {
    if (plan.move == AndersonMove::copy_x && row().x_next == row().x && row().z_next == nullptr)
      return;
    const X* from = row().x;
    if (plan.move == AndersonMove::best_kept) from = row().best;
    if (plan.move == AndersonMove::plain_in_ring || plan.move == AndersonMove::best_in_ring) {
      from = row().h_ring + plan.slot * args.dim;
    }
    const X* const g_slot = row().g_ring + plan.slot * args.dim;
#pragma unroll 1
    for (int i = 0; i < share.tiles; ++i) {
      const Own here = share[i];
#pragma unroll 1
      for (int p = 0; p < kPacks; ++p) {
        if (!here.has(p)) break;
        auto value = load<kAligned, kWidth>(from + here.at(p), here.left(p));
        if (plan.move == AndersonMove::best_in_ring) {
          value = rebuilt(value, static_cast<X>(plan.damping),
                          load<kAligned, kWidth>(g_slot + here.at(p), here.left(p)));
        }
        store_at(here, p, value);
      }
    }
  }

  DEQCORE_DEVICE void store_at(const Own& own, int p, const Pack<X, kWidth>& value) const {
    F* const z_next = row().z_next == nullptr ? nullptr : row().z_next + own.at(p);
    put_iterate<kAligned, kWidth>(row().x_next + own.at(p), z_next, value, own.left(p));
  }
};

// kMany: the cluster has more blocks than one.
template <typename X, typename F, bool kAligned, bool kMany>
__global__ void __launch_bounds__(kBlockThreads, 2)
    anderson_cluster(const AndersonArgs args, const RowParts parts, const int stages) {
  DEQCORE_SHARED_DOUBLES(shared);
  using W = Worker<X, F, kAligned>;
  const Team team{static_cast<int>(threadIdx.x), kBlockThreads};
  const int memory = static_cast<int>(args.memory);
  const int block = kMany ? rank_in_cluster() : 0;
  const int64_t index = blockIdx.x / static_cast<unsigned>(parts.blocks);
  const Scratch<X> scratch(shared, memory);
  const Share<typename W::Own> share(parts, args.dim, team.rank, block);
  W worker(args, index, team, share, shared + Scratch<X>::doubles(memory), stages);

  if (team.warp() == 0) read_row(team.lane(), args.rows, index, scratch.state);
  team.sync();
  if (!scratch.state->active) return worker.copy({AndersonMove::copy_x, 0, 0.0});
  const PushPlan<X> plan(args, scratch.state);
  const int width = plan.history + 1;
  scratch.row_sums.template start<kMany>(team.rank, parts, width);
  fetch_gram(team, args, index, plan.history, plan.slot, scratch);
  worker.fetch(plan);
#pragma unroll 1
  for (int tile = 0; tile < share.tiles; ++tile) {
    double* const sums = scratch.row_sums.of_warp(tile, parts, team.warp());
    worker.push(plan, share[tile], sums, tile % parts.tiles == 0);
  }
  // By now the Gram matrix has come: the first wait for a slot is for what was asked for before,
  // too.
  scratch.row_sums.template exchange<kMany>(team, parts, block, width);
  decide(team, args, plan.history, scratch);
  if (block == 0 && team.warp() == 0) {
    commit(team.lane(), args, index, plan.history, plan.slot, scratch);
  }
  if (scratch.plan->move == AndersonMove::mix) {
#pragma unroll 1
    for (int tile = share.tiles - 1; tile >= 0; --tile) {
      worker.mix(share[tile], scratch.weights, tile + 1 == share.tiles);
    }
  } else {
    worker.copy(*scratch.plan);
  }
  wait_for_copies();
}

template <typename X, typename F, bool kAligned>
const char* launch_cluster(const AndersonArgs& args, Stream stream) {
  using W = Worker<X, F, kAligned>;
  return launch_by_clusters<W>(
      anderson_cluster<X, F, kAligned, true>, anderson_cluster<X, F, kAligned, false>, args,
      Scratch<X>::doubles(args.memory) * 8 + W::kKeptBytes, 2 * (args.memory - 1), stream);
}

}  // namespace

const char* anderson_step_by_clusters(const AndersonArgs& args, void* stream) {
  const Stream on = static_cast<Stream>(stream);
  return with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    constexpr int kWidth = kPackWidth<X>;
    const bool aligned =
        args.dim % kWidth == 0 &&
        are_aligned(16, {args.x, args.g_ring, args.h_ring, args.best, args.x_next}) &&
        are_aligned(kWidth * sizeof(F), {args.f, args.z_next});
    return aligned ? launch_cluster<X, F, true>(args, on) : launch_cluster<X, F, false>(args, on);
  });
}

}  // namespace deqcore::cuda
