// Fibers, their scheduler, and what the sanitizers must know of both.
#include "emulation/cuda_emulation.h"

#include <pthread.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "emulation/sectors.h"

#if defined(EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATION_TSAN)
// This file is compiled without -fsanitize=thread: its own bookkeeping is no part of the kernel.
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulation {

Index thread_index, block_index, block_size, grid_size;
Traffic traffic;
std::vector<Launch> launches;
bool only_launches = false;
uint64_t seed = 0;
const char* refusal = nullptr;
bool trial = false;

namespace {

constexpr int kWarp = 32;
constexpr int kMostWords = 3;  // of 8 bytes, that a lane brings
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostThreads = 1024;  // of a block

enum class Wait { nothing, block, warp, operation, change, left };

// One CUDA thread of the block that runs.
struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* thread = nullptr;      // ThreadSanitizer's
  int index = 0;
  Wait wait = Wait::nothing;
  unsigned mask = 0;
  WarpOperation operation{};
  int operand = 0;
  uint64_t value = 0;                              // in, then out
  unsigned block_barriers = 0, warp_barriers = 0;  // met so far
  unsigned operations = 0;                         // of its warp
  std::vector<Copy> copies;                        // asked for and not awaited
  uint64_t brought[kMostWords] = {};               // by this lane to its warp
  uint64_t gathered[kWarp * kMostWords] = {};      // and what all lanes have brought
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
constexpr int kMostBulkCopies = 256;

struct Scheduler {
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  BulkCopy bulk_copies[kMostBulkCopies];  // asked for and not awaited
  int bulk_count = 0;
  std::vector<void*> old_threads, free_threads;  // ThreadSanitizer's
  char* stacks = nullptr;
  Fiber host;  // what called launch
  Fiber* running = nullptr;
  int threads = 0;
  const void* noted = nullptr;  // kernel of the next launch
  const std::function<void()>* kernel = nullptr;
  double* shared = nullptr;
  uint64_t random = 1;
  std::string error;
  std::vector<char> sync_objects;  // addresses for ThreadSanitizer; their content is nothing

  uint64_t next_random() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull;
  }
};
Scheduler scheduler;

// Two for the launch, then for each block two for its barrier and two for each warp's: a thread may
// arrive at the next barrier before another one has left this one.
constexpr int kObjectsPerBlock = 2 + 2 * 32;
void* start_object() { return &scheduler.sync_objects[0]; }
void* end_object() { return &scheduler.sync_objects[1]; }
void* barrier_object(int which, unsigned barriers) {
#if defined(EMULATION_TSAN)
  const size_t block = 2 + size_t{block_index.x} * kObjectsPerBlock;
#else
  const size_t block = 2;
#endif
  return &scheduler.sync_objects[block + 2 * which + barriers % 2];
}

// Happens-before, as the kernel's own barriers make it: switching fibers makes none.
void arrive_at([[maybe_unused]] void* object) {
#if defined(EMULATION_TSAN)
  __tsan_release(object);
#endif
}
void leave_from([[maybe_unused]] void* object) {
#if defined(EMULATION_TSAN)
  __tsan_acquire(object);
#endif
}

#if defined(__x86_64__)
// Saves the registers that a call preserves, and goes on where `to` stopped.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

void finish_switch([[maybe_unused]] Fiber& fiber) {
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if defined(EMULATION_ASAN)
  static const void* host_bottom = nullptr;
  static size_t host_size = 0;
  if (&from == &scheduler.host && host_bottom == nullptr) {
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &host_size);
    pthread_attr_destroy(&attributes);
    host_bottom = bottom;
  }
  const bool to_host = &to == &scheduler.host;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack,
                                 to_host ? host_bottom : to.stack,
                                 to_host ? host_size : kStackBytes);
#endif
#if defined(EMULATION_TSAN)
  __tsan_switch_to_fiber(to.thread, /*no synchronisation=*/1);
#endif
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  finish_switch(from);
}

void yield(bool for_good = false) { switch_to(*scheduler.running, scheduler.host, for_good); }

std::string name_of(int thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block_index.x);
}

void fail(const std::string& what) {
  if (scheduler.error.empty()) scheduler.error = what;
}

void fiber_main() {
  Fiber& self = *scheduler.running;
  finish_switch(self);
  leave_from(start_object());
  (*scheduler.kernel)();
  if (!self.copies.empty()) fail(name_of(self.index) + " left with copies that it has not awaited");
  arrive_at(end_object());
  self.wait = Wait::left;
  yield(/*for_good=*/true);
  std::abort();  // never resumed
}

