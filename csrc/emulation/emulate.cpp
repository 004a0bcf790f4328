// The CUDA kernels behind a C interface, for tests: as a library (ctypes), and as a program that
// runs one case from a file, which is how the sanitizers see them.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/anderson_step.h"
#include "cuda/broyden_step.h"
#include "cuda/masked_dense.h"
#include "cuda/masked_linear.h"
#include "cuda/masked_outer.h"
#include "emulation/cuda_emulation.h"
#include "emulation/sectors.h"

namespace {

using namespace deqcore;

// Scratch of exactly the bytes asked for, aligned as a GPU's; NaN, because a launch must not read
// what none has written.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= 0 || posix_memalign(&at_, 512, bytes) != 0) return;
    std::memset(at_, 0xff, bytes);
#if defined(EMULATION_SECTORS)
    emulation::sectors_watch(at_, bytes);
#endif
  }
  ~Workspace() { std::free(at_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return at_; }

 private:
  void* at_ = nullptr;
};

// Reads pointers, integers and doubles in the order in which the caller wrote them.
struct Reader {
  void** pointers;
  const int64_t* ints;
  const double* doubles;

  template <typename T>
  T* pointer() {
    return static_cast<T*>(*pointers++);
  }
  int64_t integer() { return *ints++; }
  double real() { return *doubles++; }
  Rows rows() {
    int8_t* const status = pointer<int8_t>();
    int32_t* const counters = pointer<int32_t>();
    double* const residuals = pointer<double>();
    return {status, counters, residuals, pointer<int32_t>()};
  }
  SparseRows pattern() {
    SparseRows out{};
    out.offsets = pointer<int32_t>();
    out.columns = pointer<int32_t>();
    out.position = pointer<int32_t>();
    out.rows = integer();
    out.width = integer();
    out.kept = integer();
    out.block = integer();
    return out;
  }
  RowLimits limits() {
    const double rtol = real(), atol = real();
    const int64_t patience = integer();
    return {rtol, atol, patience, integer()};
  }
};

// A path by its number, or the library's own choice where there is no such number.
template <typename P>
P path_of(int64_t number, P own) {
  return number < 0 ? own : static_cast<P>(number);
}

const char* run_anderson(Reader in) {
  AndersonArgs args{};
  args.type = static_cast<Dtype>(in.integer());
  const int64_t number = in.integer();
  args.x = in.pointer<void>();
  args.f = in.pointer<void>();
  args.damping = in.pointer<double>();
  args.g_ring = in.pointer<void>();
  args.h_ring = in.pointer<void>();
  args.gram = in.pointer<double>();
  args.best = in.pointer<void>();
  args.x_next = in.pointer<void>();
  args.z_next = in.pointer<void>();
  args.rows = in.rows();
  args.batch = in.integer();
  args.dim = in.integer();
  args.memory = in.integer();
  args.damping_length = in.integer();
  args.limits = in.limits();
  args.options.ridge = in.real();
  args.options.start = in.integer();
  args.options.restart = in.integer();
  args.options.safeguard = in.real();
  args.options.max_weight = in.real();
  const cuda::Path path = path_of(number, cuda::anderson_path(args));
  const Workspace workspace(cuda::anderson_workspace_bytes(args, path));
  return cuda::anderson_step(args, path, workspace.get(), nullptr);
}

const char* run_broyden(Reader in) {
  BroydenArgs args{};
  args.type = static_cast<Dtype>(in.integer());
  const int64_t number = in.integer();
  args.x = in.pointer<void>();
  args.f = in.pointer<void>();
  args.damping = in.pointer<double>();
  args.s_ring = in.pointer<void>();
  args.gram = in.pointer<double>();
  args.best = in.pointer<void>();
  args.x_next = in.pointer<void>();
  args.z_next = in.pointer<void>();
  args.rows = in.rows();
  args.batch = in.integer();
  args.dim = in.integer();
  args.capacity = in.integer();
  args.memory = in.integer();
  args.damping_length = in.integer();
  args.limits = in.limits();
  args.narrow = in.integer() != 0;
  const cuda::Path path = path_of(number, cuda::broyden_path(args));
  const Workspace workspace(cuda::broyden_workspace_bytes(args, path));
  return cuda::broyden_step(args, path, workspace.get(), nullptr);
}

const char* run_masked_linear(Reader in) {
  const auto type = static_cast<Dtype>(in.integer());
  const int64_t number = in.integer();
  cuda::MaskedLinearArgs args{};
  args.x = in.pointer<void>();
  args.values = in.pointer<void>();
  args.bias = in.pointer<void>();
  args.y = in.pointer<void>();
  args.weight = in.pattern();
  args.tokens = in.integer();
  const cuda::LinearPath path = path_of(number, cuda::masked_linear_path(args, type));
  const Workspace workspace(cuda::masked_linear_workspace_bytes(args, type, path));
  return cuda::masked_linear(args, type, path, workspace.get(), nullptr);
}

const char* run_masked_outer(Reader in) {
  const auto type = static_cast<Dtype>(in.integer());
  const int64_t number = in.integer();
  cuda::MaskedOuterArgs args{};
  args.left = in.pointer<void>();
  args.right = in.pointer<void>();
  args.values = in.pointer<void>();
  args.entries = in.pattern();
  args.tokens = in.integer();
  const cuda::OuterPath path = path_of(number, cuda::masked_outer_path(args, type));
  const Workspace workspace(cuda::masked_outer_workspace_bytes(args, type, path));
  return cuda::masked_outer(args, type, path, workspace.get(), nullptr);
}

