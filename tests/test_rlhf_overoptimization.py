"""The verdict on over-optimization, from logs whose truth is known."""

import numpy as np
import pytest
from audit_cases import PEAK, RISE, TIME, log

from rlhf.stats.overoptimization import exploited, series, turning_point, verdict


def ever_exploited(rows, steps):
    test, gap = series(rows, "test", steps), series(rows, "gap", steps)
    segments = (steps - 4) * (steps - 3) // 2
    return any(exploited(gap, test, end, segments) for end in range(steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0 * TIME, RISE], ids=["level", "both rise and end"])
@pytest.mark.parametrize("batch", [8, 32])
def test_a_false_alarm_at_any_look_is_as_rare_as_it_says(truth, batch):
    found = sum(ever_exploited(log(seed, truth, truth, batch), 40) for seed in range(60))
    assert found <= 6  # of 60 at 5%: 7 or more have a chance of 3% by chance, and it is far below 5%


def test_a_test_score_that_turns_is_found_with_its_step():
    found = [verdict(log(seed, 2 * np.sqrt(TIME), PEAK), 40) for seed in range(20)]
    assert {each["verdict"] for each in found} == {"over-optimized"}
    onset = sorted(each["onset"] for each in found)
    assert 15 <= onset[10] <= 19  # the truth is 16 or 17
    assert onset[2] >= 13
    assert onset[-3] <= 22
    assert all(each["onset"] < each["seen"] <= 35 for each in found)
    text = found[0]["text"]
    assert "Set ppo.keep_best=true" in text
    assert "audits and does not foresee" in text
    kept = verdict(log(0, 2 * np.sqrt(TIME), PEAK), 40, kept=15)["text"]
    assert "The saved policy is that of step 15" in kept


def test_a_test_score_that_rises_more_slowly_is_no_onset_but_told():
    found = [verdict(log(seed, RISE, 0.6 * RISE), 40)["verdict"] for seed in range(20)]
    assert found.count("over-optimized") == 0
    assert found.count("unconfirmed") >= 10
    honest = [verdict(log(seed, RISE, RISE), 40)["verdict"] for seed in range(20)]
    assert honest.count("no sign") >= 18


def test_intervals_of_the_changes_hold_the_truth():
    held = {"proxy": 0, "test": 0, "gap": 0}
    for seed in range(100):
        found = verdict(log(seed, 2 * TIME, TIME), 40)
        truth = {"proxy": 2 * TIME[-5:].mean(), "test": TIME[-5:].mean()}
        truth["gap"] = truth["proxy"] - truth["test"]
        for name, mean in truth.items():
            low, high = found[name]["ci95"]
            held[name] += low <= mean <= high
    assert all(90 <= number <= 100 for number in held.values()), held


def test_a_long_run_is_read_in_windows_and_a_run_in_progress_too():
    long = np.arange(1000) / 1000
    peak = np.minimum(long, 0.4) - 0.5 * np.maximum(long - 0.4, 0)
    rows = log(0, 2 * long, peak)
    assert len(series(rows, "gap", 1000).step_N) == 100
    assert 350 <= verdict(rows, 1000)["onset"] <= 450
    assert verdict(rows[:300], 1000)["onset"] is None
    assert verdict(rows[:1], 1000)["verdict"] == "unknown"
    assert verdict([], 10)["verdict"] == "unknown"


def test_the_turning_point_of_a_line_without_noise():
    rows = [
        {"step": s, "audit/test": v, "audit/test_error": 0.1} for s, v in enumerate([0, 1, 2, 3, 2, 1, 0], 1)
    ]
    assert turning_point(series(rows, "test", 7)) == 3
    fall = [row | {"audit/test": -row["step"]} for row in rows]
    assert turning_point(series(fall, "test", 7)) == 0


def plain(entropy, length, distinct):
    return [{"step": n + 1, "objective/kl": n / 2, "policy/entropy": entropy(n), "response/length": length(n),
             "response/distinct_2": distinct(n)} for n in range(20)]  # fmt: skip


def test_without_a_test_model_the_weaker_verdict_says_that_it_is():
    found = verdict(plain(lambda n: 3 - n / 10, lambda n: 10 + n, lambda n: 0.9), 20)
    assert found["verdict"] == "signs of a collapse"
    assert "entropy fell by 54%" in found["text"]
    assert "length rose by 125%" in found["text"]
    assert "distinct-2 fell" not in found["text"]
    assert "KL of 9.5 nats" in found["text"]
    calm = verdict(plain(lambda n: 3.0, lambda n: 10 + n % 3, lambda n: 0.9 - n / 1000), 20)
    assert calm["verdict"] == "no sign"
    for text in (found["text"], calm["text"]):
        assert "Without a test model nobody checks the score itself: reward.test_share=0.5" in text
    outlier = verdict(plain(lambda n: 3.0, lambda n: 999 if n == 19 else 10, lambda n: None), 20)
    assert outlier["trends"]["length"]["slope"] == 0  # robust
    assert outlier["verdict"] == "no sign"
    assert "distinct-2" not in outlier["trends"]
