// A ring of tiles in shared memory: one thread has them copied in, groups of warps multiply them.
#pragma once

#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/team.cuh"

namespace deqcore::cuda {

// Where in the ring one is; all who go round it take the same places in the same order.
template <int kSlots>
struct Place {
  int slot = 0;
  uint32_t round = 0;  // its parity

  DEQCORE_DEVICE void go_on() {
    if (++slot == kSlots) {
      slot = 0;
      round ^= 1u;
    }
  }
};

// kSlots tiles; kCluster: blocks whose rings are filled and emptied together; kReaders: warps of a
// block that read each tile.
template <int kSlots, int kCluster, int kReaders>
struct TileRing {
  char* tiles;     // [kSlots] of kTileBytes, at a multiple of 1024
  Barrier* full;   // [kSlots]
  Barrier* empty;  // [kSlots]
  int* notes;      // [kSlots] what the filler tells the readers of a tile

  static constexpr int64_t kBytes = kSlots * (kTileBytes + 2 * 8 + 4) + 1024;

  DEQCORE_DEVICE explicit TileRing(double* shared) {
    const auto at = reinterpret_cast<uintptr_t>(shared);
    tiles = reinterpret_cast<char*>((at + 1023) / 1024 * 1024);
    full = reinterpret_cast<Barrier*>(tiles + kSlots * kTileBytes);
    empty = full + kSlots;
    notes = reinterpret_cast<int*>(empty + kSlots);
  }

  // By all threads of all blocks, before anything else.
  DEQCORE_DEVICE void start() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kSlots; ++i) {
        start_barrier(&full[i], 1);
        start_barrier(&empty[i], kReaders * kCluster);
      }
      show_barriers();
    }
    if constexpr (kCluster > 1) {
      sync_cluster();
    } else {
      __syncthreads();
    }
  }

  DEQCORE_DEVICE char* tile(const Place<kSlots>& place) const {
    return tiles + place.slot * kTileBytes;
  }

  // By the one thread that fills: waits until the place is free, and says that a tile comes.
  DEQCORE_DEVICE Barrier* fill(const Place<kSlots>& place, int note) const {
    wait_for(&empty[place.slot], place.round ^ 1u);
    notes[place.slot] = note;
    expect_bytes(&full[place.slot], kTileBytes);
    return &full[place.slot];
  }

  // By all threads of a reader: the tile is there.
  DEQCORE_DEVICE int await(const Place<kSlots>& place) const {
    wait_for(&full[place.slot], place.round);
    return notes[place.slot];
  }

  // By all threads of a warp that has read the tile.
  DEQCORE_DEVICE void release(const Place<kSlots>& place) const {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kCluster > 1) {
      if (lane < kCluster) arrive_at(&empty[place.slot], lane);
    } else {
      if (lane == 0) arrive_at(&empty[place.slot]);
    }
  }
};

}  // namespace deqcore::cuda
