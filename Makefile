# `make help` lists the targets. Each sets up what it needs first: nothing the second time.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The system's Python that starts the set-up; it finds a fitting one by itself.
PYTHON ?= python3
# make demo VIDEO=file.mp4
VIDEO ?=
export VIDEO
IN_ENVIRONMENT := . ./setup.bash &&

.PHONY: help setup setup-test demo test lint bench clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  After make setup: source setup.bash, then ros2 launch surg_perception pipeline.launch.py"

setup: ## Everything to run the pipeline, into .venv, build and install below this folder
	@$(PYTHON) scripts/setup.py --level demo

setup-test: ## The same, and test tools and linters
	@$(PYTHON) scripts/setup.py --level test

demo: setup ## The pipeline on the phantom, or on VIDEO=file.mp4: live phase, figures, pictures in out/demo
	@$(IN_ENVIRONMENT) surg-perception demo $(if $(VIDEO),--video "$$VIDEO")

lint: setup-test ## Style, types, import rules, package.xml
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; \
	ruff check . && ruff format --check . && mypy && lint-imports --no-logo && \
	python scripts/check_package_xml.py package.xml surg_perception_msgs/package.xml

# One OpenMP thread: the networks of tests are tiny, and threads that wait for each other on busy cores double the time.
test: setup-test lint ## All checks and tests
	@$(IN_ENVIRONMENT) ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST OMP_NUM_THREADS=1 python -m pytest $(PYTEST_ARGS)

bench: setup-test ## Timings of models, starts, the pipeline, several cameras, answers: tables, and JSON in out/
	@$(IN_ENVIRONMENT) python benchmarks/bench_models.py
	@$(IN_ENVIRONMENT) python benchmarks/bench_startup.py
	@$(IN_ENVIRONMENT) python benchmarks/bench_preprocess.py
	@$(IN_ENVIRONMENT) python benchmarks/bench_pipeline.py
	@$(IN_ENVIRONMENT) python benchmarks/bench_cameras.py
	@$(IN_ENVIRONMENT) python benchmarks/bench_surgllm.py

clean: ## Removes what builds and runs leave behind; keeps downloads
	rm -rf build install log out test_results .setup/workspace.stamp *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Removes the environment and the downloads too
	rm -rf .venv .setup .cache
