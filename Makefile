# Every target sets itself up in .venv. PYTHON may name another interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-envs lint sanitize aot bench gpu gpu-dry clean

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[mjx,train,test,dev]"
	@touch $@

## Train BRC on mjx/CartpoleSwingup; the run, with its curve, is in runs/demo
demo: $(STAMP)
	$(BIN)/brc-fast train mjx/CartpoleSwingup --run runs/demo --overwrite $(ARGS)

## The whole test suite
test: $(STAMP)
	$(BIN)/pytest $(ARGS)

$(VENV)/.envs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[dmc,envpool]"
	@touch $@

## Tests of the environments with every simulator that can be installed (EnvPool takes 0.9 GB)
test-envs: $(VENV)/.envs
	$(BIN)/pytest tests/test_envs*.py tests/test_bench_envs.py $(ARGS)

## Formatters, linters and types
lint: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure
	rm -rf build/types && mkdir -p build/types
	cp -R brc_fast build/types/ && cp -R kernels build/types/brc_fast/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p brc_fast

## C++ tests under address and undefined-behaviour sanitizers, those with threads under a thread sanitizer
sanitize: $(STAMP)
	export PATH="$(CURDIR)/$(BIN):$$PATH"; set -e; \
	for build in "sanitize address,undefined" "sanitize-thread thread"; do set -- $$build; \
	  cmake -S . -B build/$$1 -DBRC_FAST_BUILD_TESTS=ON -DBRC_FAST_SANITIZE=$$2 \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"; \
	  cmake --build build/$$1 --parallel 2 --target brc_fast_tests; \
	  ctest --test-dir build/$$1 --output-on-failure; \
	done

## Compile every kernel for GPUs that are not there, with the oldest Triton supported
aot: $(STAMP)
	$(BIN)/pip install -q --no-deps --upgrade --target build/oldest triton==3.6.0
	PYTHONPATH=build/oldest $(BIN)/python -m brc_fast.kernels.aot $(ARGS)

$(VENV)/.bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	@touch $@

## Speed on this CPU: the update, and replay buffer and environments among others
bench: $(VENV)/.bench
	$(BIN)/python bench/bench_update.py $(ARGS)
	$(BIN)/python bench/bench_replay.py $(ARGS)
	$(BIN)/python bench/bench_envs.py $(ARGS)

## Tests and timings on a CUDA machine, with what is installed there
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

## The same script at tiny sizes on a CPU
gpu-dry: $(STAMP)
	$(BIN)/python bench/gpu.py --dry $(ARGS)

clean:
	rm -rf $(VENV) build
