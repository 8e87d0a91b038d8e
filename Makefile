# Every target runs in an environment that is made on first use, outside the checkout. Start with `make help`.
SHELL := bash
.DEFAULT_GOAL := help
export PYTHONPATH := crds:operator:trainer_image:tests
export PYTHONUNBUFFERED := 1
VENV = $(eval VENV := $$(shell requirements/venv.sh))$(VENV)
PY = $(VENV)/bin/python
FORMATTED = crds operator trainer_image tests bench requirements

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo demo-down
demo: ## From nothing to an answer: local cluster, operator, fine-tuning, quantized service
	@requirements/apt.sh
	@$(PY) -m demo

demo-down: ## Remove what `make demo` left running
	@$(PY) -m demo down

.PHONY: test unit component contract faults integration e2e
test: ## All tests; the last line is a JSON summary
	@requirements/apt.sh || true
	@$(PY) -m suite unit component contract faults integration e2e

unit component contract faults integration e2e: ## Tests of one floor
	@$(PY) -m suite $@

.PHONY: faults-api
faults-api: ## What can go wrong between operator and API server, in virtual time; the last line is a JSON object
	@$(PY) -m suite.faults

.PHONY: rollouts
rollouts: ## Revisions that take over or are taken back, under load, on a local cluster; the last line is a JSON object
	@requirements/apt.sh || true
	@$(PY) -m rollouts

.PHONY: vllm vllm-image
vllm: ## Make vLLM's environment, on first use (2.3 GB), and run the tests of engine VLLM, which no other target runs
	@requirements/apt.sh
	@TUNESMITH_VLLM=$$(requirements/vllm-venv.sh) $(PY) -m pytest tests/component/server/test_vllm.py $(ARGS)

vllm-image: ## Build the image of engine VLLM, for CPU, into the cache
	@requirements/apt.sh
	@$(PY) -m images.vllm

.PHONY: bench-trainer
bench-trainer: ## Measure the trainer beside its peers; the last line is a JSON object (an hour on two quiet cores)
	@requirements/apt.sh
	@PYTHONPATH=$(PYTHONPATH):. $(PY) -m bench

.PHONY: bench-controlplane
bench-controlplane: ## Measure the operator with up to 5,000 jobs; the last line is a JSON object (ARGS="--jobs 100 --peer kubeflow")
	@requirements/apt.sh
	@PYTHONPATH=$(PYTHONPATH):. $(PY) -m bench.controlplane $(ARGS)

.PHONY: bench-serving
bench-serving: ## Measure serving beside its peers; the last line is a JSON object (ARGS="--runs 3 decode_vs_engine")
	@requirements/apt.sh
	@PYTHONPATH=$(PYTHONPATH):. $(PY) -m bench.serving $(ARGS)

.PHONY: same-losses
same-losses: ## Train every task and method at BASE=<commit> and at HEAD: the same to the last bit? (ARGS="-k chat")
	@$(PY) -m samelosses $(or $(BASE),$(error say what to compare with: make same-losses BASE=<commit>)) $(ARGS)

.PHONY: lint type verify generate format
lint: ## Style and common mistakes (ruff)
	@$(PY) -m ruff check $(FORMATTED)
	@$(PY) -m ruff format --check $(FORMATTED)

type: ## Types (mypy --strict)
	@$(PY) -m mypy

verify: ## Derived files are up to date, floors and size limits hold
	@$(PY) -m tunesmith_crdgen --check
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m suite.structure
	@$(PY) -m suite.promises
	@$(PY) -m suite.housemap --check

generate: ## Write the derived files: CRDs, chart copies, docs/reference, the picture of the house
	@$(PY) -m tunesmith_crdgen --write
	@$(PY) -m suite.housemap --write

format: ## Format the code
	@$(PY) -m ruff check --fix-only --quiet $(FORMATTED)
	@$(PY) -m ruff format $(FORMATTED)

.PHONY: images docs venv lock clean
images: ## Build the operator and trainer images into the cache
	@requirements/apt.sh
	@$(PY) -m images build

docs: generate ## Write the generated pages of docs/ and the picture of a report, from a real run
	@$(PY) -m docsbuild
	@echo "docs/ is up to date: start at docs/getting-started.md"

venv: ## Make the development environment and print its path
	@requirements/venv.sh

lock: ## Write the lock files from pyproject.toml
	@PATH=$(VENV)/bin:$$PATH requirements/lock.sh

clean: ## Remove caches inside the checkout
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist reports
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
