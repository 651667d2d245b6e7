"""The evaluations by name: what they read, how many items, and the same ones for every model."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_evaluate import language_model, write_rows

from rlhf.errors import UserError
from rlhf.evals.outcome import paired
from rlhf.evals.registry import TASKS, canonical, draw, evaluate_task, read_task, run_task

PASSAGES = [{"text": f"passage number {n}"} for n in range(12)]


def test_every_name_leads_to_a_module_with_read_and_run():
    assert {"hhh", "truthfulqa", "lambada", "lm_loss", "humaneval", "toxicity"} <= set(TASKS)
    assert len([name for name in TASKS if name.startswith("inverse_scaling/")]) == 11 + 3
    for name, spec in TASKS.items():
        found = importlib.util.find_spec(spec.module)
        assert found is not None, name
        tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"read", "run"} <= defined, name


def test_names_of_the_first_round_and_other_spellings_lead_to_the_same_task():
    assert canonical("inverse_scaling/quote_repetition") == "inverse_scaling/resisting-correction"
    assert canonical("inverse_scaling/NeQA") == "inverse_scaling/neqa"
    assert canonical("inverse_scaling/memo_trap") == "inverse_scaling/memo-trap"
    assert canonical("inverse_scaling/sequence_prob") == "inverse_scaling/sequence_prob"
    with pytest.raises(UserError, match="unknown evaluation 'lambda'; did you mean lambada"):
        canonical("lambda")
    with pytest.raises(UserError, match="known: hhh, truthfulqa"):
        canonical("xyzzy")


def test_the_drawn_items_follow_from_the_seed_alone():
    items = list(range(100))
    some = draw(items, 10, 0)
    assert some == draw(items, 10, 0) == sorted(some)
    assert len(set(some)) == 10
    assert some != draw(items, 10, 1)
    assert draw(items, None, 0) == draw(items, 100, 0) == draw(items, 1000, 3) == items


def test_two_models_do_the_same_items(tmp_path):
    file = write_rows(tmp_path / "l.jsonl", PASSAGES)
    one, two = (evaluate_task("lambada", [file], language_model(seed), 5, 7) for seed in (0, 1))
    assert one.ids == two.ids
    assert one.values != two.values
    assert paired(one, two, "nll")["n"] == 5
    assert one.notes == ["5 of 12 items, drawn by seed 7"]
    assert evaluate_task("lambada", [file], language_model()).notes == []


def test_reading_and_running_are_the_two_halves_of_it(tmp_path):
    file = write_rows(tmp_path / "l.jsonl", PASSAGES)
    items, there = read_task("lambada", [file], limit=4, seed=1)
    assert (len(items), there) == (4, 12)
    halves = run_task("lambada", language_model(), items)
    assert halves.values == evaluate_task("lambada", [file], language_model(), 4, 1).values


def test_a_prize_task_goes_by_its_name_and_format(tmp_path):
    rows = [{"prompt": "Say no.", "completion": " yes"}]
    outcome = evaluate_task(
        "inverse_scaling/prompt_injection", [write_rows(tmp_path / "p.jsonl", rows)], language_model()
    )
    assert (outcome.task, outcome.metric) == ("inverse_scaling/prompt-injection", "loss")
    with pytest.raises(UserError, match=r'p\.jsonl:1: no "classes".*expected {"prompt", "classes"'):
        evaluate_task("inverse_scaling/neqa", [str(tmp_path / "p.jsonl")], language_model())


def test_options_reach_a_task_and_the_seed_what_writes(tmp_path):
    file = write_rows(tmp_path / "t.jsonl", [{"prompt": "He said"}, {"prompt": "She"}])
    asked = []

    def judge(prompts, responses):
        asked.append((list(prompts), list(responses)))
        return [float(len(r)) for r in responses]

    options = {"judge": judge, "samples": 2, "max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0}
    for seed in (0, 0, 1):
        evaluate_task("toxicity", [file], language_model(), seed=seed, **options)
    assert asked[0] == asked[1] != asked[2]
    assert [prompt[-1].content for prompt in asked[0][0]] == ["He said", "He said", "She", "She"]


def test_a_mistake_in_a_file_names_the_key_of_the_recipe():
    with pytest.raises(UserError, match=r"tax\.tasks\.lambada\.files names no file"):
        read_task("lambada", [])


def test_names_are_known_before_torch_is_loaded():
    code = (
        "import sys; from rlhf.evals import registry, harness; "
        "from rlhf.evals.tasks import hhh, truthfulqa, lambada, lm_loss, inverse_scaling; "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
