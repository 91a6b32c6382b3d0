# Two commands do everything on a machine that has Python 3.11+ and make: `make trinity` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
MYPY ?= $(abspath $(BIN))/mypy
# Bytecode is kept even where the surroundings forbid it: dozens of processes would compile the package, the tests and what pytest rewrites anew
unexport PYTHONDONTWRITEBYTECODE
READY := $(VENV)/.ready
ASCEND := $(abspath $(VENV)-ascend)
LIBRARIES := $(abspath $(VENV)-libraries)

COMPAT ?= 5.10 5.17 5.24

.PHONY: trinity test suite environments quick quick-tests golden zoo docs test-ascend ascend-graphs ascend-products test-compat test-libraries test-small-libraries wheel test-cuda lint format types fuzz bench clean

trinity: $(READY)  ## run the example on the CPU (ARGS="--explain" and the like are handed on)
	$(BIN)/python examples/run_trinity.py $(ARGS)

# Lint and the suite, while pip fetches what the other environments need; then the tests of those, each in one process, $(JOBS) at once. What
# they print is kept apart, where make can do so.
APART := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
LINUX := $(filter Linux,$(shell uname -s))

test: $(READY)  ## lint, type check and run all tests
	$(MAKE) --no-print-directory -j3 lint suite environments $(if $(LINUX),ASCEND_APART=1)
	$(MAKE) --no-print-directory -j$(JOBS) $(APART) test-ascend test-compat test-small-libraries ALONE=1

environments: $(if $(LINUX),$(ASCEND)/.ready) $(LIBRARIES)-small/.ready $(COMPAT:%=$(abspath $(VENV))-transformers-%/.ready)

# Workers of the tests of other environments: none where several of these run at once, since each worker imports and collects anew
WORKERS = $(if $(ALONE),0,$(JOBS))

suite: $(READY)  ## all tests but those of other environments (ASCEND_APART=1: without those that test-ascend runs too)
	$(if $(ASCEND_APART),ASCEND_APART=1) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

QUICK := tests/test_catalogue.py tests/test_zoo.py tests/test_ir.py tests/test_options.py tests/test_report.py tests/test_declined_doc.py

quick: $(READY)  ## lint, type check and a fast cut of the tests, under a minute: before every commit
	$(MAKE) --no-print-directory -j2 lint quick-tests

quick-tests:
	$(BIN)/python -m pytest -q --quick $(QUICK) $(ARGS)

golden: $(READY)  ## write tests/golden.txt anew: IR and verdict of every catalogue entry and zoo model; read its diff
	GOLDEN_WRITE=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/test_catalogue.py tests/test_zoo.py -k "golden or inference"
	git --no-pager diff --stat tests/golden.txt

ZOO := tests/test_examples.py tests/test_zoo.py tests/test_zoo_training.py tests/test_catalogue.py tests/test_cpu_levels.py tests/test_caches.py tests/test_metamorphic.py tests/sharded

zoo: $(READY)  ## every experts implementation of every architecture, one token of every catalogue entry (make test runs a part)
	ZOO_ALL=1 $(BIN)/python -m pytest -q -n $(JOBS) $(sort $(ZOO) $(shell $(PYTHON) tests/sampled.py))

docs: $(READY)  ## write what docs/architecture.md prints of a trace anew; read its diff
	DOCS_WRITE=1 $(BIN)/python -m pytest -q tests/test_trace.py -k document
	git --no-pager diff --stat docs

# An environment that borrows torch and the test tools from the main one: $(call borrowing,FOLDER)
define borrowing
	test -x $(1)/bin/python || $(BIN)/python -m venv $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
endef

# The real torch_npu wheel, which exists for Linux only, on empty CANN libraries: no NPU and no CANN are needed. Its environment borrows
# torch and the test tools from the other one, and takes the newest wheel for that torch (TORCH_NPU=2.11.0.post3 for another). It needs
# a torch without CUDA: torch_npu 2.14 and torch's CUDA build register the same allocator options, and one of them aborts.
test-ascend: $(if $(LINUX),ascend-graphs ascend-products)  ## the Ascend lowering against the real torch_npu wheel
	$(if $(LINUX),,@echo "test-ascend: torch_npu has wheels for Linux only")

# Two processes of about the same time: a third one to share the tests out would cost as much again for what it imports
ASCEND_GRAPHS := $(addprefix tests/ascend/test_,dry_run.py lowering.py wheel.py)
ASCEND_APART_NOT := $(addprefix tests/ascend/test_,ids.py lora.py places.py)  # run by the suite
ASCEND_TEST = LD_LIBRARY_PATH=$(ASCEND)/cann $(ASCEND)/bin/python -m pytest -q -n $(WORKERS) -p no:cacheprovider

