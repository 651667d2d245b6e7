"""Soft prompts and policies as solutions: closed forms, and what must hold at the solutions themselves."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_inside import batch, llama
from torch import nn

from policy.inside.solutions.barriers import Point, compare, needed, over_pairs, points_of, verdict
from policy.inside.solutions.page import _compared
from policy.inside.solutions.policies import (
    BETWEEN,
    random_direction,
    read_policies,
    set_point,
    times_of,
    weighted,
)
from policy.inside.solutions.soft_prompts import losses, placed, tokens_of, train
from policy.inside.subject import EMBEDDINGS, Batch, of_model, of_role
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.recipe.schema import Lora
from rlhf.stats.intervals import Estimate

CORNERS = torch.eye(3)  # of an equilateral triangle with sides of length sqrt(2)


def square(point, corners=CORNERS):
    """|x|^2, where random directions lead into dimensions of their own."""
    step = 0.0
    if point.toward is not None:
        i, j = point.toward
        step = point.share**2 * float((corners[j] - corners[i]).square().sum())
    return float((torch.tensor(point.weights) @ corners).square().sum()) + step


def test_barriers_of_a_square_are_known():
    """|(1 - a) x + a y|^2 is below its chord by a (1 - a) |x - y|^2."""
    calls = []
    found = compare(3, square, tick=lambda: calls.append(1))
    assert len(calls) == points_of(3)
    for a, figure in found["along"]:
        assert figure["mean"] == pytest.approx(-a * (1 - a) * 2)
    assert found["inside"]["mean"] == pytest.approx(-0.1875 * 2)
    assert found["outside"]["mean"] == pytest.approx(0.75 * 2)
    assert found["random"]["mean"] == pytest.approx(0.25 * 2)
    assert found["centroid"] == pytest.approx(1 / 3 - 1)
    assert found["verdict"] == "UNDECIDED"  # pairs that do not differ have no interval
    corners = CORNERS * torch.tensor([1, 1.2, 1.4])
    assert compare(3, lambda point: square(point, corners))["verdict"] == "SUPPORTED"
    assert compare(3, lambda point: -square(point, corners))["verdict"] == "CONTRADICTED"
    noise = itertools.cycle([0.0, 3.0, -4.0, 5.0, 1.0, -2.0, 7.0])
    assert compare(3, lambda _: next(noise))["verdict"] == "UNDECIDED"


def test_rounding_is_no_verdict_and_the_page_says_why():
    calls = itertools.count()
    found = compare(3, lambda _: 2.0 + 1e-9 * (next(calls) % 7) ** 2)
    assert found["verdict"] == "UNDECIDED"
    found = compare(3, square)
    assert "pairs of solutions do not differ in this" in "".join(_compared(found, "+.4f"))


def test_intervals_over_pairs_and_how_many_solutions_it_takes():
    values = [0.2, 0.5, 1.1]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (over_pairs(values, 3).low, over_pairs(values, 3).high) == pytest.approx((low, high))
    more = needed(values, 3)
    spread = np.std(values, ddof=1)
    halves = [stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n * (n - 1) / 2) for n in (more - 1, more)]
    assert halves[1] < np.mean(values) < halves[0]
    assert needed([1.0, -1.0, 0.0], 3) == 100
    below, above, both = (Estimate(0, *ends, 3) for ends in ((-2, -1), (1, 2), (-1, 1)))
    assert verdict([below, below]) == "SUPPORTED"
    assert verdict([below, both]) == "UNDECIDED"
    assert verdict([both, above]) == "CONTRADICTED"


def test_vectors_that_are_embeddings_are_these_tokens():
    model, tokens = llama(), torch.tensor([3, 7, 5])
    subject, rows = of_model(model), batch()
    for wide in (0, 2):
        row = Batch(*(nn.functional.pad(x, (wide, 0)) for x in rows[:2]), rows.start + wide)
        found = losses(subject, row, model.model.embed_tokens.weight[tokens])
        longer = torch.cat([tokens.expand(len(rows.ids_BT), -1), rows.ids_BT], 1)
        expected = -subject.measure(Batch(longer, torch.ones_like(longer).bool(), rows.start + 3))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, losses(subject, rows))


def test_only_the_soft_prompt_learns_and_equal_seeds_give_equal_ones():
    model = llama()
    subject, rows = of_model(model), [batch(rows=2), batch(rows=2, seed=1)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again, other = (train(subject, rows, seed, length=2, steps=5) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    start = train(subject, rows, 0, length=2, steps=0)
    assert {tuple(x) for x in start.tolist()} <= {
        tuple(x) for x in before["model.embed_tokens.weight"].tolist()
    }
    with torch.no_grad():
        was, now = (sum(float(losses(subject, row, x).sum()) for row in rows) for x in (start, first))
    assert now < was - 0.1


def toy():
    """Log-probs by a softmax of a linear map of the sum of all embeddings: convex in a soft prompt, and one
    vector makes any response certain. The response is token 2, then token 3."""
    torch.manual_seed(0)
    embeddings, head = nn.Embedding(6, 5), torch.randn(5, 6)

    def measure(row):
        states_BD = embeddings(row.ids_BT[:, : row.start]).sum(1)
        return (states_BD @ head).log_softmax(-1).gather(1, row.ids_BT[:, row.start : row.start + 1])[:, 0]

    ids = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0]])
    row = Batch(ids, torch.ones_like(ids).bool(), 2)
    return SimpleNamespace(sites={EMBEDDINGS: embeddings}, measure=measure), row


def test_a_target_that_one_vector_solves_is_reached():
    subject, row = toy()
    assert tokens_of(row) == 2
    with torch.no_grad():
        assert float(losses(subject, row).max()) > 0.5
        assert float(losses(subject, row, train(subject, [row], 0, length=1, steps=200)).max()) < 0.01


def test_between_prompts_of_a_convex_loss_there_is_no_barrier_and_beyond_there_is():
    subject, row = toy()
    prompts = [train(subject, [row], seed, length=2, steps=10, rate=0.1) for seed in range(3)]

    @torch.no_grad()
    def loss(point):
        return float(losses(subject, row, placed(prompts, point, 0)).sum())

    found = compare(3, loss)
    assert found["ends"] == [loss(Point(w)) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for a, figure in found["along"]:
        assert figure["mean"] < -1e-4 if 0 < a < 1 else figure["mean"] > 1e-4
    assert found["centroid"] < 0
    way = placed(prompts, Point((0, 1, 0), (1, 2), 0.5), 0) - prompts[1]
    torch.testing.assert_close(way.norm(), 0.5 * (prompts[2] - prompts[1]).norm())


@pytest.fixture
def mixed(tmp_path):
    """A backbone with the role at a point, and three policies: its own and two folders."""
    backbone = Backbone(
        llama(), Lora(rank=2), adapters=["policy", "o1", "o2", BETWEEN], ranks={BETWEEN: times_of(3)}
    )
    torch.manual_seed(5)
    for name in ("policy", "o1", "o2"):
        for parameter in backbone.parameters_of(name).values():
            nn.init.normal_(parameter, std=0.3)
        backbone.save_adapter(name, tmp_path / name)
    return backbone, read_policies(backbone, [str(tmp_path / name) for name in ("o1", "o2")])


def test_at_a_policy_it_is_that_policy(mixed):
    backbone, policies = mixed
    between = of_role(backbone, BETWEEN)
    for weights, role in (
        ((1, 0, 0), "policy"),
        ((0, 1, 0), "o1"),
        ((0, 0, 1), "o2"),
        ((0, 0, 0), REFERENCE),
    ):
        set_point(backbone, policies, Point(weights), 0)
        expected = of_role(backbone, role).measure_plainly(batch())
        torch.testing.assert_close(between.measure_plainly(batch()), expected, atol=1e-5, rtol=1e-5)
        with backbone.folded(BETWEEN):
            torch.testing.assert_close(between.measure_plainly(batch()), expected, atol=1e-5, rtol=1e-5)


def updates(adapter):
    """B A of each map."""
    return {
        name: adapter[name] @ adapter[name.replace("lora_B", "lora_A")]
        for name in adapter
        if "lora_B" in name
    }


def test_between_policies_are_their_updates_and_random_steps_are_as_long(mixed):
    backbone, policies = mixed
    own = [updates(policy) for policy in policies]
    for name, found in updates(weighted(policies, [1.5, -0.5, 0.0])).items():
        torch.testing.assert_close(found, 1.5 * own[0][name] - 0.5 * own[1][name])
    set_point(backbone, policies, Point((0, 1, 0), (1, 2), 0.5), 0)
    there = updates({name: p.detach() for name, p in backbone.parameters_of(BETWEEN).items()})
    for name, found in there.items():
        step, way = found - own[1][name], own[2][name] - own[1][name]
        torch.testing.assert_close(step.norm(), 0.5 * way.norm())
        assert abs(float((step * way).sum() / step.norm() / way.norm())) < 0.9
    draws = [updates(random_direction(policies[0], policies[1], seed)) for seed in (0, 0, 1)]
    assert all(
        torch.equal(draws[0][n], draws[1][n]) and not torch.equal(draws[0][n], draws[2][n]) for n in own[0]
    )
