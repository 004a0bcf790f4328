// Asking for memory before it is read. Include in kernels only.
#pragma once

#include <cstdint>

namespace deqcore::cpu::DEQCORE_ISA {

constexpr int64_t kCacheable = 1 << 19;  // bytes that a core's own cache can hold for a while

// Asks for memory that will be read soon, by the line of 64 bytes.
template <typename T>
inline void fetch_ahead(const T* from, int count) {
  for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(T)))
    __builtin_prefetch(from + i, 0, 2);
}

// Fetches a matrix into the cache line by line, spread over other work.
class Ahead {
 public:
  Ahead(const void* from, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t calls)
      : line_(static_cast<const char*>(from)),
        skip_(stride_bytes - row_bytes),
        row_bytes_(row_bytes),
        row_end_(line_ + row_bytes),
        end_(rows > 0 ? line_ + (rows - 1) * stride_bytes + row_bytes : line_),
        lines_(calls > 0 ? (rows * (row_bytes / 64 + 1) + calls - 1) / calls : 0) {}

  template <bool kToWrite>
  [[gnu::always_inline]] void fetch() {
    for (int64_t i = 0; i < lines_ && line_ < end_; ++i) {
      __builtin_prefetch(line_, kToWrite);
      line_ += 64;
      if (line_ >= row_end_) {
        line_ = row_end_ + skip_;
        row_end_ = line_ + row_bytes_;
      }
    }
  }

 private:
  const char* line_;
  int64_t skip_, row_bytes_;
  const char *row_end_, *end_;
  int64_t lines_;  // at each call
};

}  // namespace deqcore::cpu::DEQCORE_ISA
