"""Ranking by clicks, keys and dragging in a real browser; killed browsers and servers; hostile responses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROMPTS, ROOT, TINY

from rlhf.data.readers import read_comparisons
from rlhf.runs.artifacts import read_jsonl

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if BROWSER is None:
    pytest.skip(f"no headless browser: none of {', '.join(NAMES)}", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
RESPONSES = ("good", "fair", "bad")
ANSWERS = "runs/tiny/rank/comparisons.jsonl"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as starter:
        found = starter.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


class Served:
    """`make rank` as a process in a folder."""

    def __init__(self, folder, rows, *overrides):
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.folder, self.overrides = folder, ["rank.files=rows.jsonl", *PROMPTS, *overrides]
        self.start()

    def start(self, port=""):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf.rank", str(TINY), *self.overrides],
            cwd=self.folder, env=os.environ | {"PORT": port, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said = []
        while not self.said or not self.said[-1].startswith("Ctrl-C"):
            line = self.process.stdout.readline()
            assert line, self.said
            self.said.append(line)
        self.url, self.owner = (url for line in self.said for url in re.findall(r"http://\S+", line))

    def stop(self, number=signal.SIGINT):
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[0]

    def rows(self):
        file = self.folder / ANSWERS
        return read_jsonl(file) if file.exists() else []


def questions(number, responses=RESPONSES):
    return [{"prompt": f"Question {n}?", "responses": [f"{r} {n}" for r in responses]} for n in range(number)]


@pytest.fixture
def served(tmp_path):
    started = []

    def serve(rows, *overrides):
        started.append(Served(tmp_path, rows, *overrides))
        return started[-1]

    yield serve
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture
def person(browser):
    """A function that opens the page as a person of a name, in a window of their own."""
    contexts = []

    def come(served, name, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.goto(served.url)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        return page

    yield come
    for context in contexts:
        context.close()


def ready(page, done=None):
    page.wait_for_selector("#work:not([hidden])")
    if done is not None:
        page.wait_for_selector(f"#progress:has-text(': {done} done')")
    return page


def number_of(page, word):
    """The number of the response that begins with a word, as it is shown."""
    texts = page.locator(".card .text").all_inner_texts()
    return next(n for n, text in enumerate(texts, 1) if text.startswith(word))


def order_of(page):
    return " ".join(page.locator("#order").inner_text().split())


def ranks_of(row):
    return {text.split()[0]: rank for text, rank in zip(row["responses"], row["ranks"], strict=True)}


def test_keys_rank_tie_skip_mark_and_undo(served, person):
    server = served(questions(5))
    page = ready(person(server, "Ann"), 0)
    for word in RESPONSES:
        page.keyboard.press(str(number_of(page, word)))
    page.keyboard.press("Enter")
    ready(page, 1)
    page.keyboard.press(str(number_of(page, "bad")))
    page.keyboard.press(str(number_of(page, "good")))
    page.keyboard.press("Backspace")
    page.keyboard.press("=")
    page.keyboard.press(str(number_of(page, "fair")))
    page.keyboard.press("Enter")  # one has no place yet
    page.keyboard.press(str(number_of(page, "good")))
    page.keyboard.press("r")
    page.keyboard.type("both 1 = <b>bad</b>")
    page.keyboard.press("Control+Enter")
    ready(page, 2)
    page.keyboard.press("s")
    ready(page, 3)
    page.keyboard.press("b")
    ready(page, 4)
    assert page.locator("#reason").input_value() == ""
    first, second, third, fourth = server.rows()
    assert ranks_of(first) == {"good": 0, "fair": 1, "bad": 2}
    assert ranks_of(second) == {"good": 1, "fair": 0, "bad": 0}
    assert second["reason"] == "both 1 = <b>bad</b>"
    assert (third["skipped"], fourth["all_bad"]) == (True, True)
    assert first["seconds"] > 0
    page.keyboard.press("u")
    ready(page, 3)
    page.keyboard.press("u")
    ready(page, 2)
    page.keyboard.press("u")
    ready(page, 1)
    assert page.locator("#reason").input_value() == "both 1 = <b>bad</b>"
    assert order_of(page).endswith(f"> {number_of(page, 'good')} the worst last")
    assert len(server.rows()) == 1
    page.keyboard.press("Enter")
    ready(page, 2)
    assert ranks_of(server.rows()[1]) == ranks_of(second)
    said = server.stop()
    assert "2 answers by one person" in said
    assert 'make reward SET="name=... data.comparisons=runs/tiny/rank/comparisons.jsonl"' in said
    found, _ = read_comparisons([str(server.folder / ANSWERS)], on_bad_rows="stop")
    assert len(found) == 2


def test_clicks_rank_to_the_end_and_back(served, person):
    server = served(questions(1))
    page = ready(person(server, "Ann"), 0)
    numbers = {word: number_of(page, word) for word in RESPONSES}
    page.click(f".card:nth-child({numbers['fair']}) .badge")
    page.click(f".card:nth-child({numbers['good']}) .badge")
    page.click(".chip >> nth=0")  # out again
    page.click(f".card:nth-child({numbers['fair']}) .badge")
    page.click("#tie")
    page.click(f".card:nth-child({numbers['bad']}) .badge")
    assert order_of(page) == f"{numbers['good']} > {numbers['fair']} = {numbers['bad']} the worst last"
    page.keyboard.press("Enter")  # the last click has not left the key with the button
    page.wait_for_selector("#done:not([hidden])")
    assert ranks_of(server.rows()[0]) == {"good": 0, "fair": 1, "bad": 1}
    page.click("#done .undo")
    ready(page, 0)
    page.click("#clear")
    assert page.locator("#save").is_disabled()
    page.click("#bad")
    page.wait_for_selector("#done:not([hidden])")
    assert [row.get("all_bad") for row in server.rows()] == [True]


def drag(page, start, end, before=False):
    """From the middle of one element to another's; ``before``: to its left edge."""
    a, b = page.locator(start).bounding_box(), page.locator(end).bounding_box()
    page.mouse.move(a["x"] + min(20, a["width"] / 2), a["y"] + a["height"] / 2)
    page.mouse.down()
    for share in (0.5, 1.0):
        x = b["x"] + (1 if before else b["width"] / 2)
        page.mouse.move(a["x"] + share * (x - a["x"]), a["y"] + share * (b["y"] + b["height"] / 2 - a["y"]))
    page.mouse.up()


