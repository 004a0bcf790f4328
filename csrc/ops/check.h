// Errors, whose messages pass no stream. Where libstdc++ is linked into an extension (conda's and
// manylinux's toolchains do so), there are two in the process, and the second one's streams have no
// facet for numbers: one in a message ends it there, or ends the process.
#pragma once

#include <charconv>
#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>

namespace deqcore {

inline void append(std::string& text, std::string_view part) { text += part; }

template <std::integral Integer>
void append(std::string& text, Integer number) {
  char digits[24];
  text.append(digits, std::to_chars(digits, digits + sizeof(digits), number).ptr);
}

// Throws what torch raises as a RuntimeError, with the parts (texts and integers) as its message.
template <typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

}  // namespace deqcore

// A macro, so that the message's parts are made only when it is needed.
#define DEQCORE_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::deqcore::fail(__VA_ARGS__); \
  } while (false)
