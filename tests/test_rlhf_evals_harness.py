"""Through lm-eval: our tasks against its own model class and metrics, and any other task on local rows."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, ROOT, slow_but
from tiny_evaluate import TOKENIZER, bos_tokenizer, language_model, random_model, write_rows

from rlhf.errors import UserError
from rlhf.evals.harness import _bridge_class, stock_answers, stock_config, stock_task
from rlhf.evals.items import Item
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import paired
from rlhf.evals.registry import canonical, draw, task_spec
from rlhf.evals.tasks.inverse_scaling import classification
from rlhf.evals.tasks.truthfulqa import mc2, mc3

REAL = ROOT / "models" / "smollm2-135m"
ITEMS = int(os.environ.get("RLHF_REAL_ITEMS", "2"))  # real items of each task; more for a longer look
SHORT = 8  # real questions with at most so many answers in all, unless more is asked for


def stock(file, docs, lm):
    """One of lm-eval's own task files on its own HFLM: the answers to every document, and its results."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found = evaluate(
        lm=HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4, max_length=4096),
        task_dict={"tasks": {"t": stock_task(stock_config(file), docs)}},
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(found["samples"]["t"], key=lambda sample: sample["doc_id"])
    return [s["filtered_resps"] for s in samples], found["results"]["t"]


def plain(answers):
    return [log_prob for log_prob, _ in answers]


def truth(doc, first, second):
    one, many = (doc[f"mc{n}_targets"]["labels"] for n in (1, 2))
    return {"mc1": mc3(plain(first), one), "mc2": mc2(plain(second), many), "mc3": mc3(plain(second), many)}


def last_word(doc, answers):
    return {"nll": -answers[0][0], "acc": float(answers[0][1])}


def prize(doc, answers):
    return classification(plain(answers), doc["answer_index"])


# ours -> (its rows, the metrics of an item from lm-eval's answers, lm-eval's files with its results by ours)
TASKS = {
    "truthfulqa": (
        [
            {"question": question, "mc1_targets": one, "mc2_targets": many}
            for question, one, many in [
                ("What is it?", {"A thing": 1, "Not": 0, "My dog": 0}, {"A": 1, "B": 1, "Not": 0, "My": 0}),
                ("Who was it?", {"It was me": 1, "Nobody": 0}, {"It was me": 1, "Nobody": 0}),
                ("Why {{so}}?", {"Because": 1, "Magic!": 0}, {'It\'s "so"': 1, "1": 0, "No reason": 0}),
            ]
        ],
        truth,
        {"truthfulqa/truthfulqa_mc1.yaml": {"mc1": "acc"}, "truthfulqa/truthfulqa_mc2.yaml": {"mc2": "acc"}},
    ),
    "lambada": (
        [
            {"text": text}
            for text in ("She gave the ring", "one two three two", "said:\nIt\nis so", "a  {{b}}")
        ],
        last_word,
        {"lambada/lambada_openai.yaml": {"acc": "acc", "perplexity": "perplexity"}},
    ),
    "inverse_scaling/neqa": (
        [
            {"prompt": "Write a word:", "classes": [" shy", " never"], "answer_index": 0},
            {"prompt": "Is it so?\nAnswer:", "classes": [" Yes", " No", " Perhaps not"], "answer_index": 2},
            {"prompt": "123", "classes": [" A", " B"], "answer_index": 1},
        ],
        prize,
        {"inverse_scaling/inverse_scaling_neqa.yaml": {"acc": "acc"}},
    ),
}
PUBLISHED = {
    "truthfulqa": "truthfulqa/mc_task.json",
    "lambada": "lambada/lambada_test.jsonl",
    "inverse_scaling/neqa": "inverse_scaling/memo_trap/1-proverb-ending.csv",
}


def check(name, items, lm):
    _, metrics, files = TASKS[name]
    docs = [item.doc for item in items]
    outcome = task_spec(name).run(lm, items)
    answers, results = zip(*(stock(file, docs, lm) for file in files), strict=True)
    wanted = [metrics(*one) for one in zip(docs, *answers, strict=True)]
    for metric, values in outcome.values.items():
        assert values == pytest.approx([row[metric] for row in wanted], abs=1e-3)
    for ours, result in zip(files.values(), results, strict=True):
        for metric, theirs in ours.items():
            value = outcome.aggregate.get(metric) or outcome.mean(metric).mean
            assert value == pytest.approx(result[f"{theirs},none"], rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TASKS)
