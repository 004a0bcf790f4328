// Slots of a history on their way through shared memory. A thread fetches the packs that it will
// use itself, in the order of their use: no barrier is needed, and the loads go on while a small
// problem is solved.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {

// The packs that one of kThreads threads owns of a tile of a row, a block's width apart.
template <int kThreads, int kWidth, int kPacks>
struct Columns {
  static constexpr int64_t kStride = kThreads * kWidth;
  static constexpr int64_t kTile = kStride * kPacks;
  int64_t first = 0;
  int elements = 0;  // of the tile from there on

  Columns() = default;
  DEQCORE_DEVICE Columns(int thread, int64_t begin, int64_t end)
      : first(begin + thread * kWidth),
        elements(static_cast<int>(end - begin < kTile ? end - begin : kTile) - thread * kWidth) {}
  DEQCORE_DEVICE int64_t at(int pack) const { return first + pack * kStride; }
  DEQCORE_DEVICE bool has(int pack) const { return pack * kStride < elements; }
  DEQCORE_DEVICE int left(int pack) const { return elements - static_cast<int>(pack * kStride); }
};

template <typename S, int kThreads, int kWidth, int kPacks, bool kAligned>
class SlotRing {
 public:
  using Slot = Pack<S, kWidth>;
  using Own = Columns<kThreads, kWidth, kPacks>;
  static constexpr int kStageBytes = kThreads * kPacks * sizeof(Slot);

  DEQCORE_DEVICE SlotRing(void* at, int thread, int stages)
      : own_(static_cast<Slot*>(at) + thread), stages_(stages) {}

  // Starts to fetch this thread's packs of a slot into the next stage. A stage is free again when
  // its slot has been released; `stages` fetches or skips come before the first wait.
  DEQCORE_DEVICE void fetch(const S* slot, const Own& own) {
    Slot* const to = own_ + in_ * (kPacks * kThreads);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (own.has(p)) copy(to + p * kThreads, slot + own.at(p), own.left(p));
    }
    skip();
  }
  DEQCORE_DEVICE void skip() {
    close_copies();
    in_ = in_ + 1 == stages_ ? 0 : in_ + 1;
  }
  DEQCORE_DEVICE void wait() const { wait_for_groups_but(stages_ - 1); }
  DEQCORE_DEVICE Slot pack(int p) const { return own_[(out_ * kPacks + p) * kThreads]; }
  DEQCORE_DEVICE void release() { out_ = out_ + 1 == stages_ ? 0 : out_ + 1; }

 private:
  DEQCORE_DEVICE static void copy(Slot* to, const S* from, int left) {
    if constexpr (kAligned) {
      count_read(sizeof(Slot), false);
      copy_async<sizeof(Slot)>(to, from);
    } else {
      *to = load<false, kWidth>(from, left);
    }
  }

  Slot* own_;
  int stages_;
  int in_ = 0, out_ = 0;
};

}  // namespace deqcore::cuda
