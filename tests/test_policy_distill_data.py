"""What context distillation is done on, how it is divided, and the figures that come of it."""

import json
from pathlib import Path

import pytest
from conftest import stage, tiny_recipe
from tiny_distill import overrides, passage, results, run

from policy.distillation.data import Frame, content_hash, question, questions, split, texts
from policy.distillation.evaluation import Measured, figures, lines
from policy.distillation.trainer import batch_rows
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Comparison, Counts, Message
from rlhf.data.split import split_by_hash
from rlhf.errors import UserError
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context

# ---- data


def test_texts_become_windows_and_all_of_one_row_stay_together(tmp_path, distill_lab):
    recipe = tiny_recipe(*overrides())
    dialogue = load_dialogue(recipe)
    frame = Frame(Context.read("prompt.txt", dialogue), Context.none(dialogue), dialogue, 10)
    plain = distill_lab / "a.txt"
    plain.write_text("one line\n\nanother line\nx\n", encoding="utf-8")
    whole = "one line\nanother line\nx\n"
    decode = dialogue.tokenizer.decode
    found = list(texts([str(plain)], frame))
    assert [decode(p.ids) for p in found] == [whole[i : i + 10] for i in range(0, len(whole), 10)]
    assert len({p.group for p in found}) == len(found)
    assert decode(found[0].teacher_prefix) == "<|start|>user\n"
    assert (len(found[0].student_prefix), found[0].first) == (0, 1)
    rows = distill_lab / "a.jsonl"
    rows.write_text(json.dumps({"text": "b" * 25}) + "\n" + json.dumps({"text": "cc"}) + "\n")
    found = list(texts([str(rows)], frame))
    assert [len(p.ids) for p in found] == [10, 10, 5, 2]
    assert len({p.group for p in found}) == 2


def test_a_row_without_text_is_named(distill_lab):
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: no text; distill\.texts wants"):
        run(texts="bad.jsonl")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_question_and_its_best_answer_are_read_alike_with_and_without_the_prompt(template, distill_lab):
    recipe = tiny_recipe(*overrides(dialogue__template=template))
    dialogue = load_dialogue(recipe)
    dialogue.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|start|>system\nHm.<|end|>\n{% endif %}"
        + (dialogue.tokenizer.chat_template)
    )
    frame = Frame(Context.read("prompt.txt", dialogue), Context.none(dialogue), dialogue, 200)
    comparison = Comparison((Message("user", "Why?"),), ("No.", "Because."), (1, 0), "me")
    found = question(comparison, "g", frame)
    decode = dialogue.tokenizer.decode
    if template == "chat":
        assert decode(found.student_prefix) == "<|start|>system\nHm.<|end|>\n"
        assert decode(found.ids) == "<|start|>user\nWhy?<|end|>\n<|start|>assistant\nBecause.<|end|>"
        assert (found.first, decode(found.ids[found.response_start :])) == (0, "Because.<|end|>")
        alone = [*found.student_prefix, *found.ids[: found.response_start]]
        assert alone == dialogue.encode_prompt(comparison.prompt)
    else:
        assert len(found.student_prefix) == 0
        assert decode(found.ids) == "Human: Why?\n\nAssistant: Because."
        assert (found.first, decode(found.ids[found.response_start :])) == (1, " Because.")
    assert len(found.teacher_prefix) == 0
    short = frame._replace(max_tokens=found.response_start)
    assert question(comparison, "g", short) is None
    cut_off = question(comparison, "g", frame._replace(max_tokens=found.response_start + 3))
    assert len(cut_off.ids) == found.response_start + 3


def test_the_runs_own_comparisons_are_the_default(distill_lab):
    options = {"questions": ..., "data__comparisons": "more.jsonl", "dialogue__max_prompt_tokens": 200}
    with pytest.raises(UserError, match="distill needs the comparisons stage"):
        run(**options)
    stage(collect.main, *overrides(**options))
    folder = run(**options)
    assert results(folder)["counts"]["questions"]["sequences"] == 12
    own = Path("runs/tiny/comparisons/train.jsonl").read_text().splitlines()
    assert results(folder)["counts"]["questions"]["counts"]["read"] == len(own)