void start(Fiber& fiber) {
  if (scheduler.stacks == nullptr) {
    scheduler.stacks =
        static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  fiber.stack = scheduler.stacks + fiber.index * kStackBytes;
#if defined(EMULATION_ASAN)
  // The fiber before left this stack for good, with frames that never returned.
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  fiber.wait = Wait::nothing;
  fiber.block_barriers = fiber.warp_barriers = fiber.operations = 0;
  fiber.copies.clear();
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);  // where switch_stack returns to
  fiber.stack_pointer = top - 6;                // below it, six registers of no meaning
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
#if defined(EMULATION_TSAN)
  if (scheduler.free_threads.empty()) {
    fiber.thread = __tsan_create_fiber(0);
  } else {
    fiber.thread = scheduler.free_threads.back();
    scheduler.free_threads.pop_back();
  }
  arrive_at(start_object());  // the stack is newly mapped
#endif
}

// ThreadSanitizer takes a new thread for the dead one whose number it gets, and would see no race
// between them, so threads live as long as their launch, up to the number that it can keep. The
// next launch, which comes after all that they did, takes them again: to make one costs a
// millisecond.
void destroy_threads() {
#if defined(EMULATION_TSAN)
  for (void* const thread : scheduler.old_threads) __tsan_destroy_fiber(thread);
#endif
  scheduler.old_threads.clear();
}

void end(Fiber& fiber) {
#if defined(EMULATION_TSAN)
  scheduler.old_threads.push_back(fiber.thread);
#else
  (void)fiber;
#endif
}

void make_ready(Fiber& fiber) {
  fiber.wait = Wait::nothing;
  scheduler.ready.push_back(fiber.index);
}

// A barrier in shared memory has changed: who waits at one may look at it again.
void wake() {
  for (int i = 0; i < scheduler.threads; ++i) {
    if (scheduler.fibers[i].wait == Wait::change) make_ready(scheduler.fibers[i]);
  }
}

