"""lm-eval's own tasks on local rows: choices, generation, pairs, and bad input."""

import pytest
from tiny_evaluate import language_model, write_rows

from rlhf.errors import UserError
from rlhf.evals.outcome import paired
from rlhf.evals.registry import canonical, draw, task_spec

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
    with pytest.raises(UserError, match="expected fields answerKey, choices, question") as caught:
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
        ("mmlu", "mmlu is a group of lm-eval: name its tasks one by one"),
        ("mbpp", "runs generated code without a sandbox; use humaneval"),
    ],
)
def test_a_name_that_cannot_be_run_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message):
        canonical(name)


def test_rolling_log_likelihood_is_that_of_the_whole_text(tmp_path):
    from types import SimpleNamespace

    from rlhf.evals.harness import _bridge_class

    lm = language_model()
    bridge = _bridge_class()(lm, {"t": ["x"]})
    request = SimpleNamespace(task_name="t", doc_id=0, args=("some plain text",))
    (whole,) = lm.score([([], lm.encode("some plain text"))])
    assert bridge.loglikelihood_rolling([request]) == [pytest.approx(whole.log_prob)]
