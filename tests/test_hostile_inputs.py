"""No recipe and no data file gets more than one line out of a run: status 2, at once, in little memory."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import hostile
import pytest

from benchmarks.faults.killed_process import SERVER

SECONDS, BYTES = 5.0, 500 << 20
BYTES_A_SECOND = 100e6  # beyond SECONDS: what is hashed and read through on a slow, busy machine
CASES = [
    *(pytest.param("recipe", ".yaml", content, id=f"recipe: {name}")
      for name, content in hostile.RECIPES.items()),
    *(pytest.param("set", "", f"{key}={value}", id=f"{key}={value[:40]}")
      for key, values in hostile.WRONG_VALUES.items() for value in values),
    *(pytest.param("set", "", word, id=f"set: {word[:40]!a}") for word in hostile.SETTINGS),
    *(pytest.param("data", kind, content, id=f"data: {name}")
      for name, (kind, content) in hostile.FILES.items()),
]  # fmt: skip


def attempt(kind, content, folder, log):
    """In a process of its own: do with the input what a stage does before it loads a model."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
    os.chdir(folder)
    from rlhf.data.readers import read_comparisons
    from rlhf.errors import exit_on_user_error
    from rlhf.recipe.load import load
    from rlhf.runs.stage import input_hashes

    def main():
        if kind == "recipe":
            load(content)
        elif kind == "set":
            load(
                hostile.ROOT / "recipes" / "tiny.yaml",
                ["data.prompts=[]", "data.held_out_prompts=[]", content],
            )
        else:
            input_hashes([content])
            read_comparisons([content], on_bad_rows="stop")

    exit_on_user_error(main)


@pytest.fixture(scope="module", autouse=True)
def server():
    """The processes' server has begun: its imports are not a case's time."""
    first = SERVER.Process(target=os.getpid)
    first.start()
    first.join()


def test_there_are_as_many_cases_as_the_documents_say():
    kinds = [case.values[0] for case in CASES]
    recipes, files = kinds.count("recipe") + kinds.count("set"), kinds.count("data")
    assert recipes >= 150
    assert files >= 130
    page = (hostile.ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    counts = [line.split("|")[2].strip() for line in page.splitlines() if "`test_hostile_inputs.py`" in line]
    assert counts == [str(recipes), str(files)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ending", "content"), CASES)
def test_a_hostile_input_is_one_line(kind, ending, content, tmp_path):
    (tmp_path / "here").mkdir()
    limit = SECONDS
    if kind != "set":
        content = str(hostile.written(tmp_path / f"hostile{ending}", content))
        path = Path(content)
        limit += path.stat().st_size / BYTES_A_SECOND if path.is_file() else 0
    log, began = tmp_path / "log", time.monotonic()
    process = SERVER.Process(target=attempt, args=(kind, content, str(tmp_path / "here"), str(log)))
    process.start()
    process.join(2 * limit)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    seconds, output = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == 2, output[-600:]
    assert output.startswith("error: "), output[:600]
    assert output.count("\n") == 1, output[:600]
    assert len(output) < 2000
    assert seconds < limit
    assert not any((tmp_path / "here").iterdir()), "a refused input left something behind"
