"""Through lm-eval: our tasks give what its own task files and model class give on the same items."""

import importlib.resources
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT
from tiny_evaluate import TOKENIZER, language_model, random_model, write_rows

from rlhf.errors import UserError
from rlhf.evals.harness import TaskFile, stock_field, through_lm_eval
from rlhf.evals.model import LanguageModel
from rlhf.evals.tasks import inverse_scaling, lambada, truthfulqa

REAL = ROOT / "models" / "smollm2-135m"
ITEMS = int(os.environ.get("RLHF_REAL_ITEMS", "2"))  # real items of each task; more for a longer look
SHORT = 8  # real questions with at most so many answers in all, unless more is asked for


def stock(file, rows, model, tokenizer):
    """Samples of one of lm-eval's own task files, its data set redirected to our rows, on its own HFLM."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(str(importlib.resources.files("lm_eval"))) / "tasks" / file)
    split = config.get("test_split") or config["validation_split"]
    table = datasets.Dataset.from_list(rows)
    config |= {"custom_dataset": lambda **_: {split: table}}
    config.pop("tag", None)
    task = ConfigurableTask(config=config)
    found = evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=4096),
        task_dict={"tasks": {config["task"]: task}},
        bootstrap_iters=0,
        log_samples=True,
    )
    return found["samples"][config["task"]], found["results"][config["task"]]


def log_probs(samples):
    return [[lp for lp, _ in s["filtered_resps"]] for s in sorted(samples, key=lambda s: s["doc_id"])]


def as_on_the_hub(item):
    return {
        "question": item.question,
        "mc1_targets": {"choices": item.mc1.choices, "labels": [int(x) for x in item.mc1.labels]},
        "mc2_targets": {"choices": item.mc2.choices, "labels": [int(x) for x in item.mc2.labels]},
    }


def check_truthfulqa(items, lm):
    outcome = truthfulqa.run(lm, items)
    rows = [as_on_the_hub(item) for item in items]
    for form in ("mc1", "mc2"):
        file = f"truthfulqa/truthfulqa_{form}.yaml"
        samples, results = stock(file, rows, lm.model, lm.tokenizer)
        labels = [getattr(item, form).labels for item in items]
        wanted = [
            getattr(truthfulqa, form)(lps, ls) for lps, ls in zip(log_probs(samples), labels, strict=True)
        ]
        assert outcome.values[form] == pytest.approx(wanted, abs=1e-4)
        assert outcome.mean(form).mean == pytest.approx(results["acc,none"], abs=1e-4)
        print(file, "ours", outcome.mean(form).mean, "stock", results["acc,none"], "items", len(items))
    return outcome


def check_lambada(texts, lm, tmp_path):
    items = lambada.read([write_rows(tmp_path / "lambada.jsonl", [{"text": text} for text in texts])])
    outcome = lambada.run(lm, items)
    rows = [{"text": text} for text in texts]
    samples, results = stock("lambada/lambada_openai.yaml", rows, lm.model, lm.tokenizer)
    assert outcome.values["nll"] == pytest.approx([-row[0] for row in log_probs(samples)], abs=1e-3)
    greedy = [bool(s["filtered_resps"][0][1]) for s in sorted(samples, key=lambda s: s["doc_id"])]
    assert outcome.values["acc"] == [float(best) for best in greedy]
    assert outcome.mean("acc").mean == pytest.approx(results["acc,none"])
    assert outcome.aggregate["perplexity"] == pytest.approx(results["perplexity,none"], rel=1e-3)
    for name, value in (("acc", outcome.mean().mean), ("perplexity", outcome.aggregate["perplexity"])):
        print("lambada", name, "ours", value, "stock", results[f"{name},none"], "items", len(items))


def check_classes(rows, lm, tmp_path):
    items = inverse_scaling.read([write_rows(tmp_path / "i.jsonl", rows)])
    outcome = inverse_scaling.run(lm, items)
    samples, results = stock("inverse_scaling/inverse_scaling_neqa.yaml", rows, lm.model, lm.tokenizer)
    wanted = [
        inverse_scaling.classification(lps, item.answer)
        for lps, item in zip(log_probs(samples), items, strict=True)
    ]
    for metric, values in outcome.values.items():
        assert values == pytest.approx([row[metric] for row in wanted], abs=1e-3)
    assert outcome.mean("acc").mean == pytest.approx(results["acc,none"])
    print(
        "inverse scaling acc", "ours", outcome.mean().mean, "stock", results["acc,none"], "items", len(items)
    )


# --- a tiny model ----------------------------------------------------------------------------------------

QUESTIONS = [
    ("What is it?", ["A thing", "Nothing at all", "Not that", "My dog"], [1, 1, 0, 0]),
    ("Who was it?", ["It was me", "Nobody"], [1, 0]),
    ("Why {{so}}?", ["Because", "No reason is known", "Magic!"], [1, 0, 0]),
]
CLASSES = [
    {"prompt": "Write a word:", "classes": [" shy", " never"], "answer_index": 0},
    {"prompt": "Is it so?\nAnswer:", "classes": [" Yes", " No", " Perhaps not"], "answer_index": 2},
    {"prompt": "123", "classes": [" A", " B"], "answer_index": 1},
]


def questions(tmp_path):
    rows = []
    for question, answers, labels in QUESTIONS:
        one = [1, *[0] * (len(answers) - sum(labels))]
        mc1 = [answers[0], *(a for a, label in zip(answers, labels, strict=True) if not label)]
        rows.append(
            {
                "question": question,
                "mc1_targets": {"choices": mc1, "labels": one},
                "mc2_targets": {"choices": answers, "labels": labels},
            }
        )
    return truthfulqa.read([write_rows(tmp_path / "q.jsonl", rows)])


@pytest.mark.parametrize("seed", range(3))
def test_truthfulqa_equals_the_stock_task(tmp_path, seed):
    check_truthfulqa(questions(tmp_path), language_model(seed))


def test_lambada_equals_the_stock_task(tmp_path):
    texts = ["She gave him the ring", "one two three two", "said:\nIt is\nso, he said", "a  b"]
    check_lambada(texts, language_model(), tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_classes_equal_the_stock_task(tmp_path, seed):
    check_classes(CLASSES, language_model(seed), tmp_path)


def test_ties_go_against_the_model_though_lm_eval_takes_the_first(tmp_path):
    model = random_model()
    for parameter in model.parameters():  # every token has the same probability
        torch.nn.init.zeros_(parameter)
    lm = LanguageModel(model, TOKENIZER)
    row = {"choices": ["abc", "xyz"], "labels": [1, 0]}
    (item,) = truthfulqa.read(
        [write_rows(tmp_path / "q.jsonl", [{"question": "q", "mc1_targets": row, "mc2_targets": row}])]
    )
    outcome = truthfulqa.run(lm, [item])
    assert outcome.values == {"mc1": [0.0], "mc2": [pytest.approx(0.5)], "mc3": [0.0]}
    _, results = stock("truthfulqa/truthfulqa_mc1.yaml", [as_on_the_hub(item)], model, TOKENIZER)
    assert results["acc,none"] == 1.0


def test_a_prompted_model_reads_its_prompt_before_every_item(tmp_path):
    (bare,), (prompted,) = (
        through_lm_eval(lm, [_lambada_file("one", " two")])
        for lm in (language_model(), language_model(prefix_ids=TOKENIZER("Kind. ")["input_ids"]))
    )
    (whole,) = through_lm_eval(language_model(), [_lambada_file("Kind. one", " two")])
    assert bare[0][0][0] != pytest.approx(prompted[0][0][0])
    assert whole[0][0][0] == pytest.approx(prompted[0][0][0], abs=1e-4)


def _lambada_file(context, target):
    definition = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
    return TaskFile("t", ["t:1"], [{"context": context, "target": target}], definition)


def test_nothing_is_asked_of_the_network_and_nothing_is_printed(tmp_path, monkeypatch, capfd):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    truthfulqa.run(language_model(), questions(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_lm_eval_is_imported_on_first_use():
    import subprocess

    code = "import sys, rlhf.evals.harness, rlhf.evals.tasks.truthfulqa; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_item_too_long_for_the_window_is_named(tmp_path):
    items = lambada.read(
        [write_rows(tmp_path / "l.jsonl", [{"text": "a b"}, {"text": "word " * 20 + "end"}])]
    )
    with pytest.raises(UserError, match=r"l:2: 10\d tokens, and the model's window has 64"):
        lambada.run(language_model(window=64), items)


def test_a_task_file_that_lm_eval_has_not_is_named():
    assert "{{prompt_qa" in stock_field("truthfulqa/truthfulqa_mc1.yaml", "doc_to_text")
    for file, field in (
        ("truthfulqa/none.yaml", "doc_to_text"),
        ("truthfulqa/truthfulqa_mc1.yaml", "no_field"),
    ):
        with pytest.raises(UserError, match=rf"lm-eval .* has no {field} in its task file {file}"):
            stock_field(file, field)


# --- a real model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    return LanguageModel(model, AutoTokenizer.from_pretrained(REAL))


real = pytest.mark.skipif(not (REAL.is_dir() and DATA.is_dir()), reason=f"{REAL} or {DATA} is not there")


@real
def test_lambada_equals_the_stock_task_on_smollm2(smollm, tmp_path):
    lines = (DATA / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]
    check_lambada([json.loads(line)["text"] for line in lines], smollm, tmp_path)


@real
def test_truthfulqa_equals_the_stock_task_on_smollm2(smollm):
    items = truthfulqa.read([str(DATA / "truthfulqa" / "mc_task.json")])
    if ITEMS < 10:
        items = [item for item in items if len(item.mc1.choices) + len(item.mc2.choices) <= SHORT]
    check_truthfulqa(items[:ITEMS], smollm)


@real
def test_classes_equal_the_stock_task_on_smollm2(smollm, tmp_path):
    items = inverse_scaling.read([str(DATA / "inverse_scaling" / "memo_trap" / "1-proverb-ending.csv")])
    rows = [
        {"prompt": item.prompt, "classes": item.classes, "answer_index": item.answer}
        for item in items[:ITEMS]
    ]
    check_classes(rows, smollm, tmp_path)
