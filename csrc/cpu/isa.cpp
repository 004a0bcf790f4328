#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace deqcore::cpu {
namespace {

constexpr Isa kNarrowestFirst[] = {Isa::portable, Isa::avx2, Isa::avx512};

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

Isa widest_supported() {
  Isa widest = Isa::portable;
  for (Isa isa : kNarrowestFirst) {
    if (is_supported(isa)) widest = isa;
  }
  return widest;
}

Isa named_isa(const std::string& name) {
  for (Isa isa : kNarrowestFirst) {
    if (name != isa_name(isa)) continue;
    if (is_supported(isa)) return isa;
    throw std::runtime_error("DEQCORE_CPU_ISA=" + name +
                             ": this processor does not have it; the widest it has is " +
                             isa_name(widest_supported()));
  }
  throw std::runtime_error("DEQCORE_CPU_ISA=" + name +
                           " is unknown; use portable, avx2 or avx512, or leave it unset");
}

Isa choose() {
  const char* name = std::getenv("DEQCORE_CPU_ISA");
  return name == nullptr || *name == '\0' ? widest_supported() : named_isa(name);
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace deqcore::cpu