// Lets the block go on if all its threads wait at the barrier.
void complete_block_barrier() {
  for (const Fiber& fiber : scheduler.fibers) {
    if (fiber.index >= scheduler.threads) break;
    if (fiber.wait == Wait::left) {
      return fail(name_of(fiber.index) + " left before a __syncthreads that others wait at");
    }
    if (fiber.wait != Wait::block) return;
  }
  for (int i = 0; i < scheduler.threads; ++i) make_ready(scheduler.fibers[i]);
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
    fail(name_of(lane.index) + " shuffles from lane " + std::to_string(source) +
         ", which takes no part");
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
  const int lanes = std::min(kWarp, scheduler.threads - last.index / kWarp * kWarp);
  std::vector<uint64_t> values(kWarp);
  for (int i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    if (i >= lanes || warp[i].wait == Wait::left) {
      return fail(name_of(last.index) + " waits for lane " + std::to_string(i) +
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
      return fail(name_of(last.index) + " and lane " + std::to_string(i) +
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
  switch (fiber.wait) {
    case Wait::block:
      return complete_block_barrier();
    case Wait::warp:
    case Wait::operation:
      return complete_warp(fiber);
    case Wait::left:
      for (int i = 0; i < scheduler.threads; ++i) {
        if (scheduler.fibers[i].wait == Wait::block) return complete_block_barrier();
      }
      return;
    case Wait::nothing:
    case Wait::change:
      return;
  }
}

void run_block() {
#if defined(EMULATION_SECTORS)
  sectors_begin_block(scheduler.threads);
#endif
  for (int i = 0; i < scheduler.threads; ++i) {
    start(scheduler.fibers[i]);
    make_ready(scheduler.fibers[i]);
  }
  int left = 0;
  while (scheduler.error.empty() && left < scheduler.threads) {
    if (scheduler.ready.empty()) {
      return fail("the threads of block " + std::to_string(block_index.x) +
                  " wait for each other forever");
    }
    const size_t pick =
        seed == 0 ? scheduler.ready.size() - 1 : scheduler.next_random() % scheduler.ready.size();
    Fiber& fiber = scheduler.fibers[scheduler.ready[pick]];
    scheduler.ready[pick] = scheduler.ready.back();
    scheduler.ready.pop_back();
    scheduler.running = &fiber;
    thread_index.x = fiber.index;
    switch_to(scheduler.host, fiber, false);
    after(fiber);
    left += fiber.wait == Wait::left;
  }
}

void end_block() {
#if defined(EMULATION_SECTORS)
  sectors_end_block();
#endif
  if (scheduler.error.empty() && scheduler.bulk_count > 0) {
    fail("block " + std::to_string(block_index.x) + " left with copies that none has awaited");
  }
  scheduler.bulk_count = 0;
  scheduler.ready.clear();
  for (int i = 0; i < scheduler.threads; ++i) end(scheduler.fibers[i]);
#if defined(EMULATION_TSAN)
  munmap(scheduler.stacks, kMostThreads * kStackBytes);  // again, they would look like a race
  scheduler.stacks = nullptr;
#endif
  if (scheduler.old_threads.size() > 4096) destroy_threads();
}

// Shared memory of each block in turn. Where races are looked for, every block has its own, or
// blocks that happen to reuse memory would seem to race for it.
class SharedMemory {
 public:
  SharedMemory(int64_t blocks, int64_t bytes) : bytes_(bytes) {
#if defined(EMULATION_TSAN)
    buffers_.resize(blocks);
#else
    (void)blocks;
    buffers_.resize(1);
#endif
    for (auto& buffer : buffers_) buffer.reset(static_cast<double*>(std::malloc(bytes)));
    for (auto& buffer : buffers_) std::memset(buffer.get(), 0xff, bytes_);
  }
  double* of(int64_t block) {
    double* const buffer = buffers_[block % buffers_.size()].get();
    if (buffers_.size() == 1) std::memset(buffer, 0xff, bytes_);  // NaN
    return buffer;
  }

 private:
  struct Free {
    void operator()(double* at) const { std::free(at); }
  };
  int64_t bytes_;
  std::vector<std::unique_ptr<double, Free>> buffers_;
};

}  // namespace

void count_read(int bytes, bool again) { (again ? traffic.again : traffic.read) += bytes; }
void count_write(int bytes) { traffic.written += bytes; }

double* shared_doubles() { return scheduler.shared; }

unsigned meetings() {
  const Fiber& self = *scheduler.running;
  return self.block_barriers + self.warp_barriers + self.operations;
}

void note_copy([[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#if defined(EMULATION_SECTORS)
  sectors_copy(from, bytes);
#endif
}

void copy_later(void* to, const void* from) {
  if (from != nullptr) note_copy(from, 16);
  scheduler.running->copies.push_back({to, from});
}

std::vector<Copy> take_copies() {
  std::vector<Copy> copies;
  copies.swap(scheduler.running->copies);
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
  void* const object = barrier_object(0, self.block_barriers++);
  arrive_at(object);
  yield();
  leave_from(object);
}

void sync_warp(unsigned mask) {
  Fiber& self = *scheduler.running;
  self.wait = Wait::warp;
  self.mask = mask;
  void* const object = barrier_object(1 + self.index / kWarp, self.warp_barriers++);
  arrive_at(object);
  yield();
  leave_from(object);
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
    fail(name_of(self.index) + " takes part in a warp operation without being in its mask");
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

void complain(const char* what) { fail(name_of(scheduler.running->index) + " " + what); }

void note_kernel(const void* kernel) { scheduler.noted = kernel; }

const char* launch(int64_t blocks, int threads, int64_t shared_bytes,
                   const std::function<void()>& kernel, int64_t most_shared) {
  if (refusal != nullptr) return refusal;
  launches.push_back({scheduler.noted, blocks, threads, shared_bytes});
  scheduler.error.clear();
  scheduler.threads = threads;
  scheduler.kernel = &kernel;
  scheduler.random = seed * 2 + 1;
  if (blocks > INT32_MAX || threads > kMostThreads || threads % kWarp != 0 ||
      shared_bytes > most_shared) {
    return "a launch that no GPU would take";
  }
  if (only_launches) return nullptr;
  while (static_cast<int>(scheduler.fibers.size()) < threads) scheduler.fibers.emplace_back();
  for (int i = 0; i < threads; ++i) scheduler.fibers[i].index = i;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
#if defined(EMULATION_TSAN)
  scheduler.sync_objects.assign(2 + blocks * kObjectsPerBlock, 0);
#else
  scheduler.sync_objects.assign(2 + kObjectsPerBlock, 0);
#endif
  SharedMemory shared(blocks, shared_bytes);
#if defined(EMULATION_TSAN)
  scheduler.host.thread = __tsan_get_current_fiber();
#endif
  arrive_at(start_object());

  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = blocks - 1; seed != 0 && i > 0; --i) {
    std::swap(order[i], order[scheduler.next_random() % (i + 1)]);
  }
  for (const int64_t block : order) {
    block_index.x = static_cast<unsigned>(block);
    scheduler.shared = shared.of(block);
    run_block();
    end_block();
    if (!scheduler.error.empty()) return scheduler.error.c_str();
  }
  leave_from(end_object());
  scheduler.free_threads.insert(scheduler.free_threads.end(), scheduler.old_threads.begin(),
                                scheduler.old_threads.end());
  scheduler.old_threads.clear();
  return nullptr;
}

}  // namespace emulation
