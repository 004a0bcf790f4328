// The Python modules deqcore._C and deqcore._cuda. Importing one loads its kernels into torch's
// dispatcher (static initialisers of the bindings); the module itself tells how it was built, takes
// steps without the dispatcher on the CPU, and joins captured CUDA graphs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <string>
#include <tuple>

#include "ops/anderson_step.h"
#include "ops/broyden_step.h"
#if defined(DEQCORE_CUDA_MODULE)
#include "cuda/solve_graph.h"
#else
#include "cpu/direct_step.h"
#include "cpu/isa.h"
#endif

#define DEQCORE_STRINGIZE_(x) #x
#define DEQCORE_STRINGIZE(x) DEQCORE_STRINGIZE_(x)

namespace py = pybind11;

namespace deqcore {
extern const char kSources[];
}

namespace {

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}

// The names of an op's numbers, in the order in which it reads them from its tensor of options.
template <typename... Parts>
py::object names_of(std::tuple<Parts...>*) {
  return py::str((std::string() + ... + Parts::kNames)).attr("split")();
}

template <typename Numbers>
py::object names_of() {
  return names_of(static_cast<Numbers*>(nullptr));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["flags"] = DEQCORE_FLAGS;
  info["sources"] = py::str(deqcore::kSources);  // deqcore/_sources.py
  info["torch"] = TORCH_VERSION;
  py::dict numbers;
  numbers["anderson_step"] = names_of<deqcore::AndersonNumbers>();
  numbers["broyden_step"] = names_of<deqcore::BroydenNumbers>();
  info["numbers"] = numbers;
#if !defined(DEQCORE_CUDA_MODULE)
  info["isas"] = py::str(DEQCORE_ISAS).attr("split")(",");
  info["isa"] = deqcore::cpu::isa_name(deqcore::cpu::chosen_isa());
#endif
  return info;
}

#if !defined(DEQCORE_CUDA_MODULE)
template <typename Step>
void define_direct_step(py::module_& m, const char* name) {
  py::class_<Step>(m, name, "A step op's kernel with its state; see csrc/cpu/direct_step.h.")
      .def(py::init<const std::vector<uintptr_t>&, const std::vector<int64_t>&>())
      .def("step", &Step::step, py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(DEQCORE_MODULE, m) {
  m.def("build_info", &build_info,
        "How the extension was built, and the instruction set chosen.\n\n"
        "Raises RuntimeError if DEQCORE_CPU_ISA is unknown or this processor lacks it.");
#if defined(DEQCORE_CUDA_MODULE)
  using deqcore::cuda::SolveGraph;
  py::class_<SolveGraph>(m, "SolveGraph", "A solve as one CUDA graph; see csrc/cuda/solve_graph.h.")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>(),
           py::arg("first"), py::arg("body"), py::arg("last"), py::arg("remaining"),
           py::arg("taken"), py::arg("max_steps"))
      .def("launch", &SolveGraph::launch, py::arg("stream"),
           py::call_guard<py::gil_scoped_release>())
      .def_static("why_not_conditional", &SolveGraph::why_not_conditional);
#else
  define_direct_step<deqcore::cpu::DirectAnderson>(m, "DirectAnderson");
  define_direct_step<deqcore::cpu::DirectBroyden>(m, "DirectBroyden");
#endif
}
