"""A score function that fails, a tokenizer that changed: one line and status 2; mended, the run goes on."""

import json
import shutil

import pytest

from benchmarks.faults.killed_process import STATEFUL, STEPS, Plan, Start, link_stages, outcome

HERE = "runs/tiny/ppo"


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """What a run left alone leaves."""
    folder = link_stages(road, tmp_path_factory.mktemp("alone") / "run")
    start = Start(folder)
    assert start.wait() == 0, start.output()
    return outcome(folder)


def from_the_third_step(fault):
    """Let the reward model of the stage do something else from its ninth call: a rollout has four."""
    from policy.ppo.setup import EnsembleScore

    real, calls = EnsembleScore.__call__, iter(range(10**6))
    EnsembleScore.__call__ = lambda self, said: (
        fault(real(self, said)) if next(calls) >= 8 else real(self, said)
    )


def raising(scores):
    raise ConnectionError("the judge is not there\nsecond line")


def raises():
    from_the_third_step(raising)


def hangs():
    import threading

    from_the_third_step(lambda scores: threading.Event().wait())


FAULTS = {
    raises: "ppo: the reward function failed on 4 responses (ConnectionError: the judge is not there)",
    hangs: "ppo: the reward function has not answered for 0.05 minutes (ppo.score_timeout_minutes)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_score_function_that_fails_ends_the_run_and_mended_it_goes_on(fault, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    limit = ("ppo.score_timeout_minutes=0.05",) if fault is hangs else ()
    start = Start(here, (*STATEFUL, *limit), before=fault)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith(f"error: {FAULTS[fault]}")
    assert not (here / HERE / "manifest.json").exists()
    mended = Start(here)  # the limit may be another one
    assert mended.wait() == 0, mended.output()
    assert f"ppo: going on after step 2 of {STEPS}" in mended.output()
    assert outcome(here) == alone


# ---- a tokenizer that changed between two starts


def own_model(folder, road):
    """A folder whose model may be changed."""
    (folder / "models").unlink()
    shutil.copytree(road / "models", folder / "models")
    return folder / "models" / "tiny" / "tokenizer.json"


def swap_two_tokens(file):
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_tokenizer_is_refused_with_the_folder(finished, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    tokenizer = own_model(here, road)
    old = tokenizer.read_bytes()
    first = Start(here, STATEFUL, None if finished else Plan("rollout", 2))
    assert first.wait() == (0 if finished else -9), first.output()
    swap_two_tokens(tokenizer)
    start = Start(here)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    state = "was finished" if finished else "was begun"
    assert line.startswith(f"error: {HERE} {state} with another recipe or data (data file tokenizer.json: ")
    tokenizer.write_bytes(old)
    again = Start(here)
    assert again.wait() == 0, again.output()
    assert outcome(here) == alone


def test_a_checkpoint_of_another_token_contract_is_refused(road, tmp_path):
    """Where the files are not in a folder, or the template of the recipe's own code changed."""
    from rlhf.runs.artifacts import write_manifest

    here = link_stages(road, tmp_path / "here")
    assert Start(here, STATEFUL, Plan("rollout", 1)).wait() == -9
    checkpoint = here / HERE / "checkpoints" / "step-0000001"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"contract": "0" * 64}))
    write_manifest(checkpoint, {"step": 1})
    start = Start(here)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line == (
        f"error: {HERE}/checkpoints/step-0000001: the tokenizer or its template has changed since it was "
        f"written, so the run cannot go on; put the old one back, or remove {HERE} to start again"
    )
