# Each target sets up what it needs; a second call sets up nothing.
PYTHON ?= python3
# Unless TORCH_INDEX is set, even to nothing, an image takes the index of its Dockerfile.
IMAGE_INDEX := $(if $(filter undefined,$(origin TORCH_INDEX)),,--build-arg TORCH_INDEX=$(TORCH_INDEX))
# Where the CPU build of torch comes from, for example the CPU index that pytorch.org names. Empty: pip's own settings.
TORCH_INDEX ?=

BIN := .venv/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL_TORCH := $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
PIP := $(BIN)/$(INSTALL)
# For tests, without their dependencies: those would bring another torch, with CUDA, another protobuf, and clients of
# Kubernetes and Kafka. What the tests need of them is in "dev".
UNBOUND := kserve mlserver timm torchvision

.PHONY: serve test test-isa check lint types types-win32 types-darwin format docs bench bench-quick wheels image lock clean

serve: .venv/.serve
	$(BIN)/python -m app

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The service's tests under each instruction set that the processor has, and the routes' in each precision.
test-isa: .venv/.dev
	.ci/isa

check: lint types types-win32 types-darwin

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/mypy

# The client runs on other systems too.
types-win32 types-darwin: types-%: .venv/.dev
	$(BIN)/mypy --cache-dir .mypy_cache/$* --platform $* --package pvt_client

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pages for a browser, readable offline: build/site/index.html. First the tables that are made from the code.
docs: .venv/.dev
	$(BIN)/python -m tests.docs.generated
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo build/site/index.html

# Everything, into docs/benchmarks.md and docs/benchmarks/: an hour or more. BENCH gives options: make bench BENCH='--rounds 3'.
bench: .venv-bench/.bench
	.venv-bench/bin/python -m bench $(BENCH)

# A table on the terminal in three minutes.
bench-quick: .venv-bench/.bench
	.venv-bench/bin/python -m bench --quick

# The service and the client as packages, in dist/. What setuptools left of an earlier build would get into the wheel.
wheels:
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist . ./pvt_client
	rm -rf build

image:
	docker build --network host $(IMAGE_INDEX) --build-arg EXTRAS=$(EXTRAS) --tag pvt-serve .

# The newest versions that pyproject.toml allows, but for torch, whose pin stays: an unpinned one brings CUDA. So does
# torchvision's, which is made for one version of torch.
lock:
	grep -E '^torch(vision)?==' constraints.txt > .torch.pin
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint .torch.pin torch
	.venv-lock/bin/python -m pip install --quiet --constraint .torch.pin .[dev,bench,docs,peers]
	.venv-lock/bin/python -m pip install --quiet --no-deps --constraint .torch.pin $(UNBOUND)
	{ echo '# Every dependency, transitive ones too; made by "make lock".'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pvt-serve --exclude pip | sed 's/^\(torch\|torchvision\)==\([^+ ]*\).*/\1==\2/'; } > constraints.txt
	rm -rf .venv-lock .torch.pin

clean:
	rm -rf .venv .venv-bench

# torch goes first: pulled in as another package's dependency it might come with gigabytes of CUDA.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL_TORCH)
	touch $@

.venv/.serve: .venv/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.serve
	$(PIP) --editable .[dev,bench,docs]
	$(PIP) --no-deps $(UNBOUND)
	touch $@

# An environment of its own: the peers bring a hundred packages. One that does not install is left out, and said so.
.venv-bench/.bench: constraints.txt pyproject.toml
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/$(INSTALL_TORCH)
	.venv-bench/bin/$(INSTALL) --editable .[bench]
	.venv-bench/bin/$(INSTALL) --editable .[peers] || sed -n '/^peers = /,/^]/s/^ *"\(.*\)",/\1/p' pyproject.toml | \
	  while read package; do \
	    .venv-bench/bin/$(INSTALL) "$$package" || echo "$$package does not install here; what needs it is not measured"; done
	command -v wrk >/dev/null || apt-get install --yes --quiet wrk || { echo "install wrk, then call again"; exit 1; }
	command -v g++ >/dev/null || echo "without g++ torch.compile is not measured"
	touch $@
