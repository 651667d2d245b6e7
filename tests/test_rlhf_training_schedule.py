"""Learning rates over the steps: ends, warm-up and floor."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_ppo import SMALL, trainer

from rlhf.training.metrics import read_metrics
from rlhf.training.schedule import learning_rate_factor


def factors(kind, steps, warmup=0):
    return [learning_rate_factor(step, steps, kind=kind, warmup=warmup) for step in range(steps)]


def test_the_schedules_by_their_numbers():
    assert factors("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert factors("constant", 3) == [1, 1, 1]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert factors("cosine", 4) == pytest.approx(cosine)
    assert factors("cosine_with_min_lr", 4) == pytest.approx([0.1 + 0.9 * factor for factor in cosine])
    assert factors("linear", 6, warmup=2) == pytest.approx([0.1, 0.55, 1, 0.75, 0.5, 0.25])
    assert factors("constant", 4, warmup=3) == pytest.approx([0.1, 0.4, 0.7, 1])


@pytest.mark.parametrize(
    ("kind", "end"), [("linear", 0.0), ("cosine", 0.0), ("cosine_with_min_lr", 0.1), ("constant", 1.0)]
)
def test_a_schedule_goes_from_the_peak_towards_its_end(kind, end):
    assert factors(kind, 1000)[0] == 1
    assert factors(kind, 1000)[-1] == pytest.approx(end, abs=1.1e-3)
    assert learning_rate_factor(1000, 1000, kind=kind) == pytest.approx(end)


@given(
    kind=st.sampled_from(["linear", "cosine", "cosine_with_min_lr", "constant"]),
    steps=st.integers(1, 60),
    data=st.data(),
)
def test_a_rate_rises_to_the_peak_and_never_rises_again(kind, steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    all_of_them = factors(kind, steps, warmup)
    assert all_of_them[warmup] == 1
    rising, falling = all_of_them[: warmup + 1], all_of_them[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < factor <= 1 for factor in all_of_them)
    if warmup:
        assert rising[0] == pytest.approx(0.1)
    if kind == "cosine_with_min_lr":
        assert min(falling) >= 0.1


def test_policy_and_value_follow_the_same_schedule_from_peaks_of_their_own(tmp_path):
    rates = {"learning_rate": 1e-3, "value_learning_rate": 3e-3}
    built = trainer(tmp_path, **SMALL | rates, steps=3, schedule="cosine", warmup_steps=1, value_warmup=2)
    seen, real = [], built.runtime.set_learning_rates
    built.runtime.set_learning_rates = lambda rates: (seen.append(list(rates)), real(rates))
    built.train()
    expected = factors("cosine", 3, warmup=1)
    assert [value for _, value in seen] == pytest.approx([3e-3 * f for f in expected])
    assert [policy for policy, _ in seen] == pytest.approx([0, 0, 1e-3 * expected[2]])
    logged = [row["policy/learning_rate"] for row in read_metrics(tmp_path)]
    assert logged == [policy for policy, _ in seen]
    assert [group["lr"] for group in built.runtime.optimizer.param_groups] == seen[-1]
