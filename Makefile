# One target a stage, in order; this is the only place where the stages are joined.
#
#   make rlhf                                       the default experiment, from set-up to summary
#   make reward RECIPE=recipes/hh.yaml SET="reward.epochs=2 name=hh-2"
#   make rlhf RECIPE=recipes/hhh.yaml QUICK=1       with the small sizes of the recipe's quick block
#   make ppo PROCS=2                                two processes under the DeepSpeed launcher, on a free port (PORT=n)
#   make ppo HOSTFILE=hosts                         several machines, a line `HOST slots=N` each, reached by ssh (SSH="ssh -p n")
#   make report RUNS="sentiment sentiment-2"         one page of two runs
#   make rank RECIPE=... [PORT=8000] [TO=label-studio]  a page on which people rank responses; TO= writes its tasks for another tool
#   make plan GPU=24GB PROCS=8 NODES=2               what a recipe needs of such machines, before anything is loaded

RECIPE ?= recipes/sentiment.yaml
SET ?=
QUICK ?=
HOSTFILE ?=
PYTHON ?= python3
VENV ?= .venv

# Processes of the stages that train or measure: the visible GPUs where there are any, else one.
export PROCS ?=
export PORT ?=
export HOSTFILE
export SSH ?=
# Of `make plan`: the memory of a GPU (none = the CPU), and machines of PROCS processes; else what is here.
export GPU ?=
export NODES ?=
TIME ?=
# Of `make report`: the runs on the page, by name; else the recipe's.
export RUNS ?=
# Of `make rank`: another tool that gets the tasks (label-studio, argilla), else a page is served.
export TO ?=

PY := $(VENV)/bin/python
STAMPS := .stamps
ARGS = $(RECIPE) $(SET) $(if $(filter-out 0,$(QUICK)),quick=true)
RUN = $(PY) -m rlhf.training.launch
# an environment that was removed is made anew
$(if $(wildcard $(PY)),,$(shell rm -f $(STAMPS)/setup))
# tests start the environment's tools by name; the quotes are for a folder with a space in its name
TOOLS = PATH="$$(cd "$(VENV)/bin" && pwd):$$PATH"
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup plan model rank comparisons sft distill pmp reward card ppo dpo evaluate tax rlhf rounds report watch chat inside export export-policy export-reward verify check test test-slow smoke clean \
        study-preference study-people study-scaling study-online study-ppo bench-reward bench-ppo gpu-check
.NOTPARALLEL:

help: ## make: list the targets
	@echo 'pairwright: from human comparisons to an aligned policy'
	@echo 'A target, the package that it starts, and what it does; stages share one recipe: make <target> RECIPE=recipes/<name>.yaml'
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ([^:]*): (.*)/  \1|\2|\3/' | column -t -s '|'
	@echo
	@echo '  RECIPE=$(RECIPE)   SET="section.key=value ..."   QUICK=1   PROCS=n   PORT=n   HOSTFILE=path   SSH=command   GPU=24GB   NODES=n   TIME=1'

setup: $(STAMPS)/setup ## pip: make the virtual environment with the pinned dependencies

$(STAMPS)/setup: pyproject.toml constraints.txt
	@mkdir -p $(STAMPS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("error: Python %d.%d is too old, 3.11 or \
	later is needed: make setup PYTHON=python3.12" % v[:2] if v < (3, 11) else 0)' || exit 2
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		test ! -e $(VENV)/pyvenv.cfg || { echo 'the environment $(VENV) has no pip or an old Python: it is made anew'; \
			rm -rf $(VENV); }; \
		$(PYTHON) -m venv $(VENV) || { echo 'error: $(PYTHON) cannot make a virtual environment with pip:' \
			'install its venv package (apt install python3-venv)' >&2; exit 2; }; }
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The recipe is checked in a fraction of a second, before anything is loaded.
.PHONY: recipe
recipe: setup
	@$(PY) -m rlhf.recipe $(ARGS)

# A run of all stages takes hours: what the last one could not use is an error before the first one begins.
.PHONY: preflight
preflight: recipe
	@$(PY) -m policy.alignment_tax.preflight $(ARGS)

plan: setup ## rlhf.plan: say what the recipe needs of a machine, and what to change where it does not fit
	@$(PY) -m rlhf.plan $(ARGS) $(if $(filter-out 0,$(TIME)),time=true)

model: recipe ## rlhf.models.prepare: put the recipe's base model in place
	@$(PY) -m rlhf.models.prepare $(ARGS)

rank: model ## rlhf.rank: serve a page on which people rank responses, sampled or from files; Ctrl-C ends it
	@$(PY) -m rlhf.rank $(ARGS)

comparisons: model ## rlhf.collect: read or sample the comparisons and split them by prompt
	@$(PY) -m rlhf.collect $(ARGS)

sft: comparisons ## policy.sft: fine-tune the base on demonstrations, where the recipe has it
	@$(RUN) policy.sft $(ARGS)

distill: comparisons ## policy.distillation: distill the HHH prompt into the base, where the recipe has it
	@$(RUN) policy.distillation $(ARGS)

pmp: model ## reward.pretraining: pre-train the preference model on public comparisons, where the recipe has it
	@$(RUN) reward.pretraining $(ARGS)

