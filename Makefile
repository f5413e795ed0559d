# Everything runs in .venv. `make demo` installs what the pipeline and the trainer need; `make setup`, and every target
# for development, add the tools and the test lab.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
DEMO := demo

# The first of these that is Python 3.11 to 3.13 and can make environments; `make PYTHON=...` names another.
PYTHONS := python3.13 python3.12 python3.11 python3
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(shell $(name) -c '$(SUITABLE)' 2>/dev/null && echo $(name))))
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
# Without --max-worker-restart 0, pytest-xdist waits for ever for a process that a crash has ended.
PARALLEL := -q --dist loadfile --max-worker-restart 0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

export HF_HUB_OFFLINE := 1

.PHONY: help setup demo picture test test-fast test-browser chaos fuzz lint docs docs-check format bench gpu-acceptance clean
.DEFAULT_GOAL := help

help: ## Show this help
	@grep -E '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY_DEV) ## Make .venv with everything, at the pinned versions

$(BIN)/pip:
	$(if $(strip $(PYTHON)),,$(error No Python 3.11, 3.12 or 3.13 with venv was found (looked for: $(PYTHONS)). Install one, on Debian with its python3-venv, or name yours: make PYTHON=/path/to/python3 $(MAKECMDGOALS)))
	$(PYTHON) -m venv --clear $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing into $(VENV): minutes, mostly the download of torch.'
	$(PIP) -c constraints.txt -e '.[pipeline]'
	@touch $@

$(READY_DEV): $(READY) tests/authors.txt tests/torchvision_beside_cpu_torch.py
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  cp tests/torchvision_beside_cpu_torch.py "$$site" && \
	  echo 'import torchvision_beside_cpu_torch' > "$$site/torchvision_beside_cpu_torch.pth"
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps -r tests/authors.txt
	@touch $@

demo: $(DEMO)/tuned/training.json ## The whole way on the embedded world: score, invert, train, evaluate (minutes)
	$(BIN)/smpo-pipeline evaluate --model base=$(DEMO)/world/model tuned=$(DEMO)/tuned \
	  --prompts $(DEMO)/world/prompts/test.txt --images-per-prompt 8 --batch-size 64 \
	  --sampler ddim --steps 16 --guidance-scale 1 \
	  --reward toy-truth pickscore=$(DEMO)/world/rewards/pickscore clipscore=$(DEMO)/world/rewards/clipscore \
	  --out $(DEMO)/report

$(DEMO)/world/world.json: | $(READY)
	$(BIN)/smpo-pipeline toy --out $(DEMO)/world --pairs 600

$(DEMO)/scores/scores.json: $(DEMO)/world/world.json
	$(BIN)/smpo-pipeline score --pairs $(DEMO)/world/pairs --out $(DEMO)/scores \
	  --reward pickscore=$(DEMO)/world/rewards/pickscore clipscore=$(DEMO)/world/rewards/clipscore

$(DEMO)/shards/manifest.json: $(DEMO)/scores/scores.json
	$(BIN)/smpo-pipeline invert --pairs $(DEMO)/world/pairs --scores $(DEMO)/scores \
	  --model $(DEMO)/world/model --out $(DEMO)/shards

$(DEMO)/tuned/training.json: $(DEMO)/shards/manifest.json
	$(BIN)/smpo-train --shards $(DEMO)/shards --model $(DEMO)/world/model --out $(DEMO)/tuned \
	  --reward pickscore clipscore --beta 300 --lr 5e-5 --lr-schedule cosine --warmup-steps 10 \
	  --batch-size 24 --max-steps 150

picture: demo ## Draw docs/images/demo.png from the demo's output
	$(BIN)/python -m benchmarks.picture --demo $(DEMO)

test: $(READY_DEV) ## All tests but those of minutes each, which `make chaos` runs
	$(BIN)/python -m pytest $(PARALLEL) -n 3 --no-loadscope-reorder -m 'not long'

test-fast: $(READY_DEV) ## The everyday tests, each below about a second: no Ray, few trainings
	$(BIN)/python -m pytest $(PARALLEL) -n 2 -m 'not slow and not long'

test-browser: $(READY_DEV) ## The tests of pages in Chromium (part of `make test` where it is installed)
	SMPO_BROWSER=required $(BIN)/python -m pytest -q -m browser

fuzz: $(READY_DEV) ## 10,000 hostile images and 2,000 hostile files (minutes)
	$(BIN)/python -m tests.fuzz

