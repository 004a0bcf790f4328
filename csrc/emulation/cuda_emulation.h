// CUDA's vocabulary for a C++ compiler, so that a kernel file runs on a CPU: correctness without a
// GPU. One fiber is one CUDA thread; it runs until it meets its block or its warp at a barrier or a
// warp operation, and then another, picked at random, goes on. Include nothing of CUDA beside it.
//
// It tells of: threads that wait for each other forever, a thread that leaves before a barrier, a
// warp operation whose mask names lanes that take no part, reads of shared memory never written (it
// starts out as NaN). Compiled with a sanitizer, also of accesses out of bounds and of data races,
// within a block and between blocks; and of clusters: reads of a block's shared memory that has
// left or been passed by. It cannot tell: time, the GPU's weaker memory order, textures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the fiber that runs.
extern Index thread_index, block_index, block_size, grid_size;

// Bytes of state that kernels have read, read again from what should be a cache, and written, as
// they count them themselves.
struct Traffic {
  int64_t read = 0, again = 0, written = 0;
};
extern Traffic traffic;
void count_read(int bytes, bool again);
void count_write(int bytes);

// What has been launched.
struct Launch {
  const void* kernel;
  int64_t blocks, threads, shared_bytes;
};
extern std::vector<Launch> launches;
// Which kernel the next launch is of; it is only kept.
void note_kernel(const void* kernel);
// Kernels are launched and not run.
extern bool only_launches;

// Decides the order of blocks and threads.
extern uint64_t seed;

// What every launch answers in place of running its kernel; null: it runs.
extern const char* refusal;

// Blocks that a cluster can have.
extern int largest_cluster;

extern bool trial;  // whether the paths on trial are taken, Hopper's too

// Runs a kernel; null, or what it did wrong (valid until the next launch).
// `most_shared`: bytes of shared memory that a block may have, by default what sm_80 gives.
constexpr int64_t kMostShared = 99 * 1024;
// `cluster`: blocks that run at once and can read each other's shared memory.
const char* launch(int64_t blocks, int threads, int64_t shared_bytes,
                   const std::function<void()>& kernel, int64_t most_shared = kMostShared,
                   int cluster = 1);

// The block's shared memory: exactly the bytes of the launch, so that a sanitizer sees their end.
double* shared_doubles();

// For the count of sectors: a copy to shared memory reads these neighbouring bytes. copy_later says
// so itself.
void note_copy(const void* from, int bytes);

// A copy to shared memory that may arrive at once or as late as when its thread waits for it. Here
// the seed decides; with 0, all are late.
bool copies_at_once();
struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  int group;  // how many groups its thread had closed before it
};
void copy_later(void* to, const void* from, int bytes);
void close_copies();
std::vector<Copy> take_copies();
// Those of closed groups but the newest `pending` ones.
std::vector<Copy> take_groups_but(int pending);

// Hopper's barrier in shared memory, one word (mbarrier): a phase is over when `arrivals` have come
// and all bytes that were announced. Who waits acquires what was written before it.
void start_barrier(uint64_t* barrier, int arrivals);
void change_barrier(uint64_t* barrier, int arrivals, int bytes_to_come);
void wait_for_barrier(uint64_t* barrier, unsigned parity);
// A copy by an engine of its own, which then tells the barrier. It may arrive as late as when a
// thread waits at that barrier; and here does. `run` gets `words`, at most six, back.
void copy_bulk(uint64_t* barrier, int bytes, void (*run)(const uint64_t* words),
               const uint64_t* words, int count);
template <typename Copy>
void copy_bulk(uint64_t* barrier, int bytes, const Copy& copy) {
  constexpr int kWords = (sizeof(Copy) + 7) / 8;
  static_assert(kWords <= 6 && std::is_trivially_copyable_v<Copy>);
  uint64_t words[kWords] = {};
  std::memcpy(words, &copy, sizeof(Copy));
  copy_bulk(
      barrier, bytes, [](const uint64_t* at) { (*reinterpret_cast<const Copy*>(at))(); }, words,
      kWords);
}

// All threads of a cluster meet in two parts: what came before an arrival that is `ordered` is seen
// after a wait.
void arrive_at_cluster(bool ordered);
void wait_for_cluster();
int rank_in_cluster();
// Where `at`, in this block's shared memory, is in that of a block of the cluster.
void* shared_of_block(int rank, const void* at);

// Which of the fibers that run at once this is.
int fiber_index();

void sync_block();
void sync_warp(unsigned mask);

enum class WarpOperation { shuffle, shuffle_xor, ballot, gather };
// Meets the lanes of `mask`; the result is the value of lane `operand`, of this lane ^ `operand`,
// or a bit for each lane with a value other than zero.
uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int operand);

// Meets the whole warp: at most three words from each lane, lane after lane. Good until the next
// gathering.
const uint64_t* gather_warp(const uint64_t* own, int words);

// Stops the launch with a message about the thread that runs.
void complain(const char* what);

template <typename T>
T exchange(WarpOperation operation, unsigned mask, T value, int operand) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(operation, mask, bits, operand);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size

using std::fabs;
using std::fma;
using std::sqrt;
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }

inline void __syncthreads() { ::emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulation::sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return ::emulation::exchange(::emulation::WarpOperation::shuffle, mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return ::emulation::exchange(::emulation::WarpOperation::shuffle_xor, mask, value, distance);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  constexpr auto operation = ::emulation::WarpOperation::ballot;
  return static_cast<unsigned>(::emulation::warp_operation(operation, mask, predicate != 0, 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Relaxed, as on the GPU: an atomic orders nothing else.
inline unsigned atomicOr(unsigned* address, unsigned bits) {
  return __atomic_fetch_or(address, bits, __ATOMIC_RELAXED);
}
inline int atomicSub(int* address, int value) {
  return __atomic_fetch_sub(address, value, __ATOMIC_RELAXED);
}
