// LibTorch's stable ABI; nothing else of csrc includes its headers. They report what fails with
// numbers in streams (ops/check.h says what that does), so their checks are ours here.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string_view>

#include "ops/check.h"

// What failed in torch, from 2.13 on; null in an older one.
extern "C" [[gnu::weak, gnu::visibility("default")]] const char*
torch_exception_get_what_without_backtrace();

namespace deqcore {

// `call` is the call's text.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail_in_torch(std::string_view call) {
  const std::string_view name = call.substr(0, call.find('('));
  if (torch_exception_get_what_without_backtrace == nullptr) {
    fail(name, " failed in torch; the reason is on standard error");
  }
  fail(torch_exception_get_what_without_backtrace(), " (", name, " failed in torch)");
}

}  // namespace deqcore

#undef STD_TORCH_CHECK
#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STD_TORCH_CHECK(condition, ...)                                           \
  if (!(condition)) {                                                             \
    ::deqcore::fail("torch expected " #condition __VA_OPT__(": ", ) __VA_ARGS__); \
  }
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    ::deqcore::fail_in_torch(#call); \
  }
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