ascend-graphs: $(ASCEND)/.ready
	$(ASCEND_TEST) $(ASCEND_GRAPHS)

ascend-products: $(ASCEND)/.ready
	$(ASCEND_TEST) $(addprefix --ignore=,$(ASCEND_GRAPHS) $(ASCEND_APART_NOT)) tests/ascend

$(ASCEND)/.ready: $(READY) tests/ascend/cann_stub.py tests/ascend/requirements.txt
	$(call borrowing,$(ASCEND))
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND)/bin/python -m pip install --disable-pip-version-check --no-compile -q --no-deps -r tests/ascend/requirements.txt \
	  torch-npu==$(or $(TORCH_NPU),$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])').*)
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND)/bin/python tests/ascend/cann_stub.py $(ASCEND)/cann
	touch $@

# The oldest transformers that is supported, the GPU machine's and the newest, each in an environment that borrows everything else
test-compat: $(COMPAT:%=compat-%)  ## a dozen architectures on other versions of transformers (all: COMPAT_ALL=1; one version: COMPAT=5.17)

compat-%: $(abspath $(VENV))-transformers-%/.ready
	COMPAT=$* $(dir $<)bin/python -m pytest -q -n $(WORKERS) -p no:cacheprovider tests/compat

.PRECIOUS: $(abspath $(VENV))-transformers-%/.ready
$(abspath $(VENV))-transformers-%/.ready: $(READY) tests/compat/%.txt
	$(call borrowing,$(@D))
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-compile -q --no-deps -r tests/compat/$*.txt
	touch $@

test-libraries: $(LIBRARIES)/.ready  ## layers of other libraries' wheels, and recipes that need some (DOCS_WRITE=1 writes docs/libraries.md and the recipes' versions anew)
	$(LIBRARIES)/bin/python -m pytest -q -p no:cacheprovider tests/libraries

$(LIBRARIES)/.ready: $(READY) tests/libraries/requirements.txt tests/libraries/small.txt
	$(call borrowing,$(LIBRARIES))
	$(LIBRARIES)/bin/python -m pip install --disable-pip-version-check --no-compile -q --no-deps -r tests/libraries/requirements.txt
	touch $@

test-small-libraries: $(LIBRARIES)-small/.ready  ## the part of it that is installed in seconds: in CI
	$(LIBRARIES)-small/bin/python -m pytest -q -n $(WORKERS) -p no:cacheprovider tests/libraries/test_libraries.py

$(LIBRARIES)-small/.ready: $(READY) tests/libraries/small.txt
	$(call borrowing,$(LIBRARIES)-small)
	$(LIBRARIES)-small/bin/python -m pip install --disable-pip-version-check --no-compile -q --no-deps -r tests/libraries/small.txt
	touch $@

wheel: $(READY)  ## a wheel for this platform with CPU kernels in it, in dist/ (LEVELS="avx2 avx512_bf16": only these)
	MOE_COMPILE_PREBUILD="$(or $(LEVELS),all)" $(BIN)/python -c "import setuptools.build_meta as b; print(b.build_wheel('dist'))"

# On a GPU machine, with the environment that is there: no virtual environment is made, torch is the one that finds the card
test-cuda:  ## the CUDA kernels' tests on this machine's GPU (PYTHON=..., ARGS="-n 8"), then a small run under compute-sanitizer
	$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch finds no CUDA device")'
	$(PYTHON) -m pytest tests/gpu $(ARGS)
	if command -v compute-sanitizer >/dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest tests/gpu -k sanitizer; \
	else echo "compute-sanitizer is not installed: left out"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_contract.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy knows no package-dir mapping: it is shown the package as it is once installed
types:
	rm -rf build/types && mkdir -p build/types/moe_compile
	ln -s $(CURDIR)/moe_compile/* $(CURDIR)/passes $(CURDIR)/lowering build/types/moe_compile/
	cd build/types && $(MYPY) --config-file $(CURDIR)/pyproject.toml

fuzz: $(READY)  ## random terms against their normal forms (N=1000000 evaluations, SEED= for a certain start)
	$(BIN)/python tests/laws/fuzz.py $(or $(N),1000000) $(SEED)

bench: $(READY)  ## every benchmark; results and plots land in benchmarks/results
	$(BIN)/python benchmarks/moe_block.py
	$(BIN)/python benchmarks/compile_time.py

# Everything in one pip call: torch's version decides whether a small CPU build or gigabytes of CUDA come along.
# Bytecode is made of what is imported when it is imported (--no-compile): of ten thousand files most never are.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(ASCEND) $(LIBRARIES) $(LIBRARIES)-small $(VENV)-transformers-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
