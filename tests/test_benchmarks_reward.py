"""The two sides of the reward benchmark on a tiny model: the same rows, adapter and steps, and the counts."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from torch.optim import optimizer as torch_optimizer

from benchmarks.reward.sides import (
    Reading,
    Task,
    Watch,
    dialogue_of,
    measured,
    ours,
    pairs_of,
    prepare,
    recipe_of,
    response_tokens_in,
    response_tokens_of,
    theirs,
)
from benchmarks.synthetic_hh import hh_shaped
from rlhf.data.comparisons import Comparison, Message, write_native
from rlhf.errors import UserError
from rlhf.models.tiny import write_tiny_model

LAYERS = 3  # of the tiny model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(base):
    """Six pairs and four rankings of four."""
    return {k: prepare(base, [], k, n, 256, 0, scale=0.12) for k, n in ((2, 6), (4, 4))}


@pytest.fixture(scope="module")
def figures(base, rows, tmp_path_factory):
    """Figures by (responses, layers, side)."""
    found = {}
    for responses, layers in ((2, "all"), (2, "top_1"), (4, "all")):
        task = Task(base, "", layers, batch_size=2)
        for side in (ours, theirs):
            folder = tmp_path_factory.mktemp("scratch")
            found[responses, layers, side.__name__] = side(task, rows[responses], folder)
    return found


def test_rows_are_short_enough_numbered_and_those_of_the_made_comparisons(base, rows):
    dialogue = dialogue_of(base, 256)
    made = itertools.islice(hh_shaped(0, 2, 0.12), 100)
    prompts = [dialogue.encode_prompt(c.prompt) for c in made if len(c.prompt) == 1]
    assert [row["index"] for row in rows[2]] == list(range(6))
    assert all(len(r["prompt"]) + len(x) <= 256 for k in (2, 4) for r in rows[k] for x in r["responses"])
    assert all(x[-1] == dialogue.eos_id for row in rows[2] for x in row["responses"])
    assert sum(row["prompt"] in prompts for row in rows[2]) >= 1


def test_files_give_the_best_untied_responses_in_their_order(base, tmp_path):
    def ranked(name, *ranks):
        texts = tuple(f"{name}{rank}-{place}" for place, rank in enumerate(ranks))
        return Comparison((Message("user", name),), texts, ranks, "test")

    long = Comparison((Message("user", "x" * 200),), ("a", "b" * 90), (0, 1), "test")
    file = tmp_path / "some.jsonl"
    write_native(file, [ranked("a", 1, 0), ranked("b", 4, 2, 0, 3, 1), ranked("c", 0, 1, 1, 2), long])
    dialogue = dialogue_of(base, 256)

    def texts(k, n):
        found = prepare(base, [str(file)], k, n, 256, 0)
        return [[dialogue.decode(x) for x in row["responses"]] for row in found]

    assert texts(2, 1) == [["a0-1", "a1-0"]]
    assert texts(4, 1) == [["b0-2", "b1-4", "b2-1", "b3-3"]]
    with pytest.raises(UserError, match=r"some.jsonl: 1 comparisons with 2 untied .* 2 are wanted"):
        texts(2, 2)


def test_a_ranking_of_four_is_six_pairs_the_better_one_chosen():
    row = {"prompt": [9, 9], "responses": [[1], [2, 2], [3], [4]], "ranks": [0, 1, 2, 3], "index": 7}
    pairs = list(pairs_of([row]))
    found = [(p["chosen_ids"][2], p["rejected_ids"][2]) for p in pairs]
    assert found == [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert all(p["chosen_ids"][:2] == p["rejected_ids"][:2] == [9, 9] for p in pairs)
    assert response_tokens_in(pairs) == response_tokens_of([row]) == 5
    other = {**row, "index": 8}
    assert response_tokens_in(pairs_of([row, other])) == 10


def test_both_sides_do_the_same_work(figures, rows):
    for (responses, layers, _), one in figures.items():
        number = len(rows[responses])
        assert one["comparisons"] == number
        assert one["steps"] == len(one["step_s"]) == len(one["losses"]) == number // 2
        assert one["comparisons_steady"] == number - 2
        assert one["response_tokens"] == response_tokens_of(rows[responses])
        assert all(0.2 < loss < 2 for loss in one["losses"])
        other = figures[responses, layers, "ours"]
        assert one["trainable_parameters"] == other["trainable_parameters"]
    whole, top = (figures[2, layers, "theirs"]["trainable_parameters"] for layers in ("all", "top_1"))
    assert (whole - 32) == LAYERS * (top - 32)  # the head has 32 weights and no bias


def test_theirs_forwards_every_pair_of_a_step_at_once(figures, rows):
    """A pass is twelve pairs, so its rows are padded to the longest of all its sequences."""
    assert figures[4, "all", "theirs"]["pairs_at_once"] == 12
    assert figures[2, "all", "theirs"]["pairs_at_once"] == 2
    longest = [max(len(r["prompt"]) + len(x) for x in r["responses"]) for r in rows[4]]
    positions = figures[4, "all", "theirs"]["positions_per_comparison"] * 2  # of the second step, 24 rows
    assert 24 * min(longest) <= positions <= 24 * max(longest)
    assert positions % 24 == 0


def test_ours_forwards_a_prompt_once_and_counts_the_trunk(figures, rows):
    packed = [len(r["prompt"]) + sum(map(len, r["responses"])) for r in rows[2]]
    found = figures[2, "all", "ours"]
    assert found["prompts_shared"]
    assert not found["trunk_kept"]
    assert found["trunk_s"] < 0.1 * found["whole_s"]
    assert min(packed) <= found["positions_per_comparison"] <= max(packed)
    top = figures[2, "top_1", "ours"]
    assert top["trunk_kept"]
    assert top["trunk_s"] > 0
    # a third of the positions is the top layer's; the trunk's check goes over some of them again
    assert top["positions_per_comparison"] > sum(packed) / len(packed) * 0.99


def test_accumulating_smaller_passes_makes_the_same_steps_of_theirs(base, rows, tmp_path, figures):
    task = Task(base, "", "all", batch_size=2, their_pairs_at_once=1)
    found = theirs(task, rows[2], tmp_path)
    whole = figures[2, "all", "theirs"]
    assert found["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert found["positions_per_comparison"] < whole["positions_per_comparison"]
    assert found["steps"] == whole["steps"]
    with pytest.raises(UserError, match="divisor of 2"):
        theirs(replace(task, their_pairs_at_once=3), rows[2], tmp_path)


def test_steady_leaves_out_the_first_step_and_takes_its_share_of_the_trunk(base):
    from reward.model.model import new_reward_model
    from rlhf.tokenization.dialogue import load_dialogue

    recipe = recipe_of(Task(base, "", "all", 1))
    watch = Watch(new_reward_model(recipe, load_dialogue(recipe)))
    watch.start = Reading(100.0, 10.0, 0.0)
    watch.trunk = Reading(8.0, 4.0, 40.0)
    watch.steps = [Reading(120.0, 20.0, 50.0), Reading(130.0, 26.0, 80.0), Reading(150.0, 38.0, 140.0)]
    found = watch.figures(comparisons=16, batch_size=4)
    assert found["step_s"] == [20.0, 10.0, 20.0]
    assert found["comparisons_steady"] == 12
    assert found["steady_s"] == 30.0 + 0.75 * 8
    assert found["s_per_comparison"] == pytest.approx(36 / 12)
    assert found["comparisons_per_s"] == pytest.approx(12 / 36)
    assert found["cpu_s_per_comparison"] == pytest.approx(21 / 12)
    assert found["positions_per_comparison"] == pytest.approx((90 + 30) / 12)
    assert found["whole_s"] == 50.0
    assert found["whole_s_per_comparison"] == 50 / 16
    assert found["peak_bytes"] > 1e7


def test_theirs_in_bfloat16_and_under_autocast_trains_the_same_adapters(base, rows, tmp_path, figures):
    losses = {"float32": figures[2, "all", "theirs"]["losses"]}
    for dtype in ("bfloat16", "autocast"):
        found = theirs(Task(base, "", "all", batch_size=2, dtype=dtype), rows[2], tmp_path / dtype)
        losses[dtype] = found["losses"]
    assert losses["bfloat16"] != losses["float32"] != losses["autocast"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["autocast"] == pytest.approx(losses["float32"], abs=0.05)


def test_no_hook_outlives_a_measurement(figures):
    assert figures
    assert not torch_optimizer._global_optimizer_post_hooks


def test_a_training_that_lost_responses_is_refused(base, rows, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": rows[2]}))
    task, expected = Task(base, str(file), "all", batch_size=2), response_tokens_of(rows[2])

    def fake(lost):
        return lambda *_: {"response_tokens": expected - lost, "losses": [0.7, 0.6]}

    with pytest.raises(RuntimeError, match=f"{expected - 1} response tokens .* of {expected}"):
        measured(fake(1), task)
    found = measured(fake(0), task)
    assert (found["first_loss"], found["final_loss"]) == (0.7, 0.6)
    assert base not in json.dumps(found)
