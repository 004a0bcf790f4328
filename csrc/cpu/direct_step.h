// Steps of one solve without the dispatcher, which takes as long as a small step to pass fourteen
// tensors on: what all steps share is told once, as addresses. deqcore/solvers/_direct.py says
// when.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/anderson_step.h"
#include "cpu/broyden_step.h"

namespace deqcore::cpu {

// Addresses of tensors, and of a solve's numbers; 0 is null.
class Addresses {
 public:
  explicit Addresses(const std::vector<uintptr_t>& all) : next_(all.data()) {}

  template <typename T>
  Addresses& operator>>(T*& pointer) {
    pointer = reinterpret_cast<T*>(*next_++);
    return *this;
  }

  Addresses& operator>>(Rows& rows) {
    return *this >> rows.status >> rows.counters >> rows.residuals >> rows.remaining;
  }

 private:
  const uintptr_t* next_;
};

// What the op's arguments hold beside x, f, x_next and z_next: `addresses` in the order of the op's
// schema, damping to remaining, then options; `sizes`: dtype (deqcore::Dtype) and the length of
// damping, then the sizes of the history, batch, slots and dim. The caller keeps all of it alive,
// and has had the op check its like.
inline AndersonArgs direct_args(const std::vector<uintptr_t>& addresses,
                                const std::vector<int64_t>& sizes, AndersonArgs*) {
  AndersonArgs args = {};
  const double* numbers = nullptr;
  Addresses(addresses) >> args.damping >> args.g_ring >> args.h_ring >> args.gram >> args.best >>
      args.rows >> numbers;
  args.type = static_cast<Dtype>(sizes[0]);
  args.damping_length = sizes[1];
  args.batch = sizes[2];
  args.memory = sizes[3];
  args.dim = sizes[4];
  args.limits = RowLimits::read(numbers);
  args.options = AndersonOptions::read(numbers + RowLimits::kCount);
  return args;
}

inline BroydenArgs direct_args(const std::vector<uintptr_t>& addresses,
                               const std::vector<int64_t>& sizes, BroydenArgs*) {
  BroydenArgs args = {};
  const double* numbers = nullptr;
  Addresses(addresses) >> args.damping >> args.s_ring >> args.gram >> args.best >> args.rows >>
      numbers;
  args.type = static_cast<Dtype>(sizes[0]);
  args.damping_length = sizes[1];
  args.batch = sizes[2];
  args.capacity = sizes[3];
  args.dim = sizes[4];
  args.narrow = sizes[5] != 0;
  args.limits = RowLimits::read(numbers);
  args.memory = BroydenOptions::read(numbers + RowLimits::kCount).memory;
  return args;
}

template <typename Args, void (*run)(const Args&)>
class DirectStep {
 public:
  DirectStep(const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& sizes)
      : args_(direct_args(addresses, sizes, static_cast<Args*>(nullptr))) {}

  void step(uintptr_t x, uintptr_t f, uintptr_t x_next, uintptr_t z_next) {
    args_.x = reinterpret_cast<const void*>(x);
    args_.f = reinterpret_cast<const void*>(f);
    args_.x_next = reinterpret_cast<void*>(x_next);
    args_.z_next = reinterpret_cast<void*>(z_next);
    run(args_);
  }

 private:
  Args args_;
};

using DirectAnderson = DirectStep<AndersonArgs, run_anderson_step>;
using DirectBroyden = DirectStep<BroydenArgs, run_broyden_step>;

}  // namespace deqcore::cpu
