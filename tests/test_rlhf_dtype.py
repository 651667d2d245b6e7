"""`model.dtype: auto`: chosen once a run, by two figures that are told, and kept by every later stage."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import stage, tiny_recipe

from rlhf.errors import UserError
from rlhf.runs import dtype
from rlhf.runs.stage import open_stage
from rlhf.training import matrix_units

RUN = Path("runs/tiny")


@pytest.fixture
def measured(monkeypatch):
    """Let this machine be one that is faster in a type; without an argument nothing may be measured."""

    def machine(kind=None):
        def found(width, inner):
            assert kind, "measured again"
            return kind, f"{width} x {inner}"

        monkeypatch.setattr(matrix_units, "fastest_dtype", found)

    machine()
    return machine


def kept(recipe):
    """The type of a run without measuring."""
    return dtype.settled(recipe, RUN, measured=False).model.dtype


def test_the_first_stage_chooses_and_the_others_keep_it_on_any_machine(inside, measured, capsys):
    recipe = tiny_recipe("model.dtype=auto")
    assert kept(recipe) == "auto"
    measured("bfloat16")
    run = open_stage(recipe, "comparisons", section="collect")
    assert run.recipe.model.dtype == "bfloat16"
    assert "model.dtype=auto: bfloat16: 1024 x 4096\n" in capsys.readouterr().out
    stored = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert stored["model"]["dtype"] == "bfloat16"
    run.finish({})
    run.lock.close()  # as a process that ends
    measured()
    assert open_stage(recipe, "comparisons", section="collect") is None
    later = open_stage(recipe, "reward", section="reward", parents=["comparisons"])
    assert later.recipe.model.dtype == "bfloat16"
    assert later.fingerprint["recipe"]["model"]["dtype"] == "bfloat16"
    assert "dtype" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model.dtype: 'bfloat16' -> 'float32'"):
        open_stage(tiny_recipe("model.dtype=float32"), "ppo", parents=["comparisons"])


def test_a_run_that_began_with_a_type_keeps_it_and_what_is_finished_counts_first(inside, measured):
    open_stage(tiny_recipe("model.dtype=float32"), "comparisons").finish({})
    open_stage(tiny_recipe("model.dtype=float16"), "a")  # left behind
    assert kept(tiny_recipe("model.dtype=auto")) == "float32"
    assert kept(tiny_recipe("model.dtype=float16")) == "float16"


def test_a_mistake_is_told_before_anything_is_measured(inside, measured):
    with pytest.raises(UserError, match="reward needs the comparisons stage"):
        open_stage(tiny_recipe("model.dtype=auto"), "reward", parents=["comparisons"])


def test_a_whole_model_is_float32(inside, measured, capsys):
    full = "distill={method: full, texts: [x.jsonl]}"
    Path("x.jsonl").touch()
    Path("prompt.txt").touch()
    recipe = tiny_recipe("model.dtype=auto", full, "hhh_prompt=prompt.txt")
    assert dtype.settled(recipe, RUN).model.dtype == "float32"
    assert "distill.method=full" in capsys.readouterr().out


def test_other_processes_wait_for_the_first(inside, measured, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recipe = tiny_recipe("model.dtype=auto")

    def first():
        time.sleep(0.3)
        (RUN / "comparisons").mkdir(parents=True)
        (RUN / "comparisons" / "recipe.yaml").write_text("model: {dtype: bfloat16}\n")

    thread = threading.Thread(target=first)
    thread.start()
    assert dtype.settled(recipe, RUN).model.dtype == "bfloat16"
    thread.join()
    monkeypatch.setattr(dtype, "_WAIT", 0.1)
    with pytest.raises(UserError, match="every process must see runs/else"):
        dtype.settled(recipe, Path("runs/else"))


def test_every_stage_of_a_run_takes_the_type_that_was_chosen(inside, measured):
    from policy.ppo import __main__ as ppo
    from reward.training import __main__ as reward
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    options = (
        "model.dtype=auto", "collect={prompts: 8, responses: 2}", "data.held_out=0.3", "reward.batch_size=4",
        "reward.reference_responses=8", "ppo.steps=1", "ppo.batch_size=8",
    )  # fmt: skip
    stage(prepare.main, *options)
    measured("bfloat16")
    stage(collect.main, *options)
    measured()
    for module in (reward, ppo):
        stage(module.main, *options)
    saved = json.loads((RUN / "reward" / "model" / "reward_model.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert {kept(tiny_recipe("model.dtype=auto"))} == {"bfloat16"}


# --- the measurement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "kind"), [(140.0, "float32"), (160.0, "bfloat16")])
def test_bfloat16_has_to_be_clearly_faster(half, kind, monkeypatch):
    rates = {torch.float32: 100.0, torch.bfloat16: half}
    monkeypatch.setattr(matrix_units, "product_rate", lambda dtype, *_: rates[dtype])
    found, why = matrix_units.fastest_dtype(64, 256)
    assert found == kind
    assert why.startswith(f"{half:.0f} GFLOP/s in bfloat16, 100 in float32 (128 x 64 by 64 x 256, cpu")


def test_this_machine_has_a_rate_in_both_types(monkeypatch):
    monkeypatch.setattr(matrix_units, "_SECONDS", 0.02)
    state = torch.get_rng_state()
    for kind in (torch.float32, torch.bfloat16):
        assert 0 < matrix_units.product_rate(kind, 16, 64, 64, torch.device("cpu")) < float("inf")
    assert torch.equal(torch.get_rng_state(), state), "random numbers belong to the stages"


def test_a_gpu_without_units_for_bfloat16_is_told_by_its_name(monkeypatch):
    """A stand-in for the card; no GPU is needed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"model.dtype: bfloat16 needs .* and Tesla T4 has 7.5: use float16"):
        matrix_units.check_dtype("bfloat16")
    matrix_units.check_dtype("float16")
    with pytest.raises(UserError, match=r"model.dtype: auto is chosen by a stage"):
        matrix_units.check_dtype("auto")
    assert matrix_units.fastest_dtype(64, 256) == ("float32", "Tesla T4 has no units for bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    matrix_units.check_dtype("bfloat16")