def test_every_group_is_on_one_side_whatever_else_there_is():
    some = [passage(f"text {n}", group=str(n // 2)) for n in range(40)]
    train, held = split(some, 0.3, seed=3)
    assert not {p.group for p in train} & {p.group for p in held}
    assert len(train) + len(held) == 40
    assert 4 <= len({p.group for p in held}) <= 9
    fewer = split(some[::2][:12], 0.3, seed=3)
    for side, whole in zip(fewer, (train, held), strict=True):
        assert {p.group for p in side} <= {p.group for p in whole} or not side
    assert split(some[:4], 0.001, seed=0)[1]
    with pytest.raises(UserError, match=r"distill\.texts: only one text or prompt"):
        split(some[:2], 0.3, seed=0)


def test_every_pass_goes_over_all_rows_once():
    rows = [batch_rows(3, step, 4, 10) for step in range(6)]
    assert [len(batch) for batch in rows] == [4, 4, 2] * 2
    for epoch in (rows[:3], rows[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(10))
    assert rows[:3] != rows[3:]


def test_the_hash_of_the_data_is_about_what_the_teacher_reads():
    some = [passage("abc", teacher_prefix="x"), passage("de")]
    assert content_hash(some) == content_hash([one._replace(group="other", first=0) for one in some])
    for other in (
        [passage("ab", teacher_prefix="xc"), some[1]],
        some[::-1],
        some[:1],
        [passage("abc"), some[1]],
    ):
        assert content_hash(other) != content_hash(some)


def test_a_question_that_came_before_is_not_asked_again(distill_lab):
    counts = Counts(read=3)
    dialogue = load_dialogue(tiny_recipe())
    frame = Frame(Context.none(dialogue), Context.none(dialogue), dialogue, 50)
    asked = [Comparison((Message("user", q),), ("a", "b"), (0, 1), "me") for q in ("x?", "y?", "x?")]
    assert len(list(questions(asked, frame, counts))) == 2
    assert counts.dropped == {"prompt that came before": 1}


# ---- figures


def test_figures_are_ratios_of_sums():
    first = [4.0, 6.0, 2.0], [2, 4, 2], [-8, -9, -4], [-4, -7, -3], [2, 2, 1]
    then = [2.0, 0.5, 0.5], [2, 4, 2], [-5, -8, -3], [-4, -7, -3], [2, 2, 1]
    before = Measured(*(column * 3 for column in first), [5.0], [4.0])
    after = Measured(*(column * 3 for column in then), [2.0], [1.0])
    found = figures(before, after, ["texts", "questions", "questions"] * 3, [*"abbcddeff"])
    assert found["kl_before"]["mean"] == 12 / 8
    assert found["kl_after"]["mean"] == 3 / 8
    assert found["kl_recovered"]["mean"] == 0.75
    assert found["kl_recovered"]["n"] == 6  # groups
    assert found["prompt_gain"]["mean"] == (4 + 2 + 1) / 5
    assert found["distilled_gain"]["mean"] == (3 + 1 + 1) / 5
    assert found["full_kl_before"]["mean"] == 2.5
    assert found["full_coarse_kl_before"]["mean"] == 2.0
    assert found["full_kl_recovered"]["mean"] == pytest.approx(0.6)
    assert found["questions"]["kl_recovered"]["mean"] == 1 - 1 / 8
    assert (found["texts"]["sequences"], found["texts"]["tokens"]) == (3, 6)
    low, high = found["kl_recovered"]["ci95"]
    assert low < 0.75 < high
    assert found["log_prob_recovered"]["mean"] == pytest.approx(5 / 7)
    assert any("75.0% [" in line for line in lines(found))


def test_a_gain_that_cannot_be_told_from_0_has_no_share():
    one = Measured([1.0] * 4, [1] * 4, [-1.0] * 4, [-0.5, -1.5, -0.6, -1.4], [1] * 4, [], [])
    found = figures(one, one, ["texts"] * 4, list("abcd"))
    assert found["log_prob_recovered"] is None
    assert "full_kl_before" not in found
    assert any("is not distinguishable from 0" in line for line in lines(found))
    nothing = one._replace(kl=[0.0] * 4)
    assert figures(nothing, nothing, ["texts"] * 4, list("abcd"))["kl_recovered"]["mean"] is None


def test_the_prompts_that_the_comparisons_stage_has_left_over_are_split_anew():
    """Another hash than that of the comparisons, of which the training part has what is above its share."""
    left, _ = split_by_hash([f"{number:064x}" for number in range(400)], str, 0.1, "0")
    held = split([passage("a", group=key) for key in left], 0.1, seed=0)[1]
    assert 15 < len(held) < 60
