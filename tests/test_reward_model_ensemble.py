"""Several reward models as one score, against sums by hand; and which folders make an ensemble."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.model.ensemble import check_one_base, combine, member_folders, spread
from reward.model.model import CONFIG, RewardModelConfig
from rlhf.errors import UserError

SCORES = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=n, max_size=n), min_size=2, max_size=5)
)


def by_hand(scores, how, penalty):
    """The combination of each column, in Python floats."""
    out = []
    for column in zip(*scores, strict=True):
        mean = sum(column) / len(column)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in column) / len(column))
        out.append({"mean": mean, "minimum": min(column), "pessimistic": mean - penalty * deviation}[how])
    return out


@given(scores=SCORES, penalty=st.floats(0, 3), how=st.sampled_from(["mean", "minimum", "pessimistic"]))
def test_the_combination_is_that_of_each_column(scores, penalty, how):
    got = combine(torch.tensor(scores, dtype=torch.float64), how, penalty)
    assert got.tolist() == pytest.approx(by_hand(scores, how, penalty), abs=1e-9)


def test_the_worked_example():
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # two members, two responses
    assert combine(scores, "mean", 0.5).tolist() == [2, 0]
    assert combine(scores, "minimum", 0.5).tolist() == [1, 0]
    assert combine(scores, "pessimistic", 0.5).tolist() == [1.5, 0]  # deviation 1, not sqrt(2)
    assert combine(scores, "pessimistic", 0.0).tolist() == [2, 0]
    assert spread(scores).tolist() == [1, 0]


@pytest.mark.parametrize("how", ["mean", "minimum", "pessimistic"])
def test_one_member_gives_its_own_scores_bit_for_bit(how):
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    scores[0, 7], scores[0, 8] = torch.nan, torch.inf  # a broken model must be seen to be broken
    got = combine(scores, how, 3.0)
    assert got.shape == (50,)
    torch.testing.assert_close(got, scores[0], rtol=0, atol=0, equal_nan=True)
    assert spread(scores[:, :5]).tolist() == [0] * 5


def test_what_is_no_ensemble_is_refused():
    for scores, how in (
        (torch.zeros(0, 3), "mean"),
        (torch.zeros(3), "mean"),
        (torch.zeros(2, 3), "median"),
        (torch.zeros(2, 3), "average"),
        (torch.zeros(1, 3), "median"),
    ):
        with pytest.raises(ValueError, match=r"one row a member|no way of combining|of weights"):
            combine(scores, how, 1.0)


# ---- which folders


def members(stage, *names):
    for name in names:
        (stage / name).mkdir(parents=True)
    return stage


def test_members_come_in_the_order_of_their_numbers(tmp_path):
    stage = members(tmp_path, "model", *(f"model-{n}" for n in range(11, 0, -1)))
    members(stage, "model-x", "model-012", "model-13-old", "parts")
    (stage / "model-12").touch()  # a file
    names = [folder.name for folder in member_folders(stage)]
    assert names == ["model", *(f"model-{n}" for n in range(1, 12))]
    assert member_folders(members(tmp_path / "one", "model")) == [tmp_path / "one" / "model"]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["model", "model-2"], "model-1"),
        (["model-1", "model-2"], "model"),
        (["model", "model-1", "model-3"], "model-2"),
        ([], "model"),
    ],
)
def test_a_gap_is_an_error_that_names_it(there, missing, tmp_path):
    stage = members(tmp_path / "reward", *there)
    with pytest.raises(UserError, match="run `make reward RECIPE=") as caught:
        member_folders(stage)
    assert str(caught.value).startswith(f"{stage / missing} is not there")
    assert (f"{len(there)} other members" in str(caught.value)) == bool(there)


def carded(folder, **card):
    folder.mkdir()
    plain = dict.fromkeys(RewardModelConfig._fields, "") | {
        "base": "models/a",
        "contract": "c",
        "offset": 0.0,
    }
    (folder / CONFIG).write_text(json.dumps(plain | card))
    return folder


def test_members_on_one_base_are_accepted_whatever_else_differs(tmp_path):
    check_one_base([carded(tmp_path / "a", offset=1.0), carded(tmp_path / "b", offset=2.0)])
    check_one_base([tmp_path / "a"])


@pytest.mark.parametrize(
    ("card", "what"),
    [
        ({"base": "models/b"}, "(their bases are models/a and models/b)"),
        ({"contract": "d"}, "(their tokenizers or templates differ)"),
    ],
)
def test_members_on_different_bases_are_named_with_the_remedy(card, what, tmp_path):
    folders = [carded(tmp_path / "a"), carded(tmp_path / "b"), carded(tmp_path / "c", **card)]
    with pytest.raises(UserError) as caught:
        check_one_base(folders)
    line = str(caught.value)
    assert f"{folders[0]} and {folders[2]} cannot share one base {what}" in line
    assert "set ppo.retokenize=true" in line
