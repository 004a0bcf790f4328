// How the CPU bindings of the step ops spread work over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/step_chunks.h"
#include "ops/rows.h"
#include "ops/torch.h"

namespace deqcore::cpu {

inline void count_remaining(const Rows& rows, int64_t batch) {
  int32_t active = 0;
  for (int64_t row = 0; row < batch; ++row) active += rows.status[row] == kActive;
  *rows.remaining = active;
}

// Runs a step's three parts: push(first, last, parts) and move(first, last, decisions) on items
// (chunks of rows), decide(row, parts, decision) in between. `parts` points at the sums of the
// first item, `width` numbers each, and `decisions` at the decision of the first item's row. With
// enough rows, each thread takes whole rows, so that a row stays in its cache from part to part;
// else all threads share every row.
template <typename Decision, typename Push, typename Decide, typename Move>
void run_step(int64_t batch, int64_t dim, int64_t width, int64_t touched, const Push& push,
              const Decide& decide, const Move& move) {
  constexpr int64_t kGrain = 1 << 17;  // elements for which a thread is worth waking
  const int64_t chunks = step_chunks(dim);
  const int64_t chunk_cost = touched * (dim < kStepChunk ? dim : kStepChunk) + 1;
  if (chunks == 1 || batch >= 16) {
    const int64_t grain = kGrain / (chunk_cost * chunks) + 1;
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> parts(chunks * width);
      Decision decision;
      for (int64_t row = begin; row < end; ++row) {
        push(row * chunks, (row + 1) * chunks, parts.data());
        decide(row, parts.data(), &decision);
        move(row * chunks, (row + 1) * chunks, &decision);
      }
    });
    return;
  }
  const int64_t grain = kGrain / chunk_cost + 1;
  std::vector<double> parts(batch * chunks * width);
  std::vector<Decision> decisions(batch);
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    push(first, last, parts.data() + first * width);
  });
  for (int64_t row = 0; row < batch; ++row) {
    decide(row, parts.data() + row * chunks * width, &decisions[row]);
  }
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    move(first, last, &decisions[first / chunks]);
  });
}

}  // namespace deqcore::cpu