const char* run_masked_dense(bool to_dense, Reader in) {
  const auto type = static_cast<Dtype>(in.integer());
  in.integer();  // there is one path
  const void* const from = in.pointer<void>();
  void* const to = in.pointer<void>();
  const SparseRows entries = in.pattern();
  return (to_dense ? cuda::masked_to_dense : cuda::masked_from_dense)(entries, from, to, type,
                                                                      nullptr);
}

}  // namespace

// Runs one step with the given seed; null, or what a kernel did wrong.
extern "C" const char* emulate(const char* op, uint64_t seed, void** pointers, const int64_t* ints,
                               const double* doubles) {
  emulation::seed = seed;
  emulation::traffic = {};
  emulation::launches.clear();
  const Reader in{pointers, ints, doubles};
  if (std::strcmp(op, "anderson_step") == 0) return run_anderson(in);
  if (std::strcmp(op, "broyden_step") == 0) return run_broyden(in);
  if (std::strcmp(op, "masked_linear") == 0) return run_masked_linear(in);
  if (std::strcmp(op, "masked_outer") == 0) return run_masked_outer(in);
  if (std::strcmp(op, "masked_to_dense") == 0) return run_masked_dense(true, in);
  if (std::strcmp(op, "masked_from_dense") == 0) return run_masked_dense(false, in);
  return "unknown op";
}

// Of the last step: launches; bytes of state read, read again from a cache, written; blocks.
extern "C" void emulate_statistics(int64_t* out) {
  out[0] = static_cast<int64_t>(emulation::launches.size());
  out[1] = emulation::traffic.read;
  out[2] = emulation::traffic.again;
  out[3] = emulation::traffic.written;
  out[4] = 0;
  for (const emulation::Launch& one : emulation::launches) out[4] += one.blocks;
}

// From now on a cluster can have that many blocks.
extern "C" void emulate_largest_cluster(int blocks) { emulation::largest_cluster = blocks; }

// From now on kernels are launched and not run, or run again.
extern "C" void emulate_only_launches(int only) { emulation::only_launches = only != 0; }

// Of the last step, for each launch: where its kernel lies, from the library's beginning on;
// blocks, threads and bytes of dynamic shared memory. Returns how many numbers that makes; it
// writes no more than there is room for.
extern "C" int64_t emulate_launches(int64_t* out, int64_t room) {
  Dl_info library{};
  dladdr(reinterpret_cast<const void*>(&emulate_launches), &library);
  const auto base = reinterpret_cast<uintptr_t>(library.dli_fbase);
  int64_t count = 0;
  for (const emulation::Launch& one : emulation::launches) {
    const int64_t kernel = static_cast<int64_t>(reinterpret_cast<uintptr_t>(one.kernel) - base);
    for (const int64_t number : {kernel, one.blocks, one.threads, one.shared_bytes}) {
      if (count < room) out[count] = number;
      ++count;
    }
  }
  return count;
}

#if defined(EMULATION_PROGRAM)

namespace {

constexpr int64_t kNull = -1;
constexpr int64_t kAliasOfFirst = -2;  // this pointer is the first one

int64_t read_integer(FILE* file) {
  int64_t value;
  if (std::fread(&value, sizeof(value), 1, file) != 1) std::abort();
  return value;
}

template <typename T>
std::vector<T> read_array(FILE* file) {
  std::vector<T> values(read_integer(file));
  if (std::fread(values.data(), sizeof(T), values.size(), file) != values.size()) std::abort();
  return values;
}

}  // namespace

// emulate CASE RESULT [SEED ...]: for each seed, runs the case on a fresh copy and appends the
// buffers to RESULT. A case is the op's name, then pointers, integers and doubles, each with a
// count before it; a pointer is its size in bytes (or kNull, kAliasOfFirst) and its content.
int main(int argc, char** argv) {
  if (argc < 4) return 2;
  FILE* const file = std::fopen(argv[1], "rb");
  FILE* const result = std::fopen(argv[2], "wb");
  if (file == nullptr || result == nullptr) return 2;
  const std::vector<char> name = read_array<char>(file);
  const std::string op(name.begin(), name.end());
  const int64_t count = read_integer(file);
  std::vector<std::vector<char>> contents(count);
  std::vector<int64_t> sizes(count);
  for (int64_t i = 0; i < count; ++i) {
    sizes[i] = read_integer(file);
    if (sizes[i] < 0) continue;
    contents[i].resize(sizes[i]);
    if (std::fread(contents[i].data(), 1, sizes[i], file) != static_cast<size_t>(sizes[i]))
      return 2;
  }
  const auto ints = read_array<int64_t>(file);
  const auto doubles = read_array<double>(file);
  std::fclose(file);

  for (int i = 3; i < argc; ++i) {
    std::vector<void*> pointers(count, nullptr);
    for (int64_t p = 0; p < count; ++p) {
      if (sizes[p] == kAliasOfFirst) pointers[p] = pointers[0];
      if (sizes[p] < 0) continue;
      pointers[p] = std::malloc(sizes[p]);  // its own allocation: a sanitizer guards its ends
      if (sizes[p] > 0) std::memcpy(pointers[p], contents[p].data(), sizes[p]);
    }
    const uint64_t seed = std::strtoull(argv[i], nullptr, 10);
    const char* const error =
        emulate(op.c_str(), seed, pointers.data(), ints.data(), doubles.data());
    if (error != nullptr) {
      std::fprintf(stderr, "emulation: seed %s: %s\n", argv[i], error);
      return 1;
    }
    for (int64_t p = 0; p < count; ++p) {
      if (sizes[p] < 0) continue;
      std::fwrite(pointers[p], 1, sizes[p], result);
      std::free(pointers[p]);
    }
  }
  return std::fclose(result) == 0 ? 0 : 2;
}

#endif
