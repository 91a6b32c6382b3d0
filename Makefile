# Two commands do everything on a machine that has Python 3.11+ and make: `make trinity` and `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
MYPY ?= $(abspath $(BIN))/mypy
READY := $(VENV)/.ready
ASCEND := $(abspath $(VENV)-ascend)

.PHONY: trinity test test-ascend run-ascend test-cuda lint types fuzz bench clean

trinity: $(READY)  ## run the example on the CPU (ARGS="--explain" and the like are handed on)
	$(BIN)/python examples/run_trinity.py $(ARGS)

test: lint  ## lint, type check and run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)
	$(MAKE) --no-print-directory test-ascend

# The real torch_npu wheel, which exists for Linux only, on empty CANN libraries: no NPU and no CANN are needed. Its environment borrows
# torch and the test tools from the other one.
test-ascend:  ## the Ascend lowering against the real torch_npu wheel
	@if [ "$$(uname -s)" = Linux ]; then $(MAKE) --no-print-directory run-ascend; else echo "test-ascend: torch_npu has wheels for Linux only"; fi

run-ascend: $(ASCEND)/.ready
	LD_LIBRARY_PATH=$(ASCEND)/cann $(ASCEND)/bin/python -m pytest -q -n $(JOBS) -p no:cacheprovider tests/ascend

$(ASCEND)/.ready: $(READY) tests/ascend/cann_stub.py tests/ascend/requirements.txt
	test -x $(ASCEND)/bin/python || $(BIN)/python -m venv $(ASCEND)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_paths()["purelib"])' \
	  > "$$($(ASCEND)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND)/bin/python -m pip install --disable-pip-version-check -q --no-deps -r tests/ascend/requirements.txt
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND)/bin/python tests/ascend/cann_stub.py $(ASCEND)/cann
	touch $@

# On a GPU machine, with the environment that is there: no virtual environment is made, torch is the one that finds the card
test-cuda:  ## the CUDA kernels' tests on this machine's GPU (PYTHON=..., ARGS="-n 8"), then a small run under compute-sanitizer
	$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch finds no CUDA device")'
	$(PYTHON) -m pytest tests/gpu $(ARGS)
	if command -v compute-sanitizer >/dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest tests/gpu -k sanitizer; \
	else echo "compute-sanitizer is not installed: left out"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory types
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_contract.py

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
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(ASCEND) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