def test_dragging_orders_ties_and_moves(served, person):
    server = served(questions(1))
    page = ready(person(server, "Ann"), 0)
    good, fair, bad = (number_of(page, word) for word in RESPONSES)
    drag(page, f".card:nth-child({bad}) .badge", "[data-end]")
    drag(page, f".card:nth-child({good}) .badge", "[data-before='0']")
    assert order_of(page) == f"{good} > {bad} > 1 to go"
    drag(page, f".card:nth-child({fair}) .badge", "[data-group='1']", before=True)
    assert order_of(page) == f"{good} > {bad} = {fair} the worst last"
    drag(page, f".chip[data-number='{fair}']", "[data-before='1']")
    assert order_of(page) == f"{good} > {fair} > {bad} the worst last"
    drag(page, f".chip[data-number='{bad}']", "[data-before='0']")
    drag(page, f".chip[data-number='{bad}']", "[data-end]")
    page.click("#save")
    page.wait_for_selector("#done:not([hidden])")
    assert ranks_of(server.rows()[0]) == {"good": 0, "fair": 1, "bad": 2}


def rank_all(page, words=RESPONSES):
    for word in words:
        page.keyboard.press(str(number_of(page, word)))
    page.keyboard.press("Enter")


def test_a_killed_server_loses_nothing_and_the_open_page_goes_on(served, person):
    server = served(questions(4))
    page = ready(person(server, "Ann"), 0)
    rank_all(page)
    ready(page, 1)
    former = server.url
    server.stop(signal.SIGKILL)
    rank_all(page)
    page.wait_for_selector("#said:has-text('Not saved yet')")
    with (server.folder / ANSWERS).open("a") as file:
        file.write('{"prompt": [{"ro')  # as if it had been at the next one
    server.start()
    assert server.url == former
    ready(page, 2)
    assert page.locator("#said").is_hidden()
    rank_all(page)
    ready(page, 3)
    assert [ranks_of(row) for row in server.rows()] == [{"good": 0, "fair": 1, "bad": 2}] * 3
    assert len({row["item"] for row in server.rows()}) == 3


