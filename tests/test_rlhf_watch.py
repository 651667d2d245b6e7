"""The page of a run in progress: what it says of the run, what it serves, and a browser that watches."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing

import pytest
from conftest import PROMPTS, ROOT, TINY
from test_rlhf_report_browser import BROWSER

from rlhf.report.gather import gather
from rlhf.watch import state
from rlhf.watch.live import Live
from rlhf.watch.state import now_of, version_of
from rlhf.web.server import Server


@pytest.fixture
def run(road, tmp_path):
    """The tiny run, whose PPO has not ended: two steps are logged."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(road / "runs/tiny", folder)
    shutil.rmtree(folder / "evaluate")
    shutil.copytree(folder / "reward", folder / "card")  # so that only PPO is open
    (folder / "ppo/manifest.json").unlink()
    metrics = folder / "ppo/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    return folder


@pytest.fixture
def begun(run):
    """The same, and a process is at it."""
    with (run / "ppo/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield run


def note(run, **values):
    now = time.time()
    found = {"what": "ppo", "done": 2, "total": 6, "first": 0, "began": now - 60, "at": now, **values}
    (run / "ppo/progress.json").write_text(json.dumps(found))


def more(run, step, text=None):
    """A metric row arrives."""
    row = json.loads((run / "ppo/metrics.jsonl").read_text().splitlines()[0])
    with (run / "ppo/metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "step": step}) + "\n" if text is None else text)


# --- what runs -------------------------------------------------------------------------------------------


def test_a_stage_that_runs_says_how_far_it_is_and_what_is_left(begun):
    note(begun)
    line = now_of(begun)
    assert line.startswith("tiny: ppo runs, 2 of 6 (33%), about 2 min left in it, last metric ")
    assert re.search(r"last metric \d+ (s|min) ago$", line)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"done": 4, "first": 3}, "about 2 min left"),  # a resumed one goes by its own pace
        ({"done": 6}, "6 of 6 (100%), its last part, saving and measuring"),
        ({"what": "best of n", "total": 4000}, "best of n: 2 of 4,000 (0%)"),
    ],
)
def test_what_is_left_goes_by_the_pace_of_this_start(values, said, begun):
    note(begun, **values)
    assert said in now_of(begun)


NO_PACE = ({"first": 2}, {"began": time.time() + 1e6}, {"done": float("nan")}, {"total": 0}, {"total": None})


@pytest.mark.parametrize("values", NO_PACE)
def test_what_is_not_known_is_not_said(values, begun):
    note(begun, **values)
    assert "left" not in now_of(begun)
    assert "ppo runs" in now_of(begun)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_damaged_note_is_passed_over(text, begun):
    (begun / "ppo/progress.json").write_bytes(text.encode("latin-1"))
    assert now_of(begun).startswith("tiny: ppo runs, last metric ")


def test_a_stage_without_a_process_has_stopped(run):
    note(run)
    assert "tiny: ppo has stopped before its end: the same command goes on; last change" in now_of(run)


def test_a_run_that_has_not_begun_has_ended_or_is_between_two_stages(run, road, tmp_path):
    assert now_of(tmp_path / "runs/none").startswith("none: not begun (")
    shutil.rmtree(run / "ppo")
    assert "no stage runs just now; still to do: ppo, evaluate; last change" in now_of(run)
    for name in ("ppo", "evaluate"):
        shutil.copytree(road / "runs/tiny" / name, run / name, dirs_exist_ok=True)
    assert now_of(run).startswith("tiny: finished; last change ")


