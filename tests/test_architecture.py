"""The arrows between the packages, and who may know which library, read from the source by ast."""

import ast
import functools
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from setuptools import find_packages

from rlhf.errors import CommandLine, UserError

PACKAGES = ("rlhf", "reward", "policy")
BESIDE = ("studies", "benchmarks")  # they use the packages, nobody uses them


def python_files(folders):
    return sorted(p.relative_to(ROOT).as_posix() for name in folders for p in (ROOT / name).rglob("*.py"))


FILES = python_files(PACKAGES)
MAX_LINES = 400
MAX_MODULES = 15  # of a folder
MAX_PRODUCT_LINES, MAX_TEST_LINES = 57_620, 43_540  # of all files; the aim is 26,500 and 24,500

STAGES = (  # a stage is a package; its command line is the package's __main__
    "rlhf.collect",
    "rlhf.plan",
    "rlhf.rank",
    "rlhf.report",
    "rlhf.watch",
    "reward.pretraining",
    "reward.training",
    "reward.card",
    "reward.export",
    *(
        f"policy.{name}"
        for name in (
            "sft",
            "distillation",
            "ppo",
            "dpo",
            "evaluate",
            "alignment_tax",
            "chat",
            "export",
            "inside",
            "rounds",
        )
    ),
)
SCRIPTS = (*(f"{stage}.__main__" for stage in STAGES), "policy.alignment_tax.preflight")

_LIGHT_CARD = (
    *("baselines", "beside", "calibration", "ceiling", "clusters", "figures", "first_page", "report"),
    *("suites", "variance"),
)
# told to the user within a second, so nothing here may load torch before it is needed
LIGHT = (
    "rlhf/errors.py",
    "rlhf/markdown.py",
    *(f for f in FILES if f.startswith("rlhf/plan/") and f != "rlhf/plan/timing.py"),  # which loads the model
    *(file for file in FILES if file.startswith(("rlhf/recipe/", "rlhf/runs/", "rlhf/data/", "rlhf/stats/"))),
    *(
        f"rlhf/{name}.py"
        for name in (
            "collect/endpoint",
            "collect/functions",
            "collect/judges",
            "models/configuration",
            "models/kernels/named",
            "models/prepare",
            "training/metrics",
            "watch/state",
        )
    ),
    *(f"reward/card/{name}.py" for name in _LIGHT_CARD),
    *(
        f"policy/{name}.py"
        for name in ("evaluate/report", "alignment_tax/checks", "chat/session", "inside/minimal_pairs")
    ),
    *(file for file in FILES if file.startswith("policy/rounds/")),
    *(f"rlhf/evals/{name}.py" for name in ("outcome", "tasks/humaneval")),  # nor before generated code runs
    *(file for file in FILES if file.startswith(("rlhf/evals/sandbox/", "rlhf/web/"))),
    *(file for file in FILES if file.startswith("rlhf/rank/")),
    *(f"{script.replace('.', '/')}.py" for script in SCRIPTS),
)
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets"}


