"""Which prompts, rows and texts come when, whatever the number of processes; PPO-ptx and its loss."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ppo import SMALL, TOKENIZER, trainer

from policy.ppo.batching import (
    PtxBatches,
    micro_batches,
    minibatch_rows,
    own_rows,
    prompt_indices,
    prompt_of_row,
    read_texts,
)
from rlhf.errors import UserError
from rlhf.recipe.schema import Ppo
from rlhf.training.metrics import read_metrics

DIALOGUE = SimpleNamespace(tokenizer=TOKENIZER, pad_id=0)
SEEDS = st.integers(0, 2**64)
TEXTS = ["a plain line", "and another one, longer", "xyz", "four of him"]


# ---- prompts and rows


@given(seed=SEEDS, batch_size=st.integers(1, 9), available=st.integers(1, 12))
def test_every_prompt_is_visited_once_a_pass(seed, batch_size, available):
    steps = -(-3 * available // batch_size)
    visited = [i for step in range(steps) for i in prompt_indices(seed, step, batch_size, available)]
    for first in range(0, 3 * available, available):
        assert sorted(visited[first : first + available]) == list(range(available))


def test_passes_and_seeds_have_orders_of_their_own():
    orders = [tuple(prompt_indices(seed, step, 20, 20)) for seed in (0, 1) for step in (0, 1, 2)]
    assert len(set(orders)) == 6


@given(
    seed=SEEDS,
    step=st.integers(0, 5),
    epoch=st.integers(0, 3),
    minibatches=st.integers(1, 4),
    size=st.sampled_from([4, 8]),
)
def test_the_processes_together_take_the_same_minibatches_as_one_alone(seed, step, epoch, minibatches, size):
    batch_size = minibatches * size
    unions = []
    for world in (1, 2, 4):
        union = [[] for _ in range(minibatches)]
        for rank in range(world):
            own = own_rows(batch_size, rank, world)
            assert len(own) == batch_size // world
            parts = minibatch_rows(
                batch_size, minibatches, seed=seed, step=step, epoch=epoch, rank=rank, world=world
            )
            for whole, part in zip(union, parts, strict=True):
                assert len(part) == size // world
                whole.extend(own[i] for i in part)
        assert sorted(row for part in union for row in part) == list(range(batch_size))
        unions.append([sorted(part) for part in union])
    assert unions[0] == unions[1] == unions[2]


def test_epochs_and_steps_are_shuffled_anew():
    drawn = {
        str(minibatch_rows(16, 4, seed=seed, step=step, epoch=epoch, rank=0, world=1))
        for seed in (0, 1)
        for step in (0, 1)
        for epoch in (0, 1)
    }
    assert len(drawn) == 8


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 5), data=st.data())
def test_micro_batches_are_a_partition_by_length(lengths, size, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    parts = [part.tolist() for part in micro_batches(rows, torch.tensor(lengths), size)]
    flat = [row for part in parts for row in part]
    assert sorted(flat) == sorted(rows)
    assert all(len(part) == size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= size
    assert [lengths[row] for row in flat] == sorted(lengths[row] for row in rows)


def test_each_row_of_a_rollout_has_a_prompt_and_samples_of_a_prompt_share_a_process():
    assert prompt_of_row(6, 1, 4) == [0, 1, 2, 3, 4, 5]
    assert prompt_of_row(6, 3, 2) == [0, 1, 0, 1, 0, 1]
    for world in (1, 2, 4):
        owners = {}
        for rank in range(world):
            for row in own_rows(16, rank, world):
                owners.setdefault(prompt_of_row(16, 4, world)[row], []).append(rank)
        assert sorted(owners) == [0, 1, 2, 3]
        assert all(len(ranks) == 4 and len(set(ranks)) == 1 for ranks in owners.values())


# ---- texts


def runtime(rank=0, world=1):
    return SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"), all_sum=lambda tensor: tensor)


def batches(file, *, rank=0, world=1, seed=0, **section):
    options = {"ptx_coef": 1.0, "ptx_texts": [str(file)], "ptx_batch_size": 2} | section
    return PtxBatches(Ppo(**options), DIALOGUE, runtime(rank, world), seed)


def written(folder, rows, name="texts.txt"):
    file = folder / name
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return file


def rows_of(texts):
    return [tuple(ids[mask].tolist()) for ids, mask in zip(texts.ids_BT, texts.mask_BT, strict=True)]


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


# ---- reading


def test_lines_and_text_fields_are_read_alike_and_long_ones_are_cut(tmp_path):
    plain = written(tmp_path, TEXTS)
    rows = written(tmp_path, [json.dumps({"text": text, "more": 1}) for text in TEXTS], "texts.jsonl")
    assert read_texts([str(plain)], DIALOGUE, 100) == [ids_of(text) for text in TEXTS]
    assert read_texts([str(rows)], DIALOGUE, 100) == [ids_of(text) for text in TEXTS]
    pieces = read_texts([str(plain), str(rows)], DIALOGUE, 5)
    assert max(map(len, pieces)) == 5
    whole = [ids_of(text)[i : i + 5] for text in TEXTS for i in range(0, len(ids_of(text)), 5)]
    assert pieces == [piece for piece in whole if len(piece) > 1] * 2
    assert any(len(piece) == 1 for piece in whole)


@pytest.mark.parametrize(
    ("rows", "line"), [([{"text": "fine"}, {"txt": "no"}], 2), ([{"text": 3}], 1), ([{"text": "a"}, 7], 2)]
)
def test_a_row_without_text_is_named_by_file_and_line(rows, line, tmp_path):
    file = written(tmp_path, map(json.dumps, rows), "bad.jsonl")
    with pytest.raises(UserError, match=rf"bad\.jsonl:{line}: .*text") as caught:
        read_texts([str(file)], DIALOGUE, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("lines", "longest"), [(["a", "b"], 10), (TEXTS, 1)])
def test_a_text_needs_two_tokens(lines, longest, tmp_path):
    with pytest.raises(UserError, match=r"no text of two tokens or more in .*texts\.txt"):
        read_texts([str(written(tmp_path, lines))], DIALOGUE, longest)


def test_texts_must_divide_into_the_processes(tmp_path):
    with pytest.raises(UserError, match="ptx_batch_size 3 does not divide into 2 processes"):
        batches(written(tmp_path, TEXTS), world=2, ptx_batch_size=3)


# ---- drawing


@settings(max_examples=30)
@given(number=st.integers(1, 9), size=st.integers(1, 4), seed=st.integers(0, 2**64))
def test_every_piece_comes_once_a_pass(number, size, seed, tmp_path_factory):
    file = written(tmp_path_factory.mktemp("ptx"), [chr(97 + k) * (k + 2) for k in range(number)])
    drawer = batches(file, ptx_batch_size=size, seed=seed)
    drawn = [row for step in range(-(-3 * number // size)) for row in rows_of(drawer(step))]
    for first in range(0, 3 * number, number):
        assert sorted(drawn[first : first + number]) == sorted(map(tuple, drawer.pieces))


def test_the_processes_together_draw_what_one_alone_draws(tmp_path):
    file = written(tmp_path, TEXTS)
    for step in range(3):
        alone = rows_of(batches(file, ptx_batch_size=4)(step))
        parts = [rows_of(batches(file, ptx_batch_size=4, rank=rank, world=2)(step)) for rank in (0, 1)]
        assert [parts[row % 2][row // 2] for row in range(4)] == alone


def test_all_but_the_first_token_is_wanted(tmp_path):
    texts = batches(written(tmp_path, TEXTS), ptx_batch_size=4)(0)
    assert texts.ids_BT.shape == (4, max(len(ids_of(text)) for text in TEXTS) + 1)  # a closing column
    assert texts.wanted_BR.sum(-1).tolist() == [len(row) - 1 for row in rows_of(texts)]
    assert int(texts.total) == sum(len(ids_of(text)) - 1 for text in TEXTS)
    assert not texts.mask_BT[:, -1].any()


# ---- the loss


def nll(built, rows):
    """Mean over all wanted tokens, from the base's own logits, a row at a time."""
    built.backbone.activate("policy")
    terms = []
    for row in rows:
        ids = torch.tensor([row])
        logp = built.backbone.base(ids).logits[0, :-1].log_softmax(-1)
        terms.append(-logp.gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(terms).mean()


@pytest.mark.parametrize("micro", [2, 8])
def test_the_loss_is_the_mean_nll_of_all_tokens_and_its_gradient_is_added_with_its_weight(micro, tmp_path):
    file = written(tmp_path, TEXTS)
    gradients, losses = {}, {}
    options = SMALL | {"steps": 1, "ptx_batch_size": 4, "ptx_texts": [str(file)], "micro_batch_size": micro}
    for coef in (0.5, 4.0):
        built = trainer(tmp_path / str(coef), stir=0.1, start=True, ptx_coef=coef, **options)
        named = built.backbone.parameters_of("policy")

        def step(built=built, named=named, coef=coef, real=built.runtime.step):
            gradients[coef] = {n: p.grad.clone() for n, p in named.items()}
            built.runtime.discard_gradients()
            expected = nll(built, rows_of(built.update.texts(0)))
            losses[coef] = float(expected.detach())
            expected.backward()
            gradients["exact"] = {n: p.grad.clone() for n, p in named.items()}
            return real()

        built.runtime.step = step
        built.train()
        assert read_metrics(tmp_path / str(coef))[0]["ptx/loss"] == pytest.approx(losses[coef], rel=1e-5)
    assert losses[0.5] == losses[4.0]
    for name, exact in gradients["exact"].items():
        torch.testing.assert_close(
            gradients[4.0][name] - gradients[0.5][name], 3.5 * exact, rtol=1e-3, atol=1e-5
        )


def test_every_optimizer_step_has_texts_of_its_own_and_a_resumed_run_the_same(tmp_path):
    file = written(tmp_path, TEXTS)
    options = {"ptx_coef": 1.0, "ptx_texts": [str(file)], "ptx_batch_size": 2, "epochs": 2, "minibatches": 2}
    asked = []
    built = trainer(tmp_path / "run", **SMALL | options)
    real = built.update.texts
    built.update.texts = lambda number: (asked.append(number), real(number))[1]
    built.train()
    assert asked == list(range(8))


def test_the_policy_learns_the_texts(tmp_path):
    file = written(tmp_path, ["hello hello hello"])
    options = {"ptx_coef": 10.0, "ptx_texts": [str(file)], "steps": 8, "learning_rate": 2e-2}
    trainer(tmp_path / "run", **SMALL | options).train()
    losses = [row["ptx/loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