def test_where_locks_cannot_be_seen_nothing_is_said_to_run(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_LOCKS", tmp_path / "none")
    assert "has stopped" in now_of(begun)


def test_a_stage_without_metrics_says_when_it_began(begun):
    (begun / "ppo/metrics.jsonl").unlink()
    assert re.fullmatch(r"tiny: ppo runs, begun \d+ (s|min) ago", now_of(begun))


def test_to_look_takes_no_lock(run):
    now_of(run)
    with (run / "ppo/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- the page --------------------------------------------------------------------------------------------


def test_the_version_changes_with_the_files_that_are_shown_and_no_others(run):
    first = version_of([run])
    note(run)
    (run / "ppo/checkpoints").mkdir(exist_ok=True)
    assert version_of([run]) == first
    more(run, 3)
    assert version_of([run]) != first


def test_the_page_is_made_when_something_has_changed_and_rarely_where_it_takes_long(run, monkeypatch):
    made = []
    monkeypatch.setattr("rlhf.watch.live.gather", lambda folder: made.append(folder) or gather(folder))
    live = Live([run])
    live.page()
    live.page()
    assert len(made) == 1
    more(run, 3)
    live.page()
    assert len(made) == 1  # the run deserves a rest
    live._rests_until = 0.0
    live.page()
    assert len(made) == 2


@pytest.mark.parametrize(
    "text", ['{"step": 3, "objective/sc', "\n\n", "no json\n", '{"step": "x"}\n', "[1]\n"]
)
def test_a_half_written_or_damaged_line_is_left_out(text, run):
    more(run, 0, text)
    assert b"Score of the reward model" in Live([run]).page().content


def test_a_folder_that_is_not_there_or_not_a_run_has_a_page(tmp_path):
    page = Live([tmp_path / "none"]).page()
    assert b"Still to come, or missing" in page.content
    assert "script-src 'sha256-" in page.policy


def test_it_names_files_without_links_and_runs_one_script(run):
    text = Live([run]).page().content.decode()
    assert "runs/tiny/ppo/metrics.jsonl" in text
    assert re.findall(r'href="(?!#)', text) == []
    assert text.count("<script>") == 1
    assert "src=" not in text.replace("frame-src", "")


def test_nobody_without_the_token_sees_it(run):
    with closing(Server(Live([run]).routes())) as server:
        with urllib.request.urlopen(f"{server.url}state", timeout=10) as reply:
            assert json.load(reply)["now"].startswith("tiny: ")
        for path in ("", "state", "x/state"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/{path}", timeout=10)


# --- the command -----------------------------------------------------------------------------------------


def command(folder, *overrides, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf.watch", str(TINY), *PROMPTS, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_serves_until_it_is_stopped_and_changes_nothing(run):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    process = command(run.parents[1])
    url = re.search(r"open (http://127\.0\.0\.1:\d+/\S+/)", process.stdout.readline())[1]
    with urllib.request.urlopen(url, timeout=20) as reply:
        assert b"tiny" in reply.read()
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("no longer watching; the run is as it was\n")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RUNS": "tinny"}, "no run tinny in runs/: did you mean tiny?"),
        ({"PORT": "x"}, "PORT=x: a port is a number"),
        ({"PORT": "used"}, "is in use: give another one (PORT="),
    ],
)
def test_a_mistake_is_one_line(environment, said, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = command(run.parents[1], **{k: v.replace("used", port) for k, v in environment.items()})
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


# --- a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def window():
    """A browser's window."""
    if BROWSER is None:
        pytest.skip("no headless browser")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def test_a_new_row_appears_by_itself_and_nothing_that_is_read_moves(begun, road, window):
    shutil.copytree(road / "runs/tiny/evaluate", begun / "evaluate")  # samples to filter
    live, errors = Live([begun]), []
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    with closing(Server(live.routes())) as server:
        window.goto(server.url)
        window.locator("#now", has_text="ppo runs").wait_for()
        assert "begun at step 2 and not finished" in window.text_content("main")
        window.fill("#f-text", "brewery")
        kept = window.text_content("#f-count")
        window.focus("#f-text")
        window.keyboard.press("Home")
        top = "document.getElementById('f-text').getBoundingClientRect().top"
        before = window.evaluate(top)
        window.evaluate("document.documentElement.dataset.same = 'yes'")  # gone if the page were loaded anew
        live._rests_until = 0.0
        shutil.rmtree(begun / "card")  # something above gets longer
        more(begun, 3)
        note(begun, done=3)
        window.locator("main", has_text="begun at step 3").wait_for()
        assert window.evaluate("document.documentElement.dataset.same") == "yes"
        assert window.evaluate("document.activeElement.id") == "f-text"
        assert window.input_value("#f-text") == "brewery"
        assert window.text_content("#f-count") == kept != "20 of 20 shown"
        assert abs(window.evaluate(top) - before) <= 2
        window.keyboard.type("zzz")  # the caret is where it was, and the filter works
        assert window.input_value("#f-text") == "zzzbrewery"
        assert window.text_content("#f-count") == "0 of 20 shown"
        assert "3 of 6" in window.text_content("#now")
        assert errors == []
    window.locator("#now", has_text="No news").wait_for()


def test_a_page_that_waits_fills_itself_when_the_run_begins(run, window, tmp_path):
    place = tmp_path / "later"
    live = Live([place])
    with closing(Server(live.routes())) as server:
        window.goto(server.url)
        window.locator("#now", has_text="not begun").wait_for()
        shutil.copytree(run, place)
        live._rests_until = 0.0
        window.locator("main", has_text="begun at step 2").wait_for()


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_screen(width, begun, window):
    window.set_viewport_size({"width": width, "height": 800})
    with closing(Server(Live([begun]).routes())) as server:
        window.goto(server.url)
        window.locator("#now", has_text="ppo runs").wait_for()
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        window.click("#sections a[href='#trained']")
        bar, heading = (window.locator(where).bounding_box() for where in ("#now", "#h-trained"))
        assert heading["y"] >= bar["y"] + bar["height"]  # not behind what stays on top
