// broyden_step on rows: inner products, plan, step. Compiled once per instruction set; no torch.
#include <algorithm>
#include <cstdint>

#include "cpu/broyden_step.h"
#include "cpu/prefetch.h"
#include "cpu/reductions.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace {

template <typename X, typename F, typename S>
struct Row {
  const X* x;
  const F* f;
  S* s_ring;
  X* best;
  X* x_next;
  F* z_next;

  Row(const BroydenArgs& args, int64_t row) {
    const int64_t at = row * args.dim;
    x = static_cast<const X*>(args.x) + at;
    f = static_cast<const F*>(args.f) + at;
    s_ring = static_cast<S*>(args.s_ring) + at * args.capacity;
    best = static_cast<X*>(args.best) + at;
    x_next = static_cast<X*>(args.x_next) + at;
    z_next = args.z_next == nullptr ? nullptr : static_cast<F*>(args.z_next) + at;
  }
};

// g = f - x, where f was evaluated at x as F.
template <typename X, typename F>
void residual_block(const X* __restrict x, const F* __restrict f, int count, X* __restrict g) {
  for (int i = 0; i < count; ++i) g[i] = to_compute(f[i]) - to_compute(from_compute<F>(x[i]));
}

// The same numbers as X: `from` itself, or `room` filled with them.
template <typename X, typename T>
const X* widened(const T* __restrict from, int count, X* __restrict room) {
  if constexpr (sizeof(T) == sizeof(X)) {
    return from;
  } else {
    for (int i = 0; i < count; ++i) room[i] = to_compute(from[i]);
    return room;
  }
}

// Whether the steps of a row come from memory at each pass: then they are asked for ahead.
template <typename S>
bool beyond_cache(const BroydenArgs& args, int64_t stored) {
  return stored * args.dim * static_cast<int64_t>(sizeof(S)) > kCacheable;
}

// Phase 1 on [begin, end) of a row. sums: |g|^2, |f|^2, then s_j . g and s_j . s_newest for each j.
template <typename X, typename F, typename S>
void push(const BroydenArgs& args, int64_t row, int64_t begin, int64_t end, double* sums) {
  const Row<X, F, S> at(args, row);
  const int stored = static_cast<int>(broyden_history(args, row));
  alignas(64) double lanes[(2 * kBroydenMaxMemory + 2) * kAccumulators];
  std::fill_n(lanes, (2 * stored + 2) * kAccumulators, 0.0);
  alignas(64) X g[kBlock], wide_f[kBlock], wide_newest[kBlock];
  const S* steps[kBroydenMaxMemory];
  const bool ahead = beyond_cache<S>(args, stored);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    residual_block(at.x + first, at.f + first, count, g);
    const X* const f = widened(at.f + first, count, wide_f);
    add_square<X>(g, count, lanes);
    add_square<X>(f, count, lanes + kAccumulators);
    for (int j = 0; j < stored; ++j) {
      steps[j] = at.s_ring + j * args.dim + first;
    }
    if (stored == 0) continue;
    const X* const rights[] = {g, widened(steps[stored - 1], count, wide_newest)};
    if (ahead) {
      add_all_dots<2, false, true>(steps, stored, rights, count, lanes + 2 * kAccumulators);
    } else {
      add_all_dots<2, false>(steps, stored, rights, count, lanes + 2 * kAccumulators);
    }
  }
  for (int i = 0; i < 2 * stored + 2; ++i) sums[i] = sum_lanes(lanes + i * kAccumulators);
}

// Stores a step, and makes it what was stored.
template <typename X, typename S>
void store_step(X* __restrict step, int count, S* __restrict to) {
  for (int i = 0; i < count; ++i) {
    to[i] = from_compute<S>(step[i]);
    step[i] = to_compute(to[i]);
  }
}

// Phase 2 on [begin, end) of a row.
template <typename X, typename F, typename S>
void move_to(const BroydenArgs& args, int64_t row, const BroydenDecision& decision, int64_t begin,
             int64_t end) {
  const Row<X, F, S> at(args, row);
  const BroydenPlan& plan = decision.plan;
  X weights[kBroydenMaxMemory];
  for (int j = 0; j < plan.count; ++j) weights[j] = static_cast<X>(decision.weights[j]);
  const X g_weight = static_cast<X>(plan.g_weight);
  const bool ahead = beyond_cache<S>(args, plan.count);
  alignas(64) X out[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    const X* x = at.x + first;
    if (plan.move == BroydenMove::step) {
      residual_block(x, at.f + first, count, out);
      for (int i = 0; i < count; ++i) out[i] *= g_weight;
      const S* from[kBroydenMaxMemory];
      for (int j = 0; j < plan.count; ++j) {
        from[j] = at.s_ring + j * args.dim + first;
      }
      if (ahead) {
        add_combination<true>(out, from, weights, plan.count, count);
      } else {
        add_combination(out, from, weights, plan.count, count);
      }
      store_step(out, count, at.s_ring + plan.count * args.dim + first);
      if (plan.improved) std::copy_n(x, count, at.best + first);
      for (int i = 0; i < count; ++i) out[i] += x[i];
    } else {
      std::copy_n(plan.move == BroydenMove::copy_best ? at.best + first : x, count, out);
    }
    std::copy_n(out, count, at.x_next + first);
    if (at.z_next != nullptr) {
      for (int i = 0; i < count; ++i) at.z_next[first + i] = from_compute<F>(out[i]);
    }
  }
}

// Calls run.operator()<X, F, S>() for the types of the iterate, of f and of the steps.
template <typename Run>
void with_types(const BroydenArgs& args, const Run& run) {
  with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    if constexpr (sizeof(X) == sizeof(float)) {
      if (args.narrow) return run.template operator()<X, F, BFloat16>();
    }
    run.template operator()<X, F, X>();
  });
}

}  // namespace

void broyden_push(const BroydenArgs& args, int64_t first, int64_t last, double* parts) {
  with_types(args, [&]<typename X, typename F, typename S>() {
    const int64_t chunks = step_chunks(args.dim);
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / chunks, begin = item % chunks * kStepChunk;
      if (args.rows.status[row] != kActive) continue;
      push<X, F, S>(args, row, begin, std::min(begin + kStepChunk, args.dim),
                    parts + (item - first) * (2 * args.capacity + 2));
    }
  });
}

void broyden_decide(const BroydenArgs& args, int64_t row, const double* parts,
                    BroydenDecision* decision) {
  decision->plan = {BroydenMove::copy_x, false, 0, 0.0};
  if (args.rows.status[row] != kActive) return;
  const int64_t chunks = step_chunks(args.dim), stride = 2 * args.capacity + 2;
  const int count = static_cast<int>(broyden_history(args, row));
  double sums[2 * kBroydenMaxMemory + 2], dots[kBroydenMaxMemory];
  add_chunks(parts, chunks, stride, 2 * count + 2, sums);
  decision->plan = broyden_plan(args, row, count, sums, dots, decision->weights);
}

void broyden_move(const BroydenArgs& args, int64_t first, int64_t last,
                  const BroydenDecision* decisions) {
  with_types(args, [&]<typename X, typename F, typename S>() {
    const int64_t chunks = step_chunks(args.dim);
    for (int64_t item = last - 1; item >= first; --item) {  // the last one is in the cache yet
      const int64_t row = item / chunks, begin = item % chunks * kStepChunk;
      move_to<X, F, S>(args, row, decisions[row - first / chunks], begin,
                       std::min(begin + kStepChunk, args.dim));
    }
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
