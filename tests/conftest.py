"""What the tests share: a tiny model, the tiny recipe, and one finished run of the whole road."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

from rlhf.recipe.load import load
from rlhf.runs.artifacts import MANIFEST, read_json, write_manifest
from rlhf.runs.processes import print_once

# the same examples at every run: what lands must not depend on luck
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# under nohup, or in the background of a script, what tests start would inherit that signals are ignored
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# no test cuts the power, and a wait for the disk is the slowest line of a tiny stage; who tests that files
# are synced puts a function of their own here
os.fsync = lambda descriptor: None

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny.yaml"
DATA = Path(os.environ.get("RLHF_DATA") or ROOT.parent / "shared" / "data")
"""Public data sets; what needs one of them is skipped where it is not there."""
PROMPTS = [
    f"data.prompts={ROOT}/recipes/prompts/sentiment_train.jsonl",
    f"data.held_out_prompts={ROOT}/recipes/prompts/sentiment_held_out.jsonl",
]


def slow_but(kept, values):
    """The parameters of a test, of which only some run in ``make test``, the others in ``make test-slow``."""
    rows = [(value in kept, value if isinstance(value, tuple) else (value,)) for value in values]
    return [pytest.param(*row, marks=[] if quick else pytest.mark.slow) for quick, row in rows]


def stage(main, *overrides, recipe=TINY):
    """Run a stage's main in this process, in the current folder, as if from the command line."""
    before = sys.argv
    sys.argv = ["stage", str(recipe), *PROMPTS, *overrides]
    try:
        main()
    finally:
        sys.argv = before


def one_of(processes):
    """What a launcher puts into the environment of its first process."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {"WORLD_SIZE": str(processes), **place}


def noted_anew(folder):
    """Make a finished stage's manifest again, whose files a test has changed."""
    write_manifest(folder, read_json(folder / MANIFEST), (".lock", "metrics.jsonl", "clock.json"))


def tiny_recipe(*overrides):
    """The tiny recipe with prompts by absolute path, so that it loads from any folder."""
    return load(TINY, [*PROMPTS, *overrides])


@pytest.fixture(autouse=True, scope="module")
def what_is_loaded_stays():
    """The libraries are not looked through at every ``gc.collect()``: accelerate has one a training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def printed_anew():
    """What is printed once a process is printed once a test: which tests ran before must not matter."""
    print_once.cache_clear()


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """A folder in which every stage of the tiny recipe has run once, uninterrupted. Do not change it."""
    from policy.evaluate import __main__ as evaluate
    from policy.ppo import __main__ as train
    from reward.training import __main__ as reward_train
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    folder = tmp_path_factory.mktemp("road")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for main in (prepare.main, collect.main, reward_train.main, train.main, evaluate.main):
            stage(main)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def tax_lab(tmp_path_factory):
    """A run in which every stage before the tax table seems to have finished. Do not change it."""
    import tiny_tax

    folder = tmp_path_factory.mktemp("tax_lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_tax.build()
    return folder


@pytest.fixture
def here(tax_lab, tmp_path, monkeypatch):
    """A copy of the tax table's lab as the current folder."""
    shutil.copytree(tax_lab, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_picture(monkeypatch):
    """The tax table's, which takes a second, and is looked at elsewhere."""
    monkeypatch.setattr("policy.alignment_tax.run.draw", lambda table, file: None)


@pytest.fixture(scope="session")
def alone(road, tmp_path_factory):
    """A start of PPO that was left alone and has finished. Do not change its folder."""
    from benchmarks.faults.killed_process import Start, link_stages

    start = Start(link_stages(road, tmp_path_factory.mktemp("alone") / "run"))
    start.finish()
    return start


@pytest.fixture
def reloaded_here(monkeypatch):
    """What was exported is loaded again in this process: a tenth of the time of test_export.py's own."""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        reload.main()
        return SimpleNamespace(returncode=0, stderr="")

    from rlhf.export import folder, reload

    monkeypatch.setattr(folder, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def distill_lab(inside):
    """A current folder with all that the distill stage reads."""
    from tiny_distill import write_lab

    return write_lab(inside)


@pytest.fixture
def small_disk():
    """Mounts a file system of some kilobytes at a new folder."""
    places = []

    def mount(place, kilobytes=8192):
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"a real full disk needs the right to mount one: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