@functools.cache
def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(node):
    """Full names of the modules that one statement may import; of ``from a import b`` both a and a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute here"
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@functools.cache
def all_imports(file):
    """Modules imported anywhere in a file, functions included."""
    return set().union(*map(imported, ast.walk(tree(file))))


def first_imports(file):
    """Modules imported as soon as the file is: not those in functions or for the type checker."""
    found, todo = set(), list(tree(file).body)
    while todo:
        node = todo.pop()
        found |= imported(node)
        if not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types_only(node)
        ):
            todo += ast.iter_child_nodes(node)
    return found


def file_of(module):
    """The file of one of our own modules, None for others."""
    for candidate in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
        if candidate in FILES:
            return candidate
    return None


def loaded_with(file):
    """Foreign top-level packages that come with importing a file, through all of our own."""
    seen, todo, foreign = set(), [file], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        todo += [f"{folder.as_posix()}/__init__.py" for folder in Path(current).parents[:-1]]
        for module in first_imports(current):
            own = file_of(module)
            if own:
                todo.append(own)
            elif module.partition(".")[0] not in PACKAGES:
                foreign.add(module.partition(".")[0])
    return foreign


def importers(package, imports=all_imports):
    """Files that import a package or something in it."""
    return {f for f in FILES if any(m == package or m.startswith(f"{package}.") for m in imports(f))}


def inside(package):
    return {file for file in FILES if file.startswith(f"{package}/")}


def test_the_rooms_are_there():
    assert len(FILES) > 30
    assert all(inside(package) for package in PACKAGES)
    assert set(LIGHT) <= set(FILES)


def test_the_ground_imports_neither_reward_nor_policy():
    assert importers("reward") & inside("rlhf") == set()
    assert importers("policy") & inside("rlhf") == set()


def test_the_reward_model_knows_nothing_of_the_policy():
    assert importers("policy") & inside("reward") == set()


def test_reward_and_policy_meet_where_stages_are_put_together_only():
    meeting = importers("reward") & inside("policy")
    assert meeting - inside("policy/alignment_tax") == {"policy/ppo/setup.py"}


def test_the_trainings_and_their_formulas_do_not_reach_the_reward_model_by_any_way():
    assembling = {
        "policy.ppo.setup",
        "policy.ppo.run",
        "policy.ppo.__main__",
        "policy.evaluate.run",
        "policy.evaluate.__main__",
        "policy.chat.models",
        "policy.chat.__main__",
        "policy.inside.run",
        "policy.inside.__main__",
        "policy.trl_compat",  # which puts a trainer together from what a script gives
        "policy.trl_compat.trainer",
    }
    loop = inside("policy") - {file_of(module) for module in assembling} - inside("policy/alignment_tax")
    assert {f"policy/ppo/{name}.py" for name in ("trainer", "rollout", "loss")} <= loop
    assert {"policy/evaluate/before_after.py"} <= loop
    assert {
        f"policy/{stage}/{name}.py"
        for stage in ("sft", "dpo", "distillation")
        for name in ("__main__", "run")
    } <= loop
    wrong = assembling | {"policy.alignment_tax"}
    assert not any(all_imports(file) & wrong for file in loop)


def test_a_stage_script_is_imported_by_nobody():
    for script in SCRIPTS:
        assert file_of(script), script
        assert importers(script) == set(), script


def test_the_make_targets_are_the_stage_scripts():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    started = [script.removesuffix(".__main__") for script in SCRIPTS]
    assert [script for script in started if f" {script} $(ARGS)" not in makefile] == []


def test_nobody_imports_tests_recipes_or_studies():
    names = {
        "tests",
        "recipes",
        "studies",
        "benchmarks",
        "conftest",
        *(p.stem for p in (ROOT / "tests").glob("*.py")),
    }
    assert not {f: found for f in FILES if (found := {m.partition(".")[0] for m in all_imports(f)} & names)}


def test_studies_and_benchmarks_stand_beside_the_packages():
    for folder in BESIDE:
        found = {file: all_imports(file) for file in python_files([folder])}
        assert any(m.partition(".")[0] in PACKAGES for modules in found.values() for m in modules)
        wrong = {"tests", "recipes", "conftest", *BESIDE} - {folder}
        assert {
            f: bad for f, modules in found.items() if (bad := {m.partition(".")[0] for m in modules} & wrong)
        } == {}
        assert {f: bad for f, modules in found.items() if (bad := modules & set(SCRIPTS))} == {}


def test_the_type_checker_sees_all_of_them():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["mypy"]["packages"] == [*PACKAGES, *BESIDE]


def test_every_package_is_installed():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    names = find_packages(str(ROOT), include=found["find"]["include"])
    assert set(names) == {Path(file).parent.as_posix().replace("/", ".") for file in FILES}


@pytest.mark.parametrize("file", LIGHT)
def test_a_mistake_is_told_before_torch_is_loaded(file):
    assert loaded_with(file) & HEAVY == set()


def test_torch_is_seen_where_it_is_loaded():
    assert "torch" in loaded_with("policy/ppo/run.py")
    assert {"torch", "peft"} <= loaded_with("rlhf/collect/simulated.py")  # through rlhf/models/backbone.py


def test_every_command_tells_a_mistaken_option_in_one_line():
    made = [
        file
        for file in python_files((*PACKAGES, *BESIDE))
        if any(
            isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
            for node in ast.walk(tree(file))
        )
    ]
    assert made == []  # but CommandLine
    with pytest.raises(UserError, match=r"^unrecognized arguments: --x; --help lists the options$"):
        CommandLine().parse_args(["--x"])


def test_each_library_is_known_to_few():
    # rlhf/models/lora.py: makes and reads adapters; rlhf/models/folding.py: computes what peft's layers
    # compute; rlhf/models/merging.py: merges anybody's adapters; reward/model/model.py: the saved format is
    # peft's adapter for Hugging Face's sequence classifier;
    # reward/card/scorers.py: the card reads anybody's reward model, an adapter too
    ground = {f"rlhf/models/{name}.py" for name in ("lora", "backbone", "folding", "merging")}
    assert importers("peft") <= ground | {"reward/model/model.py", "reward/card/scorers.py"}
    assert importers("accelerate") == {"rlhf/training/runtime.py", "rlhf/training/trackers.py"}
    assert importers("deepspeed") == {"rlhf/training/runtime.py", "rlhf/training/optimizer.py"}
    assert importers("deepspeed", first_imports) == set()  # it takes seconds, and one process needs none
    assert importers("trl") == {
        f"{name}/trainer.py" for name in ("reward/training", "policy/sft", "policy/dpo")
    }
    assert importers("lm_eval") == {"rlhf/evals/harness.py"}
    assert importers("lm_eval", first_imports) == set()  # it takes seconds, and few stages ask for it


def test_only_the_base_loader_knows_how_a_base_is_quantized():
    assert importers("bitsandbytes") <= {
        "rlhf/models/base.py",
        "rlhf/training/optimizer.py",
    }  # which has its 8-bit AdamW
    named = {f for f in FILES if "BitsAndBytesConfig" in {m.rpartition(".")[2] for m in all_imports(f)}}
    assert named == {"rlhf/models/base.py"}


def test_a_stage_of_the_policy_uses_the_loop_of_no_other():
    for stage in ("alignment_tax", "distillation", "sft", "dpo", "evaluate"):
        assert (
            importers(f"policy.{stage}") - inside(f"policy/{stage}") - inside("policy/alignment_tax") == set()
        )
    assert "policy.alignment_tax.checks" in all_imports("policy/alignment_tax/preflight.py")


def test_only_an_opened_stage_is_a_stage_run():
    """Whoever needs a folder of a run takes a ``StageFolder``; a lock and a fingerprint are not made up."""
    makers = {
        file
        for file in python_files((*PACKAGES, *BESIDE, "tests"))
        if "StageRun(" in (ROOT / file).read_text(encoding="utf-8")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and "StageRun" in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
    }
    assert makers == {"rlhf/runs/stage.py"}


def test_no_import_leads_back():
    files = FILES + python_files(BESIDE)
    known = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files}
    left = {}
    for file in files:
        modules = {module for module in all_imports(file) if module in known}
        # `from a import b` with a module b is about b alone
        modules -= {module.rpartition(".")[0] for module in modules}
        left[file] = {known[module] for module in modules} - {file}
    while ready := [file for file, wanted in left.items() if not wanted & left.keys()]:
        for file in ready:
            del left[file]
    assert left.keys() == set(), "these files import each other, or what does"


def test_no_file_is_too_long_to_be_read_in_one_go():
    files = [*map(ROOT.joinpath, FILES)]
    files += map(ROOT.joinpath, python_files(["tests", *BESIDE]))
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_folder_is_a_drawer():
    folders = Counter(Path(file).parent.as_posix() for file in FILES + python_files(BESIDE))
    assert {folder: n for folder, n in folders.items() if n > MAX_MODULES} == {}


def test_the_project_does_not_grow_unnoticed():
    def lines(files):
        return sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)

    assert lines(FILES + python_files(BESIDE)) <= MAX_PRODUCT_LINES
    assert lines(python_files(["tests"])) <= MAX_TEST_LINES
