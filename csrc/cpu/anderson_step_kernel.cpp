// anderson_step on rows: push, plan, mix. Compiled once per instruction set; no torch.
#include <algorithm>
#include <cstdint>

#include "cpu/anderson_step.h"
#include "cpu/prefetch.h"
#include "cpu/reductions.h"

namespace deqcore::cpu::DEQCORE_ISA {
namespace {

template <typename X, typename F>
struct Row {
  const X* x;
  const F* f;
  X* g_ring;
  X* h_ring;
  X* best;
  X* x_next;
  F* z_next;

  Row(const AndersonArgs& args, int64_t row) {
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

// The slot of an active row's coming step.
int64_t next_slot(const AndersonArgs& args, int64_t row) {
  return args.rows.counters[row * kCounters + kSteps] % args.memory;
}

template <typename X>
void copy_best_out(X* best, const X* g, const X* h, X damping, int count) {
  for (int i = 0; i < count; ++i) best[i] = h[i] - damping * g[i];
}

// Stores g and h of one block, and f as X where it is not X already.
template <typename X, typename F>
void push_block(const X* __restrict x, const F* __restrict f, X damping, int count,
                X* __restrict g_slot, X* __restrict h_slot, X* __restrict wide_f) {
  for (int i = 0; i < count; ++i) {
    const X value = to_compute(f[i]);
    const X g = value - to_compute(from_compute<F>(x[i]));  // f was evaluated at x as F
    g_slot[i] = g;
    h_slot[i] = x[i] + damping * g;
    if constexpr (sizeof(F) != sizeof(X)) wide_f[i] = value;
  }
}

// Phase 1 on [begin, end) of a row. sums: |f|^2, then g . g_i of the newest `history` slots by age.
template <typename X, typename F>
void push(const AndersonArgs& args, int64_t row, int64_t begin, int64_t end, double* sums) {
  const Row<X, F> at(args, row);
  const int64_t dim = args.dim, memory = args.memory, slot = next_slot(args, row);
  const int history = static_cast<int>(anderson_history(args, row));
  const bool evict = anderson_evicts_best(args, row);
  const int64_t step = args.rows.counters[row * kCounters + kSteps] + 1;
  const X damping = static_cast<X>(damping_at(args.damping, args.damping_length, step));
  const X old_damping =
      static_cast<X>(damping_at(args.damping, args.damping_length, step - memory));

  // The mix reads h as soon as this row's sums are known: have it in the cache by then, where it
  // fits but is not there already.
  const int64_t row_bytes = memory * dim * static_cast<int64_t>(sizeof(X));
  const bool prefetch = row_bytes <= kCacheable && 2 * row_bytes * args.batch > kCacheable;
  alignas(64) double lanes[(kAndersonMaxMemory + 1) * kAccumulators];
  std::fill_n(lanes, (history + 1) * kAccumulators, 0.0);
  alignas(64) X wide_f[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    X* g_slot = at.g_ring + slot * dim + first;
    X* h_slot = at.h_ring + slot * dim + first;
    if (evict) copy_best_out(at.best + first, g_slot, h_slot, old_damping, count);
    push_block(at.x + first, at.f + first, damping, count, g_slot, h_slot, wide_f);
    const X* f = wide_f;
    if constexpr (sizeof(F) == sizeof(X)) f = at.f + first;
    add_square(f, count, lanes);
    const X* residuals[kAndersonMaxMemory];
    for (int age = 0; age < history; ++age) {
      const int64_t other = (slot + memory - age) % memory;
      residuals[age] = at.g_ring + other * dim + first;
      if (prefetch) fetch_ahead(at.h_ring + other * dim + first, count);
    }
    add_all_dots<1, true>(residuals, history, residuals, count, lanes + kAccumulators);
  }
  for (int64_t i = 0; i <= history; ++i) sums[i] = sum_lanes(lanes + i * kAccumulators);
}

// Between the phases: the Gram matrix, the row's status, and its mixing weights by age.
AndersonPlan plan(const AndersonArgs& args, int64_t row, const double* sums, double* alpha) {
  const int64_t memory = args.memory, slot = next_slot(args, row);
  const int history = static_cast<int>(anderson_history(args, row));
  double* gram = args.gram + row * memory * memory;
  for (int age = 0; age < history; ++age) {
    const int64_t other = (slot + memory - age) % memory;
    gram[slot * memory + other] = gram[other * memory + slot] = sums[1 + age];
  }
  AndersonPlan move = anderson_plan(args, row, history, sums[1], sums[0]);
  if (move.move != AndersonMove::mix) return move;
  move.slot = static_cast<int32_t>(slot);

  const auto by_age = [&](int a, int b) {
    return gram[(slot + memory - a) % memory * memory + (slot + memory - b) % memory];
  };
  const AndersonOptions& options = args.options;
  if (history <= 8) {
    anderson_weights<8>(by_age, history, options.ridge, options.max_weight, alpha);
  } else {
    anderson_weights<kAndersonMaxMemory>(by_age, history, options.ridge, options.max_weight, alpha);
  }
  int32_t mixed = 0;
  for (int age = 0; age < history; ++age) mixed += alpha[age] != 0;
  args.rows.counters[row * kCounters + kMixed] = mixed;
  return move;
}

// Phase 2 on [begin, end) of a row.
template <typename X, typename F>
void move_to(const AndersonArgs& args, int64_t row, const AndersonPlan& plan, const double* alpha,
             int64_t begin, int64_t end) {
  const Row<X, F> at(args, row);
  const int64_t dim = args.dim, memory = args.memory;
  const X* sources[kAndersonMaxMemory];
  X weights[kAndersonMaxMemory];
  int terms = 0;
  if (plan.move == AndersonMove::mix) {
    const int history = args.rows.counters[row * kCounters + kHistory];
    for (int64_t slot = 0; slot < memory; ++slot) {
      const int64_t age = (plan.slot + memory - slot) % memory;
      if (age >= history || alpha[age] == 0) continue;  // never a zero weight: 0 * NaN is NaN
      sources[terms] = at.h_ring + slot * dim;
      weights[terms++] = static_cast<X>(alpha[age]);
    }
  }
  alignas(64) X out[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    const X* g = at.g_ring + plan.slot * dim + first;
    const X* h = at.h_ring + plan.slot * dim + first;
    const X* from[kAndersonMaxMemory];
    switch (plan.move) {
      case AndersonMove::copy_x:
        std::copy_n(at.x + first, count, out);
        break;
      case AndersonMove::best_in_ring:
        copy_best_out(out, g, h, static_cast<X>(plan.damping), count);
        break;
      case AndersonMove::best_kept:
        std::copy_n(at.best + first, count, out);
        break;
      case AndersonMove::plain_in_ring:
        std::copy_n(h, count, out);
        break;
      case AndersonMove::mix:
        std::fill_n(out, count, X{0});
        for (int j = 0; j < terms; ++j) from[j] = sources[j] + first;
        add_combination(out, from, weights, terms, count);
        break;
    }
    std::copy_n(out, count, at.x_next + first);
    if (at.z_next != nullptr) {
      for (int i = 0; i < count; ++i) at.z_next[first + i] = from_compute<F>(out[i]);
    }
  }
}

}  // namespace

void anderson_push(const AndersonArgs& args, int64_t first, int64_t last, double* parts) {
  with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    const int64_t chunks = step_chunks(args.dim);
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / chunks, begin = item % chunks * kStepChunk;
      if (args.rows.status[row] != kActive) continue;
      push<X, F>(args, row, begin, std::min(begin + kStepChunk, args.dim),
                 parts + (item - first) * (args.memory + 1));
    }
  });
}

void anderson_decide(const AndersonArgs& args, int64_t row, const double* parts,
                     AndersonDecision* decision) {
  decision->plan = {AndersonMove::copy_x, 0, 0.0};
  if (args.rows.status[row] != kActive) return;
  double sums[kAndersonMaxMemory + 1];
  const int64_t chunks = step_chunks(args.dim), stride = args.memory + 1;
  add_chunks(parts, chunks, stride, anderson_history(args, row) + 1, sums);
  decision->plan = plan(args, row, sums, decision->alpha);
}

void anderson_move(const AndersonArgs& args, int64_t first, int64_t last,
                   const AndersonDecision* decisions) {
  with_dtype(args.type, [&]<typename F>() {
    using X = Compute<F>;
    const int64_t chunks = step_chunks(args.dim);
    for (int64_t item = last - 1; item >= first; --item) {  // the last one is in the cache yet
      const int64_t row = item / chunks, begin = item % chunks * kStepChunk;
      const AndersonDecision& decision = decisions[row - first / chunks];
      move_to<X, F>(args, row, decision.plan, decision.alpha, begin,
                    std::min(begin + kStepChunk, args.dim));
    }
  });
}

}  // namespace deqcore::cpu::DEQCORE_ISA
