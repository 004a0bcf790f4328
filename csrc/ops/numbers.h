// The numbers of a step op (tolerances, limits, the solver's options), named once: the list gives
// the struct, the order in which Python writes them into the op's one float64 tensor, and the names
// that build_info()["numbers"] tells Python.
//
//     #define DEQCORE_FOO_OPTIONS(number) number(double, ridge) number(int64_t, start)
//     DEQCORE_NUMBERS(FooOptions, DEQCORE_FOO_OPTIONS)  // struct FooOptions { double ridge; ...
//
// One tensor on the CPU, whatever the device: a tensor crosses the dispatcher in less time than a
// number does, and nine of them would be most of a small step.
#pragma once

#include <cstdint>

#define DEQCORE_NUMBER_FIELD_(type, name) type name;
#define DEQCORE_NUMBER_READ_(type, name) static_cast<type>(*from++),
#define DEQCORE_NUMBER_COUNT_(type, name) +1
#define DEQCORE_NUMBER_NAME_(type, name) #name " "

#define DEQCORE_NUMBERS(Name, LIST)                                               \
  struct Name {                                                                   \
    LIST(DEQCORE_NUMBER_FIELD_)                                                   \
    static constexpr int64_t kCount = LIST(DEQCORE_NUMBER_COUNT_);                \
    static constexpr const char* kNames = LIST(DEQCORE_NUMBER_NAME_);             \
    static Name read(const double* from) { return {LIST(DEQCORE_NUMBER_READ_)}; } \
  };
