# `make run` and `make test` do all of their own set-up; what is there already is not done again.
PYTHON ?= python3
ASK ?= What is the impeller of the Heron H75 made of?
DATA ?=
SCRATCH ?=
export PYTHON ASK

.PHONY: run test check bench bench-quality bench-tune lock clean machine service dev train engine models lint
.NOTPARALLEL:

run: machine service engine models
	@exec .venv/bin/graft up --ingest examples --ask "$$ASK"

test: check
	.venv/bin/pytest -n 2 --dist loadfile -m "slow and not engine"
	.venv/bin/pytest -m engine

check: machine dev train engine models lint
	.venv/bin/pytest -n 2 --dist loadfile -m "not engine and not slow"

lint:
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict
	.venv/bin/lint-imports

bench: machine service dev engine models
	.venv/bin/python -m benchmarks $(if $(DATA),--data "$(DATA)") $(if $(SCRATCH),--scratch "$(SCRATCH)")

# What retrieval and answers are worth; needs DATA.
bench-quality: machine service dev engine models
	.venv/bin/python -m benchmarks retrieval_quality retrieval_vs_llamaindex retrieve_stages languages conversations \
		injection blame_agreement answer_quality $(if $(DATA),--data "$(DATA)") $(if $(SCRATCH),--scratch "$(SCRATCH)")

# What training costs by method, and beside a plain TRL script.
bench-tune: machine service dev train engine models
	.venv/bin/python -m benchmarks tune_methods tune_speed tune_answers tune_preferences tune_rlhf tune_search tune_retrieval $(if $(DATA),--data "$(DATA)") $(if $(SCRATCH),--scratch "$(SCRATCH)")

machine:
	@$(PYTHON) -I service/machine.py

service dev train:
	@$(PYTHON) -m deploy.environment $@

engine:
	@$(PYTHON) -m deploy.vllm.install

models:
	@$(PYTHON) -m deploy.models

lock:
	@sh deploy/lock.sh

# What the set-up made; the documents' index and records in .graft stay.
clean:
	rm -rf .venv .venv-vllm .venv-bench .models .venv.lock .venv-vllm.lock .venv-bench.lock
