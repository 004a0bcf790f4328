#include "emulation/sectors.h"

#if defined(EMULATION_SECTORS)

#include <dlfcn.h>

#include <algorithm>
#include <compare>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulation/cuda_emulation.h"

namespace emulation {
namespace {

constexpr int kSector = 32;
constexpr int kWarp = 32;

enum class Kind : int64_t { load, store, copy };

struct Range {
  uintptr_t from, to;
};

// A place of the program: where an address lies in the code, called from another place.
struct Place {
  int parent;
  uintptr_t code;
  auto operator<=>(const Place&) const = default;
};

// What is done there, and to which of the watched ranges.
struct Site {
  int place;
  Kind kind;
  int range;
  auto operator<=>(const Site&) const = default;
};

struct Tally {
  int64_t requests = 0, sectors = 0, bytes = 0;
};

// What a warp's lanes do together: sectors, and which of their bytes.
using Request = std::vector<std::pair<uintptr_t, uint32_t>>;

struct Visits {
  unsigned meetings = 0;
  int count = 0;
};

// A thread of the blocks that run.
struct Thread {
  int place = 0;
  std::unordered_map<int, Visits> visits;  // of a site
};

// A request of the blocks that run.
struct Key {
  int site, warp;
  unsigned meetings;
  int visit;
  bool operator==(const Key&) const = default;
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const auto part : {static_cast<uint64_t>(key.site), static_cast<uint64_t>(key.warp),
                            uint64_t{key.meetings}, static_cast<uint64_t>(key.visit)}) {
      hash = (hash ^ part) * 0x9e3779b97f4a7c15ull;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Counter {
  std::vector<Range> watched;
  std::vector<Place> places{{-1, 0}};
  std::map<Place, int> place_numbers;
  std::vector<Site> sites;
  std::map<Site, int> site_numbers;
  std::vector<Tally> tallies;  // of sites
  std::vector<Thread> threads;
  std::unordered_map<Key, Request, Hash> requests;  // of the blocks that run
  bool running = false;

  int place_of(int parent, const void* code) {
    const Place place{parent, reinterpret_cast<uintptr_t>(code)};
    const auto [found, is_new] = place_numbers.try_emplace(place, static_cast<int>(places.size()));
    if (is_new) places.push_back(place);
    return found->second;
  }

  int site_of(const Site& site) {
    const auto [found, is_new] = site_numbers.try_emplace(site, static_cast<int>(sites.size()));
    if (is_new) {
      sites.push_back(site);
      tallies.emplace_back();
    }
    return found->second;
  }

  int range_of(uintptr_t at) const {
    const auto found = std::find_if(watched.begin(), watched.end(), [=](const Range& range) {
      return at >= range.from && at < range.to;
    });
    return found == watched.end() ? -1 : static_cast<int>(found - watched.begin());
  }

  void access(Kind kind, const void* address, int64_t bytes, const void* code) {
    if (!running) return;
    const auto at = reinterpret_cast<uintptr_t>(address);
    const int range = range_of(at);
    if (range < 0) return;
    Thread& thread = threads[fiber_index()];
    const int site = site_of({place_of(thread.place, code), kind, range});
    Visits& visits = thread.visits[site];
    const unsigned met = meetings();
    if (visits.meetings != met) visits = {met, 0};
    const int warp = fiber_index() / kWarp;
    Request& request = requests[{site, warp, met, visits.count++}];
    for (uintptr_t from = at, end = at + static_cast<uintptr_t>(bytes); from < end;) {
      const uintptr_t next = std::min(end, (from / kSector + 1) * kSector);
      const uint64_t used = (uint64_t{1} << (next - from)) - 1;
      add(request, from / kSector, static_cast<uint32_t>(used << from % kSector));
      from = next;
    }
  }

  static void add(Request& request, uintptr_t sector, uint32_t used) {
    // The sector touched last comes first: lanes lie side by side.
    for (auto it = request.rbegin(); it != request.rend(); ++it) {
      if (it->first != sector) continue;
      it->second |= used;
      return;
    }
    request.emplace_back(sector, used);
  }

  void end_block() {
    for (const auto& [key, request] : requests) {
      Tally& tally = tallies[key.site];
      ++tally.requests;
      tally.sectors += static_cast<int64_t>(request.size());
      for (const auto& [sector, used] : request) tally.bytes += __builtin_popcount(used);
    }
    requests.clear();
    running = false;
  }
};
Counter counter;

}  // namespace

void sectors_watch(const void* from, int64_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(from);
  counter.watched.push_back({at, at + static_cast<uintptr_t>(bytes)});
}

void sectors_forget() { counter = {}; }

void sectors_copy(const void* from, int bytes) {
  counter.access(Kind::copy, from, bytes, __builtin_return_address(0));
}

void sectors_begin_block(int threads) {
  counter.threads.assign(threads, {});
  counter.running = true;
}

void sectors_end_block() { counter.end_block(); }

}  // namespace emulation

extern "C" {

void emulate_watch(const void* from, int64_t bytes) { emulation::sectors_watch(from, bytes); }
void emulate_forget() { emulation::sectors_forget(); }

// For each site: its kind, the range watched (by number), requests, sectors and bytes used, then
// how many calls lead to it and these, innermost first, as distances from the library's beginning.
// Returns how many numbers that makes; it writes no more than there is room for.
int64_t emulate_sectors(int64_t* out, int64_t room) {
  using emulation::counter;
  Dl_info library{};
  dladdr(reinterpret_cast<const void*>(&emulate_sectors), &library);
  const auto base = reinterpret_cast<uintptr_t>(library.dli_fbase);
  int64_t count = 0;
  const auto put = [&](int64_t number) {
    if (count < room) out[count] = number;
    ++count;
  };
  for (size_t i = 0; i < counter.sites.size(); ++i) {
    const auto& [place, kind, range] = counter.sites[i];
    const emulation::Tally& tally = counter.tallies[i];
    put(static_cast<int64_t>(kind));
    put(range);
    put(tally.requests);
    put(tally.sectors);
    put(tally.bytes);
    int64_t depth = 0;
    for (int at = place; at > 0; at = counter.places[at].parent) ++depth;
    put(depth);
    for (int at = place; at > 0; at = counter.places[at].parent) {
      put(static_cast<int64_t>(counter.places[at].code - base));
    }
  }
  return count;
}

// What a compiler calls for ThreadSanitizer.
#define CODE __builtin_return_address(0)
#define ACCESSES(bytes)                                                 \
  void __tsan_read##bytes(void* at) {                                   \
    emulation::counter.access(emulation::Kind::load, at, bytes, CODE);  \
  }                                                                     \
  void __tsan_write##bytes(void* at) {                                  \
    emulation::counter.access(emulation::Kind::store, at, bytes, CODE); \
  }                                                                     \
  void __tsan_unaligned_read##bytes(void* at) {                         \
    emulation::counter.access(emulation::Kind::load, at, bytes, CODE);  \
  }                                                                     \
  void __tsan_unaligned_write##bytes(void* at) {                        \
    emulation::counter.access(emulation::Kind::store, at, bytes, CODE); \
  }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* at, unsigned long bytes) {
  emulation::counter.access(emulation::Kind::load, at, static_cast<int64_t>(bytes), CODE);
}
void __tsan_write_range(void* at, unsigned long bytes) {
  emulation::counter.access(emulation::Kind::store, at, static_cast<int64_t>(bytes), CODE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void* code) {
  auto& counter = emulation::counter;
  if (!counter.running) return;
  auto& thread = counter.threads[emulation::fiber_index()];
  thread.place = counter.place_of(thread.place, code);
}
void __tsan_func_exit() {
  auto& counter = emulation::counter;
  if (!counter.running) return;
  auto& thread = counter.threads[emulation::fiber_index()];
  thread.place = std::max(0, counter.places[thread.place].parent);
}
#define ATOMIC(bits, type, name, builtin)                                 \
  type __tsan_atomic##bits##_##name(volatile type* at, type value, int) { \
    return builtin(at, value, __ATOMIC_RELAXED);                          \
  }
ATOMIC(32, int, fetch_sub, __atomic_fetch_sub)
ATOMIC(32, int, fetch_add, __atomic_fetch_add)
ATOMIC(32, unsigned, fetch_or, __atomic_fetch_or)
}

#endif