chaos: $(READY_DEV) ## Training and 50 runs of stages 1 and 2, killed at random moments and compared (hours)
	SMPO_KILLS=20 $(BIN)/python -m pytest -q -m long
	$(BIN)/python -m tests.chaos --runs 50

lint: $(READY_DEV) ## ruff, mypy, import-linter; are the reference pages up to date, and do all links lead somewhere?
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/reference/generate_cli.py --check
	$(BIN)/python docs/reference/generate_formats.py --check
	$(SITE)

docs: $(READY_DEV) ## Write docs/reference/ from the code, and the documentation as a site into site/
	$(BIN)/python docs/reference/generate_cli.py
	$(BIN)/python docs/reference/generate_formats.py
	$(SITE)

docs-check: $(READY_DEV) ## Are the commands, flags and Python of README and docs/guide taken? (part of `make test`)
	$(BIN)/python -m pytest -q tests/docs tests/trainer/test_readme.py tests/trainer/test_python_guide.py

format: $(READY_DEV) ## Format, and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY_DEV) ## The experiments and timings behind the numbers in docs/ (hours on 2 cores)
	$(BIN)/python -m benchmarks.experiments.objectives
	$(BIN)/python -m benchmarks.experiments.pairs.calibration
	$(BIN)/python -m benchmarks.inversion.solvers
	$(BIN)/python -m benchmarks.inversion.solvers --family sd3
	$(BIN)/python -m benchmarks.experiments.flow_training --work $(DEMO)/flow
	$(BIN)/python -m benchmarks.experiments.pairs.from_prompts --work $(DEMO)/from-prompts
	$(BIN)/python -m benchmarks.experiments.pairs.from_prompts --work $(DEMO)/from-prompts-flow --family sd3
	$(BIN)/python -m benchmarks.experiments.pairs.tracked --work $(DEMO)/from-prompts-flow
	$(BIN)/python -m benchmarks.experiments.negative --work $(DEMO)/negative
	$(BIN)/python -m benchmarks.experiments.pairs.tailorpo --work $(DEMO)/tailorpo
	$(BIN)/python -m benchmarks.experiments.pairs.votes --work $(DEMO)/votes
	$(BIN)/python -m benchmarks.experiments.safeguards --work $(DEMO)/safeguards
	$(BIN)/python -m benchmarks.experiments.auto_beta --work $(DEMO)/auto-beta
	$(BIN)/python -m benchmarks.experiments.pairs.shift --work $(DEMO)/shift
	$(BIN)/python -m benchmarks.experiments.pairs.rounds --work $(DEMO)/rounds
	$(BIN)/python -m benchmarks.speed.forward
	$(BIN)/python -m benchmarks.speed.score
	$(BIN)/python -m benchmarks.speed.half_precision
	$(BIN)/python -m benchmarks.speed.generate
	$(BIN)/python -m benchmarks.speed.invert
	$(BIN)/python -m benchmarks.speed.index
	$(BIN)/python -m benchmarks.capacity.scale
	$(BIN)/python -m benchmarks.experiments.invariance --demo $(DEMO)
	$(BIN)/python -m benchmarks.speed.train --shape sd15
	$(BIN)/python -m benchmarks.speed.train --shape sdxl
	$(BIN)/python -m benchmarks.speed.train_flow
	$(BIN)/python -m benchmarks.capacity.memory --measure --processes 2
	$(BIN)/python -m benchmarks.toy_world.thin --out $(DEMO)/thin
	$(BIN)/python -m benchmarks.inversion.trajectories measure "the world" $(DEMO)/thin/good.json
	$(BIN)/python -m benchmarks.inversion.trajectories measure "its thin copy" $(DEMO)/thin/thin.json --model $(DEMO)/thin
	$(BIN)/python -m benchmarks.inversion.trajectories page $(DEMO)/thin/good.json $(DEMO)/thin/thin.json
	$(BIN)/python -m benchmarks.experiments.trajectory_training --work $(DEMO)
	$(BIN)/python -m benchmarks.experiments.drift --work $(DEMO)
	$(BIN)/python -m benchmarks.experiments.lora --work $(DEMO)
	$(BIN)/python -m benchmarks.experiments.health --demo $(DEMO) --work $(DEMO)/health

gpu-acceptance: $(READY_DEV) ## Are numbers and rates right on this machine's GPU? (nine minutes; docs/guide/deploy.md)
	$(BIN)/python -m benchmarks.gpu_acceptance --out gpu-acceptance

clean: ## Remove .venv and the demo's output
	rm -rf $(VENV) $(DEMO)
