# make demo        set up .venv and ask the embedded model about a picture
# make test        the same set-up, then format, lint, types and all fast tests
# make test-slow   the tests that take minutes
# make fuzz        hours of fuzzing: MINUTES=60 SEED=7 TARGET=png; findings go to tests/corpus
# make gpu-check   on a machine with a CUDA device: build, run the GPU tests, write gpu-results/
# make gpu-bench   there too: build, then measure PART=1 to 7; RESUME=folder of an earlier report
#                  (either with DRY=1: walk through it on a CPU, nothing built or measured)
# make lock        renew constraints.txt: the newest versions that pyproject.toml allows
# make bench       a quick set of measurements, under ten minutes on two cores; into build/bench/
# make clean       remove what was built; .venv stays
#
# A failed compilation is an error for `make test`; `make demo` then runs on plain torch instead.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMPS := .venv/stamps
NATIVE_SOURCES := CMakeLists.txt $(wildcard cuda/*.* cuda/*/*.*)

# Exact versions of all but torch: what was tested is what a newcomer gets. Python compiles what is
# imported when it is; compiling all of torch and transformers here takes a minute.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
ASKED := $(BIN)/python .ci/asked.py
# Kept where the environment forbids it as well: the tests start a hundred processes, and compiling
# torch takes each of them longer than its work.
export PYTHONDONTWRITEBYTECODE =
# What need not wait for each other: packages, compilation, checks of the sources.
BESIDE := --no-print-directory -j3
# One process for each core, one thread in each, waiting asleep: half the time of two threads in one.
# Each begins with a run of whole files, so that what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow gpu-check gpu-bench clean fuzz bench lock
.PHONY: demo-ready test-ready lint types

demo:
	@$(MAKE) $(BESIDE) demo-ready
	$(BIN)/python main.py --image examples/car.jpg --prompt "What colour is the car?"

demo-ready: $(STAMPS)/run $(STAMPS)/module
	@:

test: export AVL_REQUIRE_NATIVE = 1
test:
	@$(MAKE) $(BESIDE) test-ready
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

test-ready: lint types $(STAMPS)/native $(STAMPS)/browser
	@:

lint: $(STAMPS)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'cuda/*.h' 'cuda/*.cpp' 'cuda/*.cu' 'cuda/*.cuh')

# What it says stays together, whatever else is being said.
types: $(STAMPS)/test
	@said=$$($(BIN)/mypy 2>&1); failed=$$?; echo "$$said"; exit $$failed

test-slow: export AVL_REQUIRE_NATIVE = 1
test-slow: $(STAMPS)/test $(STAMPS)/native
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

fuzz: $(STAMPS)/test $(STAMPS)/native
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),60) \
		--seed $(or $(SEED),$(shell date +%s)) --target "$(TARGET)"

# The machine's own Python: a bare GPU machine has no .venv and no network to fill one.
GPU_PYTHON ?= python3
gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check $(if $(DRY),--dry --skip-build)

gpu-bench:
	$(if $(DRY),,$(GPU_PYTHON) -m bench.gpu_check --build-only)
	$(GPU_PYTHON) -m bench.gpu_bench --part $(or $(PART),$(error which part? make gpu-bench PART=1)) \
		$(if $(DRY),--dry) $(if $(RESUME),--resume $(RESUME))

QUICK := --out build/bench --overwrite

bench: $(STAMPS)/test $(STAMPS)/native
	$(BIN)/python -m bench.memory --table $(QUICK)
	$(BIN)/python -m bench.kernels --quick $(QUICK)
	$(BIN)/python -m bench.latency --quick $(QUICK)
	$(BIN)/python -m bench.decode --model weights/tiny --blocks 3 $(QUICK)
	$(BIN)/python -m bench.batch --model weights/tiny --sizes 1 4 16 --blocks 2 $(QUICK)
	$(BIN)/python -m bench.load --preset tiny-test --rounds 3 $(QUICK)
	$(BIN)/python -m bench.quality --pages 4 --tasks field colour --cache avl --cache random $(QUICK)

# A new environment, filled as `make test` fills its own but for the project, and written down. torch
# is left out, since which one to take depends on the machine.
LOCKED := build/lock/bin/python -m pip
lock: $(STAMPS)/torch
	rm -rf build/lock && $(BIN)/python -m venv build/lock
	$(LOCKED) install -q $(TORCH)
	$(LOCKED) install -q $$($(ASKED) build run test train)
	{ echo "# What is installed beside torch; \`make lock\` renews it."; \
		$(LOCKED) freeze | grep -v '^torch=='; } > constraints.txt

clean:
	rm -rf build dist gpu-results engine/_native*.so $(STAMPS)

$(STAMPS)/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || python3 -m venv .venv
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/venv constraints.txt
	$(PIP) $$($(ASKED) build)
	touch $@

# torch comes before the others and alone: what follows must take the installed one, not choose
# another.
$(STAMPS)/torch: $(STAMPS)/build
	$(PIP) $(TORCH)
	touch $@

$(STAMPS)/run: $(STAMPS)/torch pyproject.toml
	$(PIP) $$($(ASKED) run)
	touch $@

# The oracle is imported once: the processes of the tests would compile it all at the same time.
$(STAMPS)/test: $(STAMPS)/torch pyproject.toml
	$(PIP) $$($(ASKED) run test train)
	$(BIN)/python -c "import tests.oracle"
	touch $@ $(STAMPS)/run

# The project itself, editable: Python changes are live, a change in cuda/ installs anew. It needs
# no package but those it is built with. After a build that failed, CMake's memory of it goes first.
INSTALL = test -e engine/_native*.so || rm -rf build/cp*; rm -f engine/_native*.so; \
	$(PIP) --no-build-isolation --no-deps -e .

$(STAMPS)/module: $(STAMPS)/build pyproject.toml $(NATIVE_SOURCES)
	$(INSTALL)
	touch $@

$(STAMPS)/native: export AVL_REQUIRE_NATIVE = 1
$(STAMPS)/native: $(STAMPS)/build pyproject.toml $(NATIVE_SOURCES)
	$(INSTALL)
	touch $@ $(STAMPS)/module

# Debian's browser for the tests of the attention page. Tried once: where apt is not to be had (no
# root and no sudo without a password, no network, another system) those tests are skipped.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
APT := $(SUDO) apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20

$(STAMPS)/browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		echo "installing chromium for the browser tests"; \
		$(APT) update && $(APT) install -y --no-install-recommends chromium >/dev/null; \
	} || echo "note: no chromium (apt failed, see above): the browser tests will be skipped"
	@mkdir -p $(STAMPS) && touch $@
