// What a test tells the emulated bindings.
#include <cstdint>
#include <map>
#include <string>

#include "emulation/cuda_emulation.h"
#include "emulation/torch_device.h"

namespace emulation {
namespace {

std::map<const void*, int32_t> places;
std::string last_refusal;

}  // namespace

int32_t place_of(const void* data, int32_t otherwise) {
  const auto found = places.find(data);
  return found == places.end() ? otherwise : found->second;
}

}  // namespace emulation

#define EXPORTED extern "C" [[gnu::visibility("default")]]

// The order of threads and blocks from here on.
EXPORTED void emulate_seed(uint64_t seed) { emulation::seed = seed; }

// Counts the memory at `data` as a GPU's with that number, or as the CPU's where it is negative.
EXPORTED void emulate_place(const void* data, int32_t gpu) { emulation::places[data] = gpu; }

// Lets every launch fail with these words; null: with none.
EXPORTED void emulate_refusal(const char* words) {
  emulation::last_refusal = words == nullptr ? "" : words;
  emulation::refusal = words == nullptr ? nullptr : emulation::last_refusal.c_str();
}

// How many launches there were since the last emulate_as_usual.
EXPORTED int64_t emulate_launch_count() { return static_cast<int64_t>(emulation::launches.size()); }

EXPORTED void emulate_trial() { emulation::trial = true; }

// Forgets all that the functions above have said.
EXPORTED void emulate_as_usual() {
  emulation::places.clear();
  emulation::launches.clear();
  emulate_refusal(nullptr);
  emulate_seed(0);
  emulation::trial = false;
}
