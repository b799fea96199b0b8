# Every target sets itself up in .venv. PYTHON may name another interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-envs lint sanitize aot bare bench gpu gpu-dry clean

# A PYTHON that is given makes .venv anew where it is of another version.
ifneq ($(origin PYTHON),file)
GIVEN := PYTHON="$(PYTHON)"
version_of = $(shell { $(1) -c 'import sys; print(sys.version_info[:2])'; } 2>/dev/null)
ifneq ($(call version_of,$(PYTHON)),$(call version_of,$(BIN)/python))
.PHONY: $(STAMP)
endif
endif

$(STAMP): setup.sh pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
	@$(GIVEN) sh setup.sh $(VENV) -e ".[gym,mjx,train,video,test,dev]"
	@touch $@

## Train BRC on mjx/CartpoleSwingup; the run, with its curve, is in runs/demo
demo: $(STAMP)
	$(BIN)/brc-fast train mjx/CartpoleSwingup --run runs/demo --overwrite $(ARGS)

# Two processes, each with whole files: what a file sets up once stays set up once
PYTEST := $(BIN)/pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder

## The tests; `make test ARGS=@build/absent.txt` then runs what was skipped for want of an extra, and
## `make test ARGS="-m exhaustive"` more cases of what the others show
test: $(STAMP)
	$(PYTEST) --absent=build/absent.txt -m "not exhaustive" $(ARGS)

$(VENV)/.envs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt "brc-fast[dmc,envpool,wandb,onnx,hub,convert]"
	@touch $@

## Tests of the environments with every simulator that can be installed (EnvPool takes 0.9 GB)
test-envs: $(VENV)/.envs
	$(PYTEST) tests/test_envs*.py tests/test_bench_envs.py $(ARGS)

## Formatters, linters and types
lint: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files --show-diff-on-failure
	rm -rf build/types && mkdir -p build/types
	cp -R brc_fast build/types/ && cp -R kernels build/types/brc_fast/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p brc_fast

## C++ tests under address and undefined-behaviour sanitizers, those with threads under a thread sanitizer; with
## -O1, for at -O3 a sanitizer's code takes the compiler minutes (kernels keep the options that they are shipped with)
sanitize: $(STAMP)
	export PATH="$(CURDIR)/$(BIN):$$PATH"; set -e; \
	for build in "sanitize address,undefined" "sanitize-thread thread"; do set -- $$build; \
	  cmake -S . -B build/$$1 -DBRC_FAST_BUILD_TESTS=ON -DBRC_FAST_SANITIZE=$$2 \
	    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)"; \
	  cmake --build build/$$1 --parallel 2 --target brc_fast_tests; \
	  ctest --test-dir build/$$1 --output-on-failure; \
	done

## Compile every kernel for GPUs that are not there, with the oldest Triton supported
aot: $(STAMP)
	$(BIN)/pip install -q --no-deps --upgrade --target build/oldest triton==3.6.0
	PYTHONPATH=build/oldest $(BIN)/python -m brc_fast.kernels.tools.aot $(ARGS)

## The install without any extra: the agent, the replay and the kernels work alone
bare:
	@rm -rf build/bare
	@PYTHON="$(PYTHON)" sh setup.sh build/bare .
	cd build && bare/bin/python -c "import brc_fast as brc; brc.ReplayBuffer(10, 3, 1); \
	  brc.BRC(3, 1, critic=brc.CriticConfig(width=16))"

$(VENV)/.bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt "brc-fast[bench]"
	@touch $@

## Speed on this CPU in a quarter of an hour: results in build/bench, with SAVE=1 in bench/results, then their
## tables. ARGS go to every benchmark: ARGS="--budget 20" gives each 20 seconds, its start not included
BENCH_DIR := $(if $(SAVE),bench/results,build/bench)
BENCHES := limits update update-workloads scaling replay envs train
SHAPES := dmc-single mjx-dmc25 dogs-multitask humanoidbench-28 metaworld-50
bench: export OMP_NUM_THREADS ?= 1
bench: $(VENV)/.bench
	mkdir -p $(BENCH_DIR)
	$(BIN)/python bench/bench_limits.py --device cpu --budget 20 --save ../../$(BENCH_DIR)/limits-cpu $(ARGS)
	$(BIN)/python bench/bench_update.py --device cpu --providers ours ours-bf16 plain compiled jax \
	  --width 128 256 512 --batch 256 128 --budget 260 --save ../../$(BENCH_DIR)/update-cpu $(ARGS)
	$(BIN)/python bench/bench_update.py --device cpu --providers ours plain jax --workload $(SHAPES) \
	  --width 256 --batch 256 --budget 120 --save ../../$(BENCH_DIR)/update-workloads-cpu $(ARGS)
	$(BIN)/python bench/bench_scaling.py --device cpu --budget 60 --save ../../$(BENCH_DIR)/scaling-cpu $(ARGS)
	$(BIN)/python bench/bench_replay.py --budget 120 --save ../../$(BENCH_DIR)/replay-cpu $(ARGS)
	$(BIN)/python bench/bench_envs.py --budget 100 --save ../../$(BENCH_DIR)/envs-cpu $(ARGS)
	$(BIN)/python bench/bench_train.py --device cpu --budget 120 --save ../../$(BENCH_DIR)/train-cpu $(ARGS)
	-$(BIN)/python bench/report.py $(patsubst %,$(BENCH_DIR)/%-cpu.json,$(BENCHES))

## Tests and timings on a CUDA machine, with what is installed there
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

## The same script at tiny sizes on a CPU
gpu-dry: $(STAMP)
	$(BIN)/python bench/gpu.py --dry $(ARGS)

clean:
	rm -rf $(VENV) build