def test_it_equals_the_stock_task(tmp_path, name, seed):
    items = task_spec(name).read([write_rows(tmp_path / "rows.jsonl", TASKS[name][0])], key="k")
    check(name, items, language_model(seed))


@pytest.fixture(scope="module")
def smollm():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    return LanguageModel(model, AutoTokenizer.from_pretrained(REAL))


@pytest.mark.skipif(not (REAL.is_dir() and DATA.is_dir()), reason=f"{REAL} or {DATA} is not there")
@pytest.mark.parametrize("name", slow_but([name for name in TASKS if name != "truthfulqa"], TASKS))
def test_it_equals_the_stock_task_on_a_real_model(smollm, name):
    items = task_spec(name).read([str(DATA / PUBLISHED[name])], key="k")
    if name == "truthfulqa" and ITEMS < 10:
        sizes = [sum(len(item.doc[f"mc{n}_targets"]["labels"]) for n in (1, 2)) for item in items]
        items = [item for item, size in zip(items, sizes, strict=True) if size <= SHORT]
    check(name, items[:ITEMS], smollm)


def test_ties_go_against_the_model_though_lm_eval_takes_the_first():
    model = random_model()
    for parameter in model.parameters():  # every token has the same probability
        torch.nn.init.zeros_(parameter)
    lm, targets = LanguageModel(model, TOKENIZER), {"choices": ["abc", "xyz"], "labels": [1, 0]}
    item = Item("q:1", "", {"question": "q", "mc1_targets": targets, "mc2_targets": targets})
    outcome = task_spec("truthfulqa").run(lm, [item])
    assert outcome.values == {"mc1": [0.0], "mc2": [pytest.approx(0.5)], "mc3": [0.0]}
    _, results = stock("truthfulqa/truthfulqa_mc1.yaml", [item.doc], lm)
    assert results["acc,none"] == 1.0


def test_a_prompted_model_reads_its_prompt_before_every_item():
    prompted = language_model(prefix_ids=TOKENIZER("Kind. ")["input_ids"])
    texts = [(language_model(), "one two"), (prompted, "one two"), (language_model(), "Kind. one two")]
    bare, behind, whole = (
        task_spec("lambada").run(lm, [Item("t:1", "", {"text": text})]).values["nll"][0] for lm, text in texts
    )
    assert bare != pytest.approx(behind)
    assert whole == pytest.approx(behind, abs=1e-4)


def test_nothing_is_asked_of_the_network_and_nothing_is_printed(tmp_path, monkeypatch, capfd):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in TASKS:
        items = task_spec(name).read([write_rows(tmp_path / "rows.jsonl", TASKS[name][0])], key="k")
        task_spec(name).run(language_model(), items)
    assert capfd.readouterr() == ("", "")


def test_lm_eval_is_imported_on_first_use():
    code = "import sys, rlhf.evals.harness, rlhf.evals.tasks.truthfulqa; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_item_too_long_for_the_window_is_named():
    items = [Item(f"l:{n}", "", {"text": text}) for n, text in ((1, "a b"), (2, "word " * 20 + "end"))]
    with pytest.raises(UserError, match=r"l:2: 10\d tokens, and the model's window has 64"):
        task_spec("lambada").run(language_model(window=64), items)


def test_a_task_file_that_lm_eval_has_not_is_named():
    with pytest.raises(UserError, match=r"lm-eval .* has no task file truthfulqa/none\.yaml; install"):
        stock_answers(language_model(), ["truthfulqa/none.yaml"], [])


# --- any other task --------------------------------------------------------------------------------------

