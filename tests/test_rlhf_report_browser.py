"""A run's page in a browser: its filters work, it fits a phone, has two schemes, a keyboard reaches it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from rlhf.report.gather import gather
from rlhf.report.page import write_page
from rlhf.runs.artifacts import read_jsonl

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no headless browser: none of {', '.join(NAMES)}")
FRAME = """<!doctype html><body><iframe id=f src="report.html" style="width:{width}px;height:900px"></iframe>
<pre id=said></pre><script>
document.getElementById("f").onload = () => {{
  const page = document.getElementById("f").contentDocument;
  const seen = [], say = (name, value) => seen.push(name + "=" + value);
  const shown = () => [...page.querySelectorAll(".sample")].filter((s) => s.offsetParent).length;
  say("width", page.documentElement.scrollWidth);
  say("filters", page.getElementById("filters").offsetHeight > 0);
  say("all", shown());
  const set = (id, value) => {{
    const field = page.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input", {{ bubbles: true }}));
  }};
  set("f-change", "more"); say("higher", shown()); set("f-change", "");
  set("f-text", "no such text"); say("none", shown() + ":" + page.getElementById("f-count").textContent);
  set("f-text", ""); say("again", shown());
  const fields = [...page.querySelectorAll("a[href], input, select, [tabindex='0']")];
  say("reached", fields.every((field) => {{ field.focus(); return page.activeElement === field; }}));
  say("title", page.title);
  document.getElementById("said").textContent = seen.join("\\n");
}};
</script></body>"""


def browser(*options):
    """What the browser prints."""
    command = [BROWSER, "--headless", "--disable-gpu", "--no-sandbox", "--allow-file-access-from-files"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def page(road, tmp_path_factory):
    """The page of the tiny road."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page([gather(road / "runs/tiny")], file)
    return file


def in_frame(page, width):
    """What the page says of itself in a window of a width."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width))
    text = browser("--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    said = re.search(r'<pre id="said">(.*?)</pre>', text, re.DOTALL)[1]
    return dict(line.split("=", 1) for line in said.splitlines())


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_and_its_filters_work(page, road, width):
    said = in_frame(page, width)
    assert int(said["width"]) <= width
    assert (said["filters"], said["all"], said["again"]) == ("true", "20", "20")
    assert said["none"] == "0:0 of 20 shown"
    assert said["reached"] == "true"
    text = page.read_text()
    assert int(said["higher"]) == text.count('data-change="more"') < 20
    assert len(read_jsonl(road / "runs/tiny/evaluate/responses.jsonl")) >= 20


@pytest.mark.parametrize(
    "hostile", ["<script>document.title='x'</script>", "<img src=x onerror=\"document.title='x'\">"]
)
def test_script_in_a_response_does_not_run(page, road, hostile):
    run = gather(road / "runs/tiny")
    run.responses = [row | {"before": hostile, "after": hostile} for row in run.responses]
    folder = page.parent / "hostile"
    write_page([run], folder / "report.html")
    assert in_frame(folder / "report.html", 800)["title"] == "tiny: report"
    # nor would it if it stood there as it is
    text = (folder / "report.html").read_text()
    (folder / "report.html").write_text(text.replace("</main>", f"{hostile}</main>"))
    assert in_frame(folder / "report.html", 801)["title"] == "tiny: report"
    (folder / "report.html").write_text(
        re.sub('<meta http-equiv="Content.*?>', "", text).replace("</main>", f"{hostile}</main>")
    )
    assert in_frame(folder / "report.html", 802)["title"] == "x"  # so that this test can fail


def test_the_schemes_are_light_and_dark(page):
    seen = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = Path(page.parent / f"{scheme}.png")
        browser(
            f"--blink-settings=preferredColorScheme={number}", "--hide-scrollbars", "--window-size=800,1600",
            f"--screenshot={picture}", page.as_uri(),
        )  # fmt: skip
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape == (1600, 800, 3)
        seen[scheme] = float(pixels.mean()), float(pixels.std())
    assert seen["dark"][0] < 0.25
    assert seen["light"][0] > 0.8
    assert min(std for _, std in seen.values()) > 0.05  # something stands on it
