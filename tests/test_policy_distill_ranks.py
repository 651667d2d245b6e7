"""Two processes distil what one process distils, whatever ZeRO shards."""

import json

import numpy as np
import pytest
from ranks import finish, interrupt
from test_deepspeed import alone_in, assert_close
from tiny_distill import overrides, results, write_lab

from policy.distillation import __main__ as distill
from rlhf.runs.artifacts import MANIFEST, sha256_of

SECTION = {
    "batch_size": 5,  # uneven over two processes; the last batch of a pass has one sequence
    "tokens_per_micro_batch": 60,  # some processes have more micro-batches than others
    "max_grad_norm": 0.05,
    "shard_sequences": 7,
    "learning_rate": 1e-3,
}


def lab_in(folder):
    folder.mkdir()
    write_lab(folder)
    return folder


def changed(folder, **changes):
    files = {name: str(folder / f"{name}.jsonl") for name in ("texts", "questions")}
    return overrides(**SECTION | files | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process, this one, by method and layers."""
    kept = {}

    def of(method, layers):
        if (method, layers) not in kept:
            folder = lab_in(tmp_path_factory.mktemp("alone") / "run")
            options = changed(folder, method=method, lora__layers=layers)
            kept[method, layers] = alone_in(folder, distill.main, *options)
        return kept[method, layers]

    return of


@pytest.mark.parametrize(
    ("zero", "method", "layers"),
    [(0, "lora", "top_2"), (2, "full", "all"), (3, "lora", "top_2")],
)
def test_two_processes_learn_what_one_process_learns(zero, method, layers, alone, tmp_path):
    here, whole = lab_in(tmp_path / "here"), alone(method, layers)
    options = changed(here, method=method, lora__layers=layers, distributed__zero_stage=zero)
    done = here / "runs" / "tiny" / "distill"
    # every curve holds a resume
    interrupt(here, "distill", lambda: list(done.glob("checkpoints/step-*")), done / MANIFEST, *options)
    said = finish(here, "distill", *options)
    assert said.count("distill: held out: KL(teacher || student)") == 1
    assert_close(here, whole, "distill", *(() if method == "full" else ("policy",)))
    mine, expected = (results(folder / "runs/tiny/distill") for folder in (here, whole))
    assert (mine["processes"], expected["processes"]) == (2, 1)
    for name in ("kl_before", "kl_after", "full_kl_before", "full_kl_after", "kl_recovered"):
        assert mine["held_out"][name]["mean"] == pytest.approx(expected["held_out"][name]["mean"], abs=1e-5)
    assert mine["held_out"]["tokens"] == expected["held_out"]["tokens"]
    assert mine["teacher"] == expected["teacher"]
    for file in sorted((whole / "runs/tiny/distill/teacher").glob("*.npy")):
        words, wanted = np.load(done / "teacher" / file.name), np.load(file)
        assert words["index"].tolist() == wanted["index"].tolist()
        assert np.allclose(words["log_prob"], wanted["log_prob"], atol=1e-5)
    index = json.loads((done / "teacher" / "index.json").read_text())
    assert index["shards"] == {p.name: sha256_of(p) for p in (done / "teacher").glob("*.npy")}