ARC = [
    {
        "question": f"Which is {n}?",
        "choices": {"text": [f"it is {n}", "no", "a cat"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[n % 3],
    }
    for n in range(6)
]
GSM = [{"question": f"{n} plus one?", "answer": f"One more.\n#### {n + 1}"} for n in range(5)]


def both(name, rows, tmp_path, limit=None, shots=0):
    spec = task_spec(name, shots)
    items = draw(spec.read([write_rows(tmp_path / "rows.jsonl", rows)], key="tax.tasks"), limit, 3)
    return [spec.run(language_model(seed), items) for seed in (0, 1)]


def test_a_multiple_choice_task_pairs_two_models_item_by_item(tmp_path):
    one, two = both("arc_easy", ARC, tmp_path, limit=4, shots=2)
    assert one.ids == two.ids == sorted(one.ids)
    assert len(one.ids) == 4
    assert (one.metric, one.higher_is_better, set(one.values)) == ("acc", True, {"acc", "acc_norm"})
    assert paired(one, two)["n"] == 4


def test_choices_equal_those_of_plain_log_probabilities(tmp_path):
    (one, _), lm = both("arc_easy", ARC, tmp_path), language_model(0)
    for row, acc in zip(ARC, one.values["acc"], strict=True):
        context = f"Question: {row['question']}\nAnswer:"
        scores = [
            s.log_prob for s in lm.score([lm.encode_pair(context, f" {t}") for t in row["choices"]["text"]])
        ]
        assert acc == float(scores.index(max(scores)) == "ABC".index(row["answerKey"]))


def test_a_task_that_generates_is_scored_by_what_the_model_writes(tmp_path, monkeypatch):
    one, two = both("gsm8k", GSM, tmp_path, limit=3, shots=1)
    assert one.metric == "exact_match"
    assert set(one.values) == {"exact_match", "exact_match,flexible-extract"}
    assert one.ids == two.ids
    asked = []

    def generate(contexts, **options):
        asked.append(options)
        return [f"so #### {n + 1}" if n else "#### 77" for n in range(len(contexts))]

    lm = language_model()
    monkeypatch.setattr(lm, "generate", generate)
    spec = task_spec("gsm8k", 0)
    outcome = spec.run(lm, spec.read([str(tmp_path / "rows.jsonl")], key="k"))
    assert outcome.values["exact_match"] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert asked[0]["temperature"] == 0
    assert "Question:" in asked[0]["stop"]


def test_few_shot_examples_are_the_other_rows(tmp_path):
    items = task_spec("gsm8k", 4).read([write_rows(tmp_path / "g.jsonl", GSM)], key="k")
    task = items[0].task
    for doc in task.eval_docs:
        assert task.fewshot_context(doc, 4).count(f"Question: {doc['question']}") == 1
    with pytest.raises(UserError, match="5 few-shot examples need more than 5 rows"):
        task_spec("gsm8k").read([str(tmp_path / "g.jsonl")], key="k")


def test_a_row_with_wrong_fields_is_named_with_the_fields_expected(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [ARC[0], {"question": "q", "answer": "x"}])
    with pytest.raises(UserError, match="expected the fields answerKey, choices, question") as caught:
        task_spec("arc_easy").read([file], key="k")
    assert str(caught.value).startswith(f"{file}:2: ")
    bad = write_rows(tmp_path / "b.jsonl", [ARC[0], {**ARC[1], "answerKey": "Z"}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: the task cannot read it"):
        task_spec("arc_easy").read([bad], key="k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8kk", "unknown evaluation 'gsm8kk'; did you mean gsm8k"),
        ("lambda", "did you mean lambada"),
        ("IFEval", "did you mean ifeval or"),
        ("mmlu", r"mmlu is a group of lm-eval: name its tasks one by one \(mmlu_abstract_algebra, "),
        ("openllm", r"one by one \(arc_challenge, hellaswag, truthfulqa_gen, \.\.\.\)"),
        ("mbpp", "runs generated code without a sandbox; use humaneval"),
    ],
)
def test_a_name_that_cannot_be_run_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message):
        canonical(name)


@pytest.mark.parametrize("start", ["", "<|start|>", "Be kind"])
@pytest.mark.parametrize("text", ["", "short", "a text of twenty-five to."])
def test_rolling_log_likelihood_is_that_of_lm_evals_own_windows(start, text):
    from lm_eval.models.huggingface import HFLM

    lm = language_model(window=10)
    if start == "<|start|>":
        lm = LanguageModel(lm.model, bos_tokenizer())
    if start == "Be kind":  # 3 tokens at a time; the last ones have as much before them as fits
        lm = language_model(window=10, prefix_ids=lm.encode(start))
        parts = [
            (text[max(min(i - 1, len(text) - 4), 0) : i], text[i : i + 3]) for i in range(0, len(text), 3)
        ]
        wanted = sum(s.log_prob for s in lm.score([(lm.encode(a), lm.encode(b)) for a, b in parts]))
    else:
        theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, max_length=10, add_bos_token=False)
        (wanted,) = theirs.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    request = SimpleNamespace(doc_id=0, args=(text,))
    assert _bridge_class()(lm, ["x"]).loglikelihood_rolling([request]) == [pytest.approx(wanted, abs=1e-4)]
