"""From scores to advantages, against numpy or a closed form, however the batch is spread or padded."""

import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ppo import Shaping

from policy.ppo.kl import adapt
from policy.ppo.reward_shaping import Moments
from policy.ppo.rollout import Rollout
from rlhf.recipe.schema import Ppo

ALONE = SimpleNamespace(all_sum=lambda tensor: tensor)
SEEDS = st.integers(0, 10_000)
PLAIN = {"missing_eos": "ignore", "whiten_advantages": False, "kl_coef": 0.0, "batch_size": 8}


class Together:
    """Processes as threads, whose ``all_sum`` is a real sum over all of them."""

    def __init__(self, world):
        self.world = world
        self.barrier = threading.Barrier(world, timeout=20)
        self.handed = [None] * world

    def all_sum(self, rank, tensor):
        self.handed[rank] = tensor
        self.barrier.wait()
        total = torch.stack([*self.handed]).sum(0)
        self.barrier.wait()
        return total

    def run(self, work):
        """The results of ``work(rank, runtime)`` on every process."""
        results = [None] * self.world

        def one(rank):
            runtime = SimpleNamespace(all_sum=lambda tensor: self.all_sum(rank, tensor))
            results[rank] = work(rank, runtime)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def drawn(seed=0, batch=8, width=5, scores=None, **changes):
    """A random rollout with NaN in its padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, width + 1, (batch,), generator=generator)
    actions = torch.arange(width) < lengths_B[:, None]

    def noise():
        return torch.where(actions, torch.randn(batch, width, generator=generator), torch.nan)

    fields = {
        "ids_BT": torch.zeros(batch, width + 3, dtype=torch.long),
        "mask_BT": torch.ones(batch, width + 3, dtype=torch.bool),
        "hidden_BTD": None,
        "actions_BR": actions,
        "sampled_log_probs_BR": noise(),
        "log_probs_BR": noise(),
        "reference_log_probs_BR": noise(),
        "entropy_BR": noise(),
        "values_BR": noise(),
        "scores_B": 3 * torch.randn(batch, generator=generator) + 1
        if scores is None
        else torch.tensor(scores),
        "ended_B": torch.rand(batch, generator=generator) < 0.5,
        "texts": [""] * batch,
        "start": 2,
    }
    return Rollout(**fields | changes)


def shaping(**section):
    return Shaping(Ppo(**PLAIN | section), ALONE)


def rows_of(rollout, rows):
    tensors = {k: v[rows] for k, v in rollout._asdict().items() if isinstance(v, torch.Tensor)}
    return rollout._replace(**tensors)


# ---- scores


@given(values=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), max_size=5))
def test_joined_moments_are_those_of_all_numbers_together(values):
    joined = Moments()
    for part in values:
        x = np.array(part)
        joined = joined.joined(Moments(len(x), x.mean(), x.var() * len(x)) if len(x) else Moments())
    x = np.concatenate([[], *map(np.array, values)])
    assert joined.number == len(x)
    if len(x):
        assert joined.mean == pytest.approx(x.mean(), abs=1e-9)
        assert joined.squares == pytest.approx(x.var() * len(x), rel=1e-9, abs=1e-6)
    spread = math.sqrt(joined.squares / len(x)) if len(x) else 0.0
    assert joined.deviation == (spread or 1.0)


def test_running_normalization_is_by_all_scores_so_far():
    built, seen = shaping(score_normalization="running"), []
    for seed in range(4):
        rollout = drawn(seed)
        seen.append(rollout.scores_B)
        so_far = torch.cat(seen)
        expected = (rollout.scores_B - so_far.mean()) / so_far.std(correction=0)
        torch.testing.assert_close(built.scores(rollout), expected, rtol=1e-5, atol=1e-5)
    assert built.shaper.moments.number == 32


def test_a_shaped_score_is_the_chance_to_beat_the_references_responses_or_its_logarithm():
    rollout = rows_of(drawn(), slice(0, 2))._replace(
        scores_B=torch.tensor([2.0, -1.0]), baseline_BM=torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    )
    chance = [[0.5, 1 / (1 + math.exp(-2))], [1 / (1 + math.e), 1 / (1 + math.exp(4))]]
    for kind, value in (("sigmoid", float), ("log_sigmoid", math.log)):
        built = shaping(score_shape=kind, reference_samples=2)
        expected = [sum(map(value, row)) / 2 for row in chance]
        assert built.scores(rollout).tolist() == pytest.approx(expected)
    far = rollout._replace(scores_B=torch.tensor([1e4, -1e4]))
    assert shaping(score_shape="sigmoid").scores(far).tolist() == [1.0, 0.0]
    assert shaping(score_shape="log_sigmoid").scores(far)[0] == 0
    clipped = shaping(score_shape="sigmoid", missing_eos="replace", missing_eos_penalty=3.0)
    ended = far._replace(ended_B=torch.tensor([True, False]))
    assert clipped.scores(ended).tolist() == [1.0, -3.0]  # the penalty is in the unit of the shaped score


def test_equal_scores_are_normalized_to_zero():
    rollout = drawn(scores=[0.1] * 8)
    assert shaping(score_normalization="running").scores(rollout).tolist() == [0.0] * 8


def test_scores_are_normalized_then_clipped_then_penalized_for_their_end_and_their_length():
    actions = torch.arange(5) < torch.tensor([[5], [2], [4]])
    rollout = rows_of(drawn(), slice(0, 3))._replace(
        scores_B=torch.tensor([0.0, 0.0, 6.0]),  # normalized: -0.71, -0.71, 1.41
        actions_BR=actions,
        ended_B=torch.tensor([True, False, False]),
    )
    low = -2 / math.sqrt(8)
    steps = {
        "score_normalization": ("running", [low, low, -2 * low]),
        "score_clip": (1.0, [low, low, 1.0]),
        "missing_eos": ("subtract", [low, low - 2, -1.0]),
        "length_penalty": (0.1, [low - 0.3, low - 2, -1.2]),
    }
    options = {"missing_eos_penalty": 2.0, "length_target": 2}
    for name, (value, expected) in steps.items():
        options[name] = value
        assert shaping(**options).scores(rollout).tolist() == pytest.approx(expected, abs=1e-5), name
    options |= {"missing_eos": "replace"}
    assert shaping(**options).scores(rollout).tolist() == pytest.approx([low - 0.3, -2, -2.2], abs=1e-5)


# ---- advantages


def test_rloo_is_the_return_less_the_mean_of_the_other_samples():
    built, rollout = shaping(algorithm="rloo", samples_per_prompt=4, kl_coef=0.2), drawn()
    targets = built(rollout)
    kl_B = torch.stack(
        [(p - r)[m].sum() for p, r, m in zip(rollout.log_probs_BR, rollout.reference_log_probs_BR,
                                             rollout.actions_BR, strict=True)]
    )  # fmt: skip
    returns_B = rollout.scores_B - 0.2 * kl_B
    for row in range(8):  # the samples of a prompt stand 8 / 4 rows apart
        group = [row % 2 + 2 * k for k in range(4)]
        others = returns_B[[r for r in group if r != row]].mean()
        mean = returns_B[group].mean()
        got = targets.advantages_BR[row][rollout.actions_BR[row]]
        torch.testing.assert_close(got, (returns_B[row] - others).expand(len(got)))
        torch.testing.assert_close(got, (4 / 3 * (returns_B[row] - mean)).expand(len(got)))


def test_reinforce_has_the_discounted_returns_to_go():
    rollout = drawn(1)
    targets = shaping(algorithm="reinforce", gamma=0.9, lam=0.3, kl_coef=0.2)(rollout)
    for b, t in rollout.actions_BR.nonzero().tolist():
        ahead = targets.rewards_BR[b, t:]
        expected = sum(float(r) * 0.9**k for k, r in enumerate(ahead))
        assert float(targets.advantages_BR[b, t]) == pytest.approx(expected, abs=1e-5)


def test_whitened_rewards_keep_their_mean_and_whitened_advantages_do_not():
    rollout = drawn(2)
    on = rollout.actions_BR
    raw = shaping(kl_coef=0.2)(rollout)
    white = shaping(kl_coef=0.2, whiten_rewards=True)(rollout)
    assert abs(float(raw.rewards_BR[on].mean())) > 0.05
    torch.testing.assert_close(white.rewards_BR[on].mean(), raw.rewards_BR[on].mean())
    assert float(white.rewards_BR[on].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(white.advantages_BR, raw.advantages_BR, atol=0.1)
    held = shaping(kl_coef=0.2, whiten_advantages=True)(rollout)
    torch.testing.assert_close(held.rewards_BR, raw.rewards_BR)
    x = raw.advantages_BR[on]
    torch.testing.assert_close(held.advantages_BR[on], (x - x.mean()) / x.std(correction=0))
    torch.testing.assert_close(held.returns_BR, raw.returns_BR)


@pytest.mark.parametrize(("algorithm", "whitens"), [("ppo", True), ("reinforce", True), ("rloo", False)])
def test_advantages_are_whitened_by_default_where_the_papers_do(algorithm, whitens):
    rollout = drawn(3)
    targets = shaping(algorithm=algorithm, samples_per_prompt=2, whiten_advantages=None)(rollout)
    spread = targets.advantages_BR[rollout.actions_BR].std(correction=0)
    assert (abs(float(spread) - 1) < 1e-3) == whitens


def test_a_price_in_the_loss_is_not_in_the_reward_too():
    rollout = drawn(4)
    inside = shaping(kl_coef=0.5, kl_in="loss", kl_estimator="k2")(rollout)
    torch.testing.assert_close(inside.rewards_BR, shaping(kl_coef=0.0)(rollout).rewards_BR)
    assert not torch.allclose(inside.rewards_BR, shaping(kl_coef=0.5)(rollout).rewards_BR, atol=0.1)


# ---- however it is spread and padded

OPTIONS = st.fixed_dictionaries(
    {
        "algorithm": st.sampled_from(["ppo", "rloo", "reinforce"]),
        "samples_per_prompt": st.just(2),
        "whiten_rewards": st.booleans(),
        "whiten_advantages": st.booleans(),
        "score_normalization": st.sampled_from(["none", "running"]),
        "score_clip": st.sampled_from([None, 1.0]),
        "missing_eos": st.sampled_from(["replace", "subtract", "ignore"]),
        "length_penalty": st.sampled_from([0.0, 0.1]),
        "kl_coef": st.just(0.2),
        "kl_controller": st.sampled_from(["fixed", "adaptive"]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "gamma": st.just(0.9),
    }
)


@settings(max_examples=40)
@given(seed=SEEDS, options=OPTIONS, more=st.integers(1, 4), filler=st.sampled_from([0.0, math.nan, 1e9]))
def test_more_padding_and_what_stands_in_it_changes_no_target(seed, options, more, filler):
    rollout = drawn(seed)
    wide = {}
    for name, tensor in rollout._asdict().items():
        if name.endswith("_BR"):
            empty = False if tensor.dtype == torch.bool else filler
            wide[name] = torch.cat([tensor, tensor.new_full((8, more), empty)], dim=1)
            if tensor.dtype != torch.bool:
                wide[name] = torch.where(
                    torch.cat([rollout.actions_BR, torch.zeros(8, more, dtype=torch.bool)], dim=1),
                    wide[name], filler,
                )  # fmt: skip
    first, second = shaping(**options), shaping(**options)
    narrow, broad = first(rollout), second(rollout._replace(**wide))
    first.controller.update(rollout)
    second.controller.update(rollout._replace(**wide))
    for name in ("rewards_BR", "advantages_BR", "returns_BR"):
        torch.testing.assert_close(
            torch.where(rollout.actions_BR, getattr(broad, name)[:, :5], 0), getattr(narrow, name)
        )
        assert (getattr(broad, name)[:, 5:] == 0).all()
    assert first.state() == second.state()


@settings(max_examples=25)
@given(seed=SEEDS, options=OPTIONS, world=st.sampled_from([2, 4]))
def test_the_processes_together_aim_as_one_alone(seed, options, world):
    section = Ppo(**PLAIN | options)
    steps = [drawn(seed), drawn(seed + 1)]
    alone = Shaping(section, ALONE)
    expected = []
    for rollout in steps:
        expected.append(alone(rollout))
        alone.controller.update(rollout)

    def work(rank, runtime):
        built, found = Shaping(section, runtime), []
        for rollout in steps:
            own = rows_of(rollout, slice(rank, None, world))
            found.append(built(own))
            built.controller.update(own)
        return found, built.state()

    for rank, (found, state) in enumerate(Together(world).run(work)):
        for got, whole in zip(found, expected, strict=True):
            for name in ("rewards_BR", "advantages_BR", "returns_BR"):
                part = getattr(whole, name)[rank::world]
                torch.testing.assert_close(getattr(got, name), part, rtol=1e-4, atol=1e-5)
        assert state["kl_coef"] == pytest.approx(alone.controller.coef)
        assert state["score_moments"] == pytest.approx(list(alone.shaper.moments))


# ---- what it remembers


def test_an_adaptive_coefficient_follows_the_kl_of_whole_responses_and_prices_the_next_step():
    options = {"kl_coef": 0.2, "kl_controller_target": 0.5, "kl_controller_horizon": 100}
    built, fixed, beta = shaping(kl_controller="adaptive", **options), shaping(**options), 0.2
    for seed in range(3):
        rollout = drawn(seed)
        gap = (rollout.log_probs_BR - rollout.reference_log_probs_BR)[rollout.actions_BR]
        cheap = shaping(kl_coef=beta)(rollout)
        torch.testing.assert_close(built(rollout).rewards_BR, cheap.rewards_BR)
        built.controller.update(rollout)
        fixed.controller.update(rollout)
        beta = adapt(beta, float(gap.sum()) / 8, target=0.5, horizon=100, n=8)
        assert built.controller.coef == pytest.approx(beta)
    assert abs(beta - 0.2) > 1e-3
    assert fixed.controller.coef == 0.2


def test_what_it_remembers_survives_json_exactly():
    options = {"kl_coef": 0.2, "kl_controller": "adaptive", "score_normalization": "running"}
    built, again = shaping(**options), shaping(**options)
    for seed in range(3):
        built(drawn(seed))
        built.controller.update(drawn(seed))
    again.restore(json.loads(json.dumps(built.state())))
    assert again.state() == built.state()
    assert again.state() != shaping(**options).state()
    for one, other in zip(built(drawn(9)), again(drawn(9)), strict=True):
        assert torch.equal(one, other)
