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
// enough rows, each thread takes whole rows; else all threads share one row after the other, or, if
// it has too few chunks for that, all rows at once. So a row is moved while caches still hold it.
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
  constexpr int64_t kChunksOfAThread = 2;  // or threads would wait for each other
  const bool row_by_row = chunks >= kChunksOfAThread * torch::stable::get_num_threads();
  const int64_t together = row_by_row ? 1 : batch, grain = kGrain / chunk_cost + 1;
  std::vector<double> parts(together * chunks * width);
  std::vector<Decision> decisions(together);
  for (int64_t row = 0; row < batch; row += together) {
    const int64_t begin = row * chunks, end = (row + together) * chunks;
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
      push(first, last, parts.data() + (first - begin) * width);
    });
    for (int64_t i = 0; i < together; ++i) {
      decide(row + i, parts.data() + i * chunks * width, &decisions[i]);
    }
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
      move(first, last, &decisions[first / chunks - row]);
    });
  }
}

}  // namespace deqcore::cpu