def test_a_killed_browser_loses_no_answer_and_asks_none_again(served, person):
    server = served(questions(3))
    script = (
        "import sys, time; from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as p:\n"
        "    page = p.chromium.launch(executable_path=sys.argv[1], args=sys.argv[3:]).new_page()\n"
        "    page.goto(sys.argv[2]); page.fill('#name', 'Ann'); page.keyboard.press('Enter')\n"
        "    page.wait_for_selector('#work:not([hidden])')\n"
        "    for key in ('1', '2', '3', 'Enter'): page.keyboard.press(key)\n"
        "    page.wait_for_selector(\"#progress:has-text(': 1 done')\")\n"
        "    page.keyboard.press('2'); print('here', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, BROWSER, server.url, *FLAGS],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(server.rows()) == 1
    server.stop(signal.SIGKILL)
    server.start()  # which knows of no windows
    page = ready(person(server, "Ann"), 1)
    rank_all(page)
    ready(page, 2)
    assert len({row["item"] for row in server.rows()}) == 2


def test_two_with_one_name_are_told_and_agreement_is_the_owners(served, person, browser):
    server = served(questions(2), "rank.annotators=2")
    ann = ready(person(server, "Ann"), 0)
    other = person(server, "ann")
    other.wait_for_selector("#said:has-text('ranking in another window')")
    other.fill("#name", "Bob")
    other.keyboard.press("Enter")
    ready(other, 0)
    for page in (ann, other):
        rank_all(page)
        ready(page, 1)
    rank_all(ann)
    rank_all(other, RESPONSES[::-1])
    other.wait_for_selector("#done:not([hidden])")
    ann.wait_for_selector("#done:not([hidden])")
    page = ann.context.new_page()
    page.goto(server.owner)
    text = page.inner_text("body")
    assert "2 of 2 prompts" in text
    assert re.search(r"0\.500 \[.*of the pairs of responses are ordered alike", " ".join(text.split()))
    assert page.locator("script").count() == 0
    assert "agreement on 2 prompts: 0.50" in server.stop()


HOSTILE = (
    "good <script>document.title='owned'</script>",
    "fair <img src=x onerror=\"document.title='owned'\"></p></article><h1>big</h1>",
    "bad " + "token " * 100_000,
)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_html_is_text_and_long_responses_scroll(served, person, width, scheme):
    server = served([{"prompt": "<b>Q</b>", "responses": list(HOSTILE)}], "rank.instructions='<i>do</i>'")
    page = ready(person(server, "<u>Ann</u>", color_scheme=scheme), 0)
    page.set_viewport_size({"width": width, "height": 844})
    assert page.title() == "tiny: rank"
    assert sorted(page.locator(".card .text").all_text_contents()) == sorted(HOSTILE)
    assert page.locator("h1").count() == 1
    assert page.locator("main b, main img, header i, main u").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.scrollHeight") < 4000
    colors = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colors == "rgb(252, 252, 250)") == (scheme == "light")
    long = page.locator(".card .text", has_text="token token").first
    before = time.monotonic()
    long.evaluate("e => e.scrollTop = 1e6")
    assert long.evaluate("e => e.scrollTop") > 10_000
    rank_all(page)
    page.wait_for_selector("#done:not([hidden])")
    assert time.monotonic() - before < 10
    assert tuple(server.rows()[0]["responses"]) == HOSTILE


def test_everything_is_reached_by_tab(served, person):
    server = served(questions(1))
    page = ready(person(server, "Ann"), 0)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)"))
    assert {"skip", "text", "badge", "reason", "bad", "SUMMARY"} <= reached
    page.locator(".badge").nth(0).focus()
    for _ in range(3):
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
    assert order_of(page) == "1 > 2 > 3 the worst last"
    page.locator("#save").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#done:not([hidden])")
    assert len(server.rows()) == 1
