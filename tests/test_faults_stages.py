"""Stops at any moment, and checkpoints that cannot be written, in the stages beside PPO."""

import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_tax
from conftest import ROOT, slow_but

from benchmarks.faults.killed_process import Start, link_stages
from rlhf.runs.artifacts import MANIFEST

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIMES = ("seconds", "cost", "clock", "stages", "peak_bytes")
PMP = (f"pmp.sources=[{{files: {ROOT}/recipes/tiny/comparisons.jsonl}}]", "pmp.batch_size=8")
TEXTS = f"distill.texts={ROOT}/recipes/tiny/texts.jsonl"
OPTIONS = {
    "comparisons": ("collect.prompts_per_batch=4",),
    "pmp": (*PMP, "pmp.checkpoint_every=1"),
    "card": (),
    "evaluate": ("evaluate.prompts=6",),
    "tax": (
        *tiny_tax.SHORT,
        *tiny_tax.TASKS.values(),
        "tax.variants=[base,policy]",
        "tax.score=true",
        "tax.allow_generated_code=true",
        "tax.tasks.humaneval.files=humaneval.jsonl",
        "tax.humaneval.max_new_tokens=8",
        "tax.tasks.arc_easy={files: arc.jsonl, limit: 3}",
    ),
    "sft": ("sft.data=chosen", "sft.batch_size=8", "sft.checkpoint_every=1"),
    "reward": ("reward.checkpoint_every=1",),
    "distill": (
        *(TEXTS, "distill.text_share=1", f"hhh_prompt={ROOT}/recipes/tiny/prompt.txt"),
        *("distill.sequences=24", "distill.max_tokens=48", "distill.held_out=0.25", "distill.top_k=20"),
        *("distill.batch_size=4", "distill.checkpoint_every=1", "distill.full_kl_sequences=2"),
    ),
    "ppo": ("ppo.checkpoint_every=1",),
}


def content(folder):
    """What a stage left, without times."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(x) for key, x in value.items() if key not in TIMES}
        return [timeless(x) for x in value] if isinstance(value, list) else value

    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json" and name not in (MANIFEST, "clock.json"):
            found[name] = timeless(json.loads(file.read_text()))
        elif file.suffix in (".jsonl", ".safetensors") and name != "metrics.jsonl":
            found[name] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def lab(tax_lab, tmp_path_factory):
    """The tax table's lab with programs to be written and a task of lm-eval's."""
    folder = Path(shutil.copytree(tax_lab, tmp_path_factory.mktemp("lab") / "lab"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_tax.lines("humaneval.jsonl", [
            {"task_id": f"t/{n}", "prompt": f"def f{n}():\n", "entry_point": f"f{n}",
             "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n"}
            for n in range(3)
        ])  # fmt: skip
        letters = {"text": ["one", "a cat"], "label": ["A", "B"]}
        tiny_tax.lines("arc.jsonl", [
            {"question": f"Which, {n}?", "choices": letters, "answerKey": "AB"[n % 2]} for n in range(4)
        ])  # fmt: skip
    return folder


def begun(name, road, lab, folder):
    """A folder in which a stage has all that it reads."""
    if name == "tax":
        return Path(shutil.copytree(lab, folder))
    if name == "pmp":
        (folder / "runs/tiny").mkdir(parents=True)
        (folder / "models").symlink_to(road / "models")
        return folder
    done = name in ("card", "evaluate")
    return link_stages(road, folder, "evaluate" if done else name)


@pytest.mark.parametrize("name", slow_but(["evaluate"], ["tax", "card", "evaluate", "comparisons", "pmp"]))
def test_a_stage_stopped_at_several_moments_ends_as_if_it_had_been_left_alone(name, road, lab, tmp_path):
    alone, here = (begun(name, road, lab, tmp_path / which) for which in ("alone", "here"))
    whole = Start(alone, OPTIONS[name], name=name)
    began = time.monotonic()
    whole.finish()
    took, rng, stops = time.monotonic() - began, random.Random(name), 0
    for share in sorted(rng.uniform(0.1, 0.8) for _ in range(3)):
        start, begin = Start(here, OPTIONS[name], name=name, before=os.setsid), time.monotonic()
        while start.process.is_alive() and not (
            f": {name}: " in start.output() and time.monotonic() - begin > share * took
        ):
            time.sleep(0.001)
        number = SIGNALS[stops % 3]
        if start.process.is_alive():
            (os.killpg if number == signal.SIGINT else os.kill)(start.process.pid, number)
        status = start.wait()
        assert status in (0, 128 + number), start.output()
        assert start.errors() == []
        stops += status != 0
    again = Start(here, OPTIONS[name], name=name)
    assert again.wait() == 0, again.output()
    assert stops
    assert content(here / "runs/tiny" / name) == content(alone / "runs/tiny" / name)


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("reward", size) for size in (1_000, 12_000, 30_000, 50_000)),
     *((name, 30_000) for name in ("sft", "pmp", "distill", "ppo"))],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_written_is_one_line(name, size, road, tmp_path):
    """A limit on the size of files, with the same words from the libraries as a full disk."""
    here = begun(name, road, None, tmp_path / "here")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    start = Start(here, OPTIONS[name], name=name, before=limit)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith("error: file too large")
    assert "raise the limit on the size of a file" in line
    assert not list((here / "runs/tiny" / name).rglob(".staging-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [60, 180])
@pytest.mark.parametrize("name", ["sft", "reward", "distill"])
def test_a_real_file_system_that_fills_up_is_one_line(name, kilobytes, road, tmp_path, small_disk):
    here = begun(name, road, None, tmp_path / "here")
    small_disk(here / "runs/tiny" / name, kilobytes)
    start = Start(here, OPTIONS[name], name=name)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith(f"error: the disk is full: runs/tiny/{name}")
