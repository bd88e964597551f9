# Each target sets up what it needs; a second call sets up nothing.
PYTHON ?= python3
# Where the CPU build of torch comes from, for example the CPU index that pytorch.org names. Empty: pip's own settings.
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch

.PHONY: serve test check format bench image lock clean

serve: .venv/.serve
	$(BIN)/python -m app

test: .venv/.dev
	$(BIN)/python -m pytest

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.bench
	$(BIN)/python -m bench

image:
	docker build --network host --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag pvt-serve .

# The newest versions that pyproject.toml allows, but for torch, whose pin stays: an unpinned one brings CUDA.
lock:
	grep '^torch==' constraints.txt > .torch.pin
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement .torch.pin
	.venv-lock/bin/python -m pip install --quiet --constraint .torch.pin .[dev,bench]
	{ echo '# Every dependency, transitive ones too; made by "make lock".'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pvt-serve --exclude pip | sed 's/^torch==\([^+ ]*\).*/torch==\1/'; } > constraints.txt
	rm -rf .venv-lock .torch.pin

clean:
	rm -rf .venv

# torch goes first: pulled in as another package's dependency it might come with gigabytes of CUDA.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(TORCH)
	touch $@

.venv/.serve: .venv/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.serve
	$(PIP) --editable .[dev,bench]
	touch $@

.venv/.bench: .venv/.serve
	$(PIP) --editable .[bench]
	command -v wrk >/dev/null || apt-get install --yes --quiet wrk || { echo "install wrk, then call again"; exit 1; }
	touch $@