reward: comparisons sft distill pmp ## reward.training: train the reward model
	@$(RUN) reward.training $(ARGS)

card: recipe ## reward.card: measure how far a reward model can be trusted: this run's, or any (SET="card.model=...")
	@$(RUN) reward.card $(ARGS)

ppo: recipe ## policy.ppo: train the policy with PPO against the reward model
	@$(RUN) policy.ppo $(ARGS)

dpo: comparisons sft distill ## policy.dpo: train a policy straight on the comparisons (DPO), where the recipe has it
	@$(RUN) policy.dpo $(ARGS)

evaluate: card ## policy.evaluate: compare before and after on held-out prompts
	@$(RUN) policy.evaluate $(ARGS)

tax: recipe ## policy.alignment_tax: measure what alignment cost: base, prompted, distilled, SFT, PPO on the same items
	@$(RUN) policy.alignment_tax $(ARGS)

rlhf: export WHOLE_ROAD = 1
rlhf: preflight reward ## all of these: all stages of the recipe, in order; what is done is skipped
	@$(RUN) policy.ppo $(ARGS)
	@$(RUN) reward.card $(ARGS)
	@$(RUN) policy.evaluate $(ARGS)
	@$(RUN) policy.alignment_tax $(ARGS)
	@$(PY) -m rlhf.report $(ARGS)

rounds: model ## policy.rounds: online RLHF: sample the newest policies, rank, train anew, round after round
	@$(PY) -m policy.rounds $(ARGS)

report: recipe ## rlhf.report: a run as one page of HTML, or several beside each other (RUNS="a b")
	@$(PY) -m rlhf.report $(ARGS)

watch: recipe ## rlhf.watch: the same page of a run in progress, on loopback, renewed as it goes (RUNS="a b", PORT=n)
	@$(PY) -m rlhf.watch $(ARGS)

chat: recipe ## policy.chat: talk to base and policy beside each other, and save which answer is better
	@$(PY) -m policy.chat $(ARGS)

inside: recipe ## policy.inside: find which heads and neurons carry what PPO changed, and what the reward model reads
	@$(PY) -m policy.inside $(ARGS)

export: export-policy export-reward ## both of these: plain models of a finished run, which need nothing of this project

export-policy: recipe ## policy.export: the policy with its adapter merged in, checked in a fresh process, with a model card
	@$(PY) -m policy.export $(ARGS)

export-reward: recipe ## reward.export: the same of the reward model, with its head
	@$(PY) -m reward.export $(ARGS)

verify: recipe ## rlhf.runs.verify: check every file of a run against the hashes of its manifests
	@$(PY) -m rlhf.runs.verify $(ARGS)

check: setup ## ruff, mypy: lint, formatting and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Two files at a time, one thread each: most tests wait for one core, and figures do not depend on the load.
# In alphabetical order: the longest files have few tests, and last they would leave one core idle.
PYTEST = $(TOOLS) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest --numprocesses 2 --dist loadfile \
	--no-loadscope-reorder

test: setup ## pytest: the tests, but for those that take many processes, all families or every moment of a kill
	@$(PYTEST) -m "not slow"

test-slow: setup ## pytest: what make test leaves out
	@$(PYTEST) -m slow

smoke: setup ## make rlhf: the two tiny recipes from end to end, in scratch folders
	@rm -rf runs/smoke runs/smoke-assistant
	@$(MAKE) --no-print-directory rlhf RECIPE=recipes/tiny.yaml SET="name=smoke" PROCS=1 QUICK=
	@$(MAKE) --no-print-directory rlhf RECIPE=recipes/tiny_assistant.yaml SET="name=smoke-assistant" \
		PROCS=1 QUICK=
	@rm -rf runs/smoke runs/smoke-assistant

study-preference: setup ## studies.preference: check the papers' claims on a ladder of small models (STUDY=--quick)
	@$(PY) -m studies.preference $(STUDY)

study-people: setup ## studies.people: a policy that learns from people, at equal samples (STUDY="--recipe ... | --quick")
	@$(PY) -m studies.people $(STUDY)

study-scaling: setup ## studies.scaling: evaluations and preference objectives over a ladder of models (STUDY=--quick)
	@$(PY) -m studies.scaling $(STUDY)

study-online: setup ## studies.online: static against online comparisons at equal numbers (STUDY=--quick)
	@$(PY) -m studies.online $(STUDY)

study-ppo: setup ## studies.ppo: what optimization does to a reward whose gold is known (STUDY=--quick)
	@$(PY) -m studies.ppo $(STUDY)

bench-reward: setup ## benchmarks.reward: throughput and memory of the reward stage against trl.RewardTrainer
	@$(PY) -m benchmarks.reward $(BENCH)

bench-ppo: setup ## benchmarks.ppo: seconds and memory of a PPO step against trl's last PPOTrainer (BENCH=--scaling)
	@$(PY) -m benchmarks.ppo $(BENCH)

gpu-check: setup ## benchmarks.gpu_check: what this machine's GPUs do with it: ten minutes, one page (CHECK=--quick)
	@$(PY) -m benchmarks.gpu_check $(CHECK)

clean: ## rm: remove runs and models, keep the environment
	rm -rf runs models .pytest_cache .ruff_cache .mypy_cache .hypothesis
