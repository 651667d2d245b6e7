"""Two processes fine-tune what one process does, whatever ZeRO shards."""

import json

import pytest
from ranks import Forked, Launched, finish
from test_deepspeed import alone_in, assert_close, copy_of, curve

from rlhf.runs.artifacts import MANIFEST

SFT = (
    "sft.batch_size=38",  # all demonstrations, so that no batch is padded
    "sft.epochs=3",
    "sft.warmup_ratio=0",
    "sft.learning_rate=1e-2",
    "sft.max_grad_norm=0.3",
    "sft.tokens_per_micro_batch=380",
)


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """One process, this one."""
    from policy.sft import __main__ as sft

    folder = copy_of(road, tmp_path_factory.mktemp("alone") / "run", "comparisons")
    return alone_in(folder, sft.main, *SFT)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_learn_what_one_process_learns(zero, alone, road, tmp_path):
    assert min(row["sft/grad_norm"] for row in curve(alone, "sft")) > 0.3  # the clip is at work
    here = copy_of(road, tmp_path / "here", "comparisons")
    start = Launched if zero == 2 else Forked  # once under the real launcher
    finish(here, "sft", *SFT, f"distributed.zero_stage={zero}", start=start)
    assert_close(here, alone, "sft", "policy")
    mine, expected = (
        json.loads((folder / "runs/tiny/sft" / MANIFEST).read_text())["results"] for folder in (here, alone)
    )
    assert (mine["processes"], expected["processes"]) == (2, 1)
    for name in ("held_out_loss_before", "held_out_loss"):
        assert mine[name]["mean"] == pytest.approx(expected[name]["mean"], abs=1e-5)
