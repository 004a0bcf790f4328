// Fibers, their scheduler, and what CUDA's vocabulary means to them.
#include "emulation/cuda_emulation.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "emulation/contexts.h"
#include "emulation/sectors.h"

namespace emulation {

Index thread_index, block_index, block_size, grid_size;
Traffic traffic;
std::vector<Launch> launches;
bool only_launches = false;
uint64_t seed = 0;
const char* refusal = nullptr;
int largest_cluster = 16;
bool trial = false;

namespace {

constexpr int kWarp = 32;
constexpr int kMostWords = 3;       // of 8 bytes, that a lane brings
constexpr int kMostThreads = 1024;  // of a block
constexpr int kMostBlocks = 16;     // of a cluster

enum class Wait { nothing, block, warp, operation, change, left };

// One CUDA thread of the blocks that run: one, or a cluster's.
struct Fiber : Context {
  int index = 0;  // blocks one after the other
  Wait wait = Wait::nothing;
  unsigned mask = 0;
  WarpOperation operation{};
  int operand = 0;
  uint64_t value = 0;                              // in, then out
  unsigned block_barriers = 0, warp_barriers = 0;  // met so far
  unsigned operations = 0;                         // of its warp
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  std::vector<Copy> copies;                    // asked for and not awaited
  int closed_groups = 0;                       // of copies
  uint64_t brought[kMostWords] = {};           // by this lane to its warp
  uint64_t gathered[kWarp * kMostWords] = {};  // and what all lanes have brought
  int words = 0;
};

// What a word of start_barrier holds.
struct Barrier {
  int16_t due, of_a_phase;  // arrivals
  int32_t bytes : 31;       // to come
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

// Plain memory: ThreadSanitizer would take what the heap does for a race of the kernel.
struct BulkCopy {
  uint64_t* barrier;
  int bytes;
  void (*run)(const uint64_t*);
  uint64_t words[6];
};
constexpr int kMostBulkCopies = 1 << 16;

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  BulkCopy bulk_copies[kMostBulkCopies];  // asked for and not awaited
  int bulk_count = 0;
  Context host;  // what called launch
  Fiber* running = nullptr;
  int threads = 0;           // of a block
  int blocks = 1;            // that run at once
  unsigned first_block = 0;  // of these
  int64_t shared_bytes = 0;
  double* shared_of[kMostBlocks] = {};
  int left_of[kMostBlocks] = {};  // threads that have left
  int cluster_arrived = 0;        // threads, at the barrier of the cluster
  unsigned cluster_phases = 0;    // of that barrier, which are over
  const void* noted = nullptr;    // kernel of the next launch
  const std::function<void()>* kernel = nullptr;
  double* shared = nullptr;  // of the fiber that runs
  uint64_t random = 1;
  std::string error;
  std::vector<char> sync_objects;  // addresses for ThreadSanitizer; their content is nothing

  int count() const { return threads * blocks; }  // fibers
  int block_of(const Fiber& fiber) const { return fiber.index / threads; }
  int thread_of(const Fiber& fiber) const { return fiber.index % threads; }

  uint64_t next_random() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull;
  }
};
Scheduler scheduler;

// Two for the launch, then for each block two for its barrier, two for each warp's and two for its
// cluster's: a thread may arrive at the next barrier before another one has left this one.
constexpr int kObjectsPerBlock = 2 + 2 * 32 + 2;
void* start_object() { return &scheduler.sync_objects[0]; }
void* end_object() { return &scheduler.sync_objects[1]; }
void* barrier_object([[maybe_unused]] unsigned block, int which, unsigned barriers) {
#if defined(EMULATION_TSAN)
  const size_t first = 2 + size_t{block} * kObjectsPerBlock;
#else
  const size_t first = 2;
#endif
  return &scheduler.sync_objects[first + 2 * which + barriers % 2];
}

void yield(bool for_good = false) { switch_contexts(*scheduler.running, scheduler.host, for_good); }

std::string name_of(const Fiber& fiber) {
  return "thread " + std::to_string(scheduler.thread_of(fiber)) + " of block " +
         std::to_string(scheduler.first_block + scheduler.block_of(fiber));
}

void fail(const std::string& what) {
  if (scheduler.error.empty()) scheduler.error = what;
}

void fiber_main() {
  Fiber& self = *scheduler.running;
  finish_switch(self);
  leave_from(start_object());
  (*scheduler.kernel)();
  if (!self.copies.empty()) fail(name_of(self) + " left with copies that it has not awaited");
  if (self.cluster_waits < self.cluster_arrivals) {
    fail(name_of(self) + " left without a wait for its cluster");
  }
  arrive_at(end_object());
  self.wait = Wait::left;
  yield(/*for_good=*/true);
  std::abort();  // never resumed
}

void start(Fiber& fiber) {
  fiber.wait = Wait::nothing;
  fiber.block_barriers = fiber.warp_barriers = fiber.operations = 0;
  fiber.cluster_arrivals = fiber.cluster_waits = 0;
  fiber.copies.clear();
  fiber.closed_groups = 0;
  start_context(fiber, fiber.index, &fiber_main);
  arrive_at(start_object());  // its stack may be newly mapped
}

void make_ready(Fiber& fiber) {
  fiber.wait = Wait::nothing;
  scheduler.ready.push_back(fiber.index);
}

// A barrier in shared memory has changed: who waits at one may look at it again.
void wake() {
  for (int i = 0; i < scheduler.count(); ++i) {
    if (scheduler.fibers[i].wait == Wait::change) make_ready(scheduler.fibers[i]);
  }
}

// Lets a block go on if all its threads wait at the barrier.
void complete_block_barrier(int block) {
  Fiber* const first = &scheduler.fibers[block * scheduler.threads];
  for (int i = 0; i < scheduler.threads; ++i) {
    if (first[i].wait == Wait::left) {
      return fail(name_of(first[i]) + " left before a __syncthreads that others wait at");
    }
    if (first[i].wait != Wait::block) return;
  }
  for (int i = 0; i < scheduler.threads; ++i) make_ready(first[i]);
}

uint64_t result_of(const Fiber& lane, const std::vector<uint64_t>& values) {
  const int self = lane.index % kWarp;
  uint64_t votes = 0;
  switch (lane.operation) {
    case WarpOperation::ballot:
      for (int i = 0; i < kWarp; ++i) {
        if (lane.mask >> i & 1 && values[i] != 0) votes |= uint64_t{1} << i;
      }
      return votes;
    case WarpOperation::gather:
      return 0;
    case WarpOperation::shuffle:
    case WarpOperation::shuffle_xor:
      break;
  }
  const bool is_xor = lane.operation == WarpOperation::shuffle_xor;
  const int source = is_xor ? self ^ lane.operand : lane.operand;
  if (source < 0 || source >= kWarp || !(lane.mask >> source & 1)) {
    fail(name_of(lane) + " shuffles from lane " + std::to_string(source) + ", which takes no part");
    return 0;
  }
  return values[source];
}

// Word by word, which no compiler turns into a call of memcpy: ThreadSanitizer watches that one,
// and would take for a race of the kernel what the scheduler does.
void copy_words(volatile uint64_t* to, const volatile uint64_t* from, int words) {
  for (int i = 0; i < words; ++i) to[i] = from[i];
}

void gather(Fiber* warp) {
  for (int to = 0; to < kWarp; ++to) {
    for (int from = 0; from < kWarp; ++from) {
      copy_words(warp[to].gathered + from * warp[to].words, warp[from].brought, warp[to].words);
    }
  }
}

// Lets a warp's lanes go on if all lanes of the mask wait for the same operation.
void complete_warp(const Fiber& last) {
  Fiber* const warp = &scheduler.fibers[last.index / kWarp * kWarp];
  const int lanes = std::min(kWarp, scheduler.count() - last.index / kWarp * kWarp);
  std::vector<uint64_t> values(kWarp);
  for (int i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    if (i >= lanes || warp[i].wait == Wait::left) {
      return fail(name_of(last) + " waits for lane " + std::to_string(i) +
                  " of its warp, which has left or never was");
    }
    if (warp[i].wait == Wait::nothing || warp[i].wait == Wait::change) return;
    values[i] = warp[i].value;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    const Fiber& lane = warp[i];
    if (lane.wait != last.wait || lane.mask != last.mask ||
        (lane.wait == Wait::operation && lane.operation != last.operation)) {
      return fail(name_of(last) + " and lane " + std::to_string(i) +
                  " of its warp wait at different barriers or operations");
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    if (last.wait == Wait::operation) warp[i].value = result_of(warp[i], values);
  }
  if (last.wait == Wait::operation && last.operation == WarpOperation::gather) gather(warp);
  for (int i = 0; i < kWarp; ++i) {
    if (last.mask >> i & 1) make_ready(warp[i]);
  }
}

// A fiber has stopped: see who may go on.
void after(Fiber& fiber) {
  const int block = scheduler.block_of(fiber);
  switch (fiber.wait) {
    case Wait::block:
      return complete_block_barrier(block);
    case Wait::warp:
    case Wait::operation:
      return complete_warp(fiber);
    case Wait::left:
      ++scheduler.left_of[block];
      for (int i = 0; i < scheduler.threads; ++i) {
        const Fiber& other = scheduler.fibers[block * scheduler.threads + i];
        if (other.wait == Wait::block) return complete_block_barrier(block);
      }
      return;
    case Wait::nothing:
    case Wait::change:
      return;
  }
}

// A block, or those of a cluster, from `first_block` on.
void run_blocks() {
  const int count = scheduler.count();
#if defined(EMULATION_SECTORS)
  sectors_begin_block(count);
#endif
  make_room_for_threads(count);
  make_stacks(std::max(kMostThreads, count));
  std::fill_n(scheduler.left_of, kMostBlocks, 0);
  scheduler.cluster_arrived = 0;
  scheduler.cluster_phases = 0;
  for (int i = 0; i < count; ++i) {
    start(scheduler.fibers[i]);
    make_ready(scheduler.fibers[i]);
  }
  int left = 0;
  while (scheduler.error.empty() && left < count) {
    if (scheduler.ready.empty()) {
      return fail("the threads of block " + std::to_string(scheduler.first_block) +
                  " wait for each other forever");
    }
    const size_t pick =
        seed == 0 ? scheduler.ready.size() - 1 : scheduler.next_random() % scheduler.ready.size();
    Fiber& fiber = scheduler.fibers[scheduler.ready[pick]];
    scheduler.ready[pick] = scheduler.ready.back();
    scheduler.ready.pop_back();
    scheduler.running = &fiber;
    thread_index.x = static_cast<unsigned>(scheduler.thread_of(fiber));
    block_index.x = scheduler.first_block + static_cast<unsigned>(scheduler.block_of(fiber));
    scheduler.shared = scheduler.shared_of[scheduler.block_of(fiber)];
    switch_contexts(scheduler.host, fiber, false);
    after(fiber);
    left += fiber.wait == Wait::left;
  }
}

void end_blocks() {
#if defined(EMULATION_SECTORS)
  sectors_end_block();
#endif
  if (scheduler.error.empty() && scheduler.bulk_count > 0) {
    fail("block " + std::to_string(scheduler.first_block) +
         " left with copies that none has awaited");
  }
  scheduler.bulk_count = 0;
  scheduler.ready.clear();
  for (int i = 0; i < scheduler.count(); ++i) end_context(scheduler.fibers[i]);
#if defined(EMULATION_TSAN)
  free_stacks();  // again, they would look like a race
#endif
}

// Shared memory of the blocks that run at once. Where races are looked for, every block has its
// own, or blocks that happen to reuse memory would seem to race for it.
class SharedMemory {
 public:
  SharedMemory(int64_t blocks, [[maybe_unused]] int at_once, int64_t bytes) : bytes_(bytes) {
#if defined(EMULATION_TSAN)
    buffers_.resize(blocks);
#else
    buffers_.resize(std::min<int64_t>(blocks, at_once));
    used_again_ = true;
#endif
    for (auto& buffer : buffers_) buffer.reset(static_cast<double*>(std::malloc(bytes)));
    for (auto& buffer : buffers_) std::memset(buffer.get(), 0xff, bytes_);
  }
  double* of(int64_t block) {
    double* const buffer = buffers_[block % buffers_.size()].get();
    if (used_again_) std::memset(buffer, 0xff, bytes_);  // NaN
    return buffer;
  }

 private:
  struct Free {
    void operator()(double* at) const { std::free(at); }
  };
  int64_t bytes_;
  bool used_again_ = false;
  std::vector<std::unique_ptr<double, Free>> buffers_;
};

}  // namespace

void count_read(int bytes, bool again) { (again ? traffic.again : traffic.read) += bytes; }
void count_write(int bytes) { traffic.written += bytes; }

double* shared_doubles() { return scheduler.shared; }

int fiber_index() { return scheduler.running->index; }

unsigned meetings() {
  const Fiber& self = *scheduler.running;
  return self.block_barriers + self.warp_barriers + self.operations + self.cluster_arrivals;
}

void note_copy([[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#if defined(EMULATION_SECTORS)
  sectors_copy(from, bytes);
#endif
}

bool copies_at_once() {
#if defined(EMULATION_SECTORS)
  return false;  // what it would read by itself would count
#else
  return seed != 0 && (scheduler.next_random() & 1) != 0;
#endif
}

void copy_later(void* to, const void* from, int bytes) {
  if (from != nullptr) note_copy(from, bytes);
  Fiber& self = *scheduler.running;
  self.copies.push_back({to, from, bytes, self.closed_groups});
}

void close_copies() { ++scheduler.running->closed_groups; }

std::vector<Copy> take_copies() {
  std::vector<Copy> copies;
  copies.swap(scheduler.running->copies);
  return copies;
}

std::vector<Copy> take_groups_but(int pending) {
  Fiber& self = *scheduler.running;
  std::vector<Copy> copies;
  for (const Copy& copy : take_copies()) {  // a thread leaves no storage to the next one
    (copy.group < self.closed_groups - pending ? copies : self.copies).push_back(copy);
  }
  return copies;
}

void start_barrier(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<int16_t>(arrivals);
  const Barrier state{count, count, 0, 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void change_barrier(uint64_t* barrier, int arrivals, int bytes_to_come) {
  arrive_at(barrier);
  Barrier state;
  std::memcpy(&state, barrier, sizeof(state));
  state.due = static_cast<int16_t>(state.due - arrivals);
  state.bytes = state.bytes + bytes_to_come;
  if (state.due < 0) complain("arrives at a barrier that has all its arrivals");
  if (state.due == 0 && state.bytes == 0) {
    state.due = state.of_a_phase;
    state.phase ^= 1u;
  }
  std::memcpy(barrier, &state, sizeof(state));
  wake();
}

void wait_for_barrier(uint64_t* barrier, unsigned parity) {
  for (;;) {
    for (int i = 0; i < scheduler.bulk_count;) {
      if (scheduler.bulk_copies[i].barrier != barrier) {
        ++i;
        continue;
      }
      const BulkCopy copy = scheduler.bulk_copies[i];
      scheduler.bulk_copies[i] = scheduler.bulk_copies[--scheduler.bulk_count];
      leave_from(barrier);
      copy.run(copy.words);
      change_barrier(barrier, 0, -copy.bytes);
    }
    Barrier state;
    std::memcpy(&state, barrier, sizeof(state));
    if (state.phase != parity) break;
    scheduler.running->wait = Wait::change;
    yield();
  }
  leave_from(barrier);
}

void copy_bulk(uint64_t* barrier, int bytes, void (*run)(const uint64_t* words),
               const uint64_t* words, int count) {
  arrive_at(barrier);  // the copy comes after what its thread has seen
  if (scheduler.bulk_count == kMostBulkCopies) return complain("has too many copies under way");
  BulkCopy& copy = scheduler.bulk_copies[scheduler.bulk_count++];
  copy.barrier = barrier;
  copy.bytes = bytes;
  copy.run = run;
  copy_words(copy.words, words, count);
  wake();
}

void sync_block() {
  Fiber& self = *scheduler.running;
  self.wait = Wait::block;
  void* const object = barrier_object(block_index.x, 0, self.block_barriers++);
  arrive_at(object);
  yield();
  leave_from(object);
}

void sync_warp(unsigned mask) {
  Fiber& self = *scheduler.running;
  self.wait = Wait::warp;
  self.mask = mask;
  const int warp = scheduler.thread_of(self) / kWarp;
  void* const object = barrier_object(block_index.x, 1 + warp, self.warp_barriers++);
  arrive_at(object);
  yield();
  leave_from(object);
}

void arrive_at_cluster(bool ordered) {
  Fiber& self = *scheduler.running;
  if (self.cluster_waits < self.cluster_arrivals) {
    return complain("arrives at its cluster again without a wait in between");
  }
  if (ordered) arrive_at(barrier_object(scheduler.first_block, 1 + 32, self.cluster_arrivals));
  ++self.cluster_arrivals;
  if (++scheduler.cluster_arrived < scheduler.count()) return;
  scheduler.cluster_arrived = 0;
  ++scheduler.cluster_phases;
  wake();
}

void wait_for_cluster() {
  Fiber& self = *scheduler.running;
  if (self.cluster_waits == self.cluster_arrivals) {
    return complain("waits for its cluster without an arrival");
  }
  while (scheduler.cluster_phases < self.cluster_arrivals) {
    self.wait = Wait::change;
    yield();
  }
  self.cluster_waits = self.cluster_arrivals;
  leave_from(barrier_object(scheduler.first_block, 1 + 32, self.cluster_arrivals - 1));
}

int rank_in_cluster() { return scheduler.block_of(*scheduler.running); }

void* shared_of_block(int rank, const void* at) {
  const auto offset = static_cast<const char*>(at) - reinterpret_cast<char*>(scheduler.shared);
  if (rank < 0 || rank >= scheduler.blocks || offset < 0 || offset >= scheduler.shared_bytes) {
    complain("looks outside of its cluster's shared memory");
    return scheduler.shared;
  }
  if (scheduler.left_of[rank] > 0) complain("looks into the shared memory of a block that leaves");
  return reinterpret_cast<char*>(scheduler.shared_of[rank]) + offset;
}

// No happens-before: a shuffle moves a value and orders no memory.
uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int operand) {
  Fiber& self = *scheduler.running;
  self.wait = Wait::operation;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.operand = operand;
  ++self.operations;
  if (!(mask >> (self.index % kWarp) & 1)) {
    fail(name_of(self) + " takes part in a warp operation without being in its mask");
  }
  yield();
  return self.value;
}

const uint64_t* gather_warp(const uint64_t* own, int words) {
  Fiber& self = *scheduler.running;
  if (words > kMostWords) std::abort();
  self.words = words;
  copy_words(self.brought, own, words);
  warp_operation(WarpOperation::gather, 0xffffffffu, 0, 0);
  return self.gathered;
}

void complain(const char* what) { fail(name_of(*scheduler.running) + " " + what); }

void note_kernel(const void* kernel) { scheduler.noted = kernel; }

const char* launch(int64_t blocks, int threads, int64_t shared_bytes,
                   const std::function<void()>& kernel, int64_t most_shared, int cluster) {
  if (refusal != nullptr) return refusal;
  launches.push_back({scheduler.noted, blocks, threads, shared_bytes});
  scheduler.error.clear();
  scheduler.threads = threads;
  scheduler.blocks = cluster;
  scheduler.shared_bytes = shared_bytes;
  scheduler.kernel = &kernel;
  scheduler.random = seed * 2 + 1;
  if (blocks > INT32_MAX || threads > kMostThreads || threads % kWarp != 0 ||
      shared_bytes > most_shared || cluster < 1 || cluster > kMostBlocks || blocks % cluster != 0) {
    return "a launch that no GPU would take";
  }
  if (only_launches) return nullptr;
  const int count = scheduler.count();
  while (static_cast<int>(scheduler.fibers.size()) < count) scheduler.fibers.emplace_back();
  for (int i = 0; i < count; ++i) scheduler.fibers[i].index = i;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
#if defined(EMULATION_TSAN)
  scheduler.sync_objects.assign(2 + blocks * kObjectsPerBlock, 0);
#else
  scheduler.sync_objects.assign(2 + kObjectsPerBlock, 0);
#endif
  SharedMemory shared(blocks, cluster, shared_bytes);
  start_host(scheduler.host);
  arrive_at(start_object());

  std::vector<int64_t> order(blocks / cluster);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = blocks / cluster - 1; seed != 0 && i > 0; --i) {
    std::swap(order[i], order[scheduler.next_random() % (i + 1)]);
  }
  for (const int64_t turn : order) {
    scheduler.first_block = static_cast<unsigned>(turn * cluster);
    for (int rank = 0; rank < cluster; ++rank) {
      scheduler.shared_of[rank] = shared.of(turn * cluster + rank);
    }
    run_blocks();
    end_blocks();
    if (!scheduler.error.empty()) return scheduler.error.c_str();
  }
  leave_from(end_object());
  take_threads_again();
  return nullptr;
}

}  // namespace emulation
