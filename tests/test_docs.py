"""The pages say what is there: name, links, paths, commands, make targets."""

import functools
import re
import tomllib

import pytest
from conftest import ROOT

from rlhf import NAME

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("rlhf", "reward", "policy", "studies", "benchmarks", "tests", "recipes", "docs")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
STARTED = re.compile(r"(?:\$\(PY\) -m|\$\(RUN\)) ([\w.]+) \$\((?:ARGS|STUDY|BENCH)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@functools.cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def anchor(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, part = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = (page.parent / path) if path else page
        headings = re.findall(r"(?m)^#+ (.*)$", text_of(file)) if part and file.is_file() else []
        if not file.exists() or (part and part not in map(anchor, headings)):
            broken.append(target)
    return broken


def missing_paths(page):
    """Paths and modules in backticks that are ours to have and are not there."""
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", text_of(page)):
        module = re.search(rf"python -m ((?:{'|'.join(FOLDERS)})[\w.]*)", quoted)
        path = module[1].replace(".", "/") if module else quoted
        ours = path.partition("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+", path)
        named = bool(module) or path.endswith("/") or "." in path.rpartition("/")[2]  # not `policy/entropy`
        if ours and named and not any((ROOT / f"{path}{end}").exists() for end in ("", ".py")):
            missing.append(quoted)
    return missing


def unknown_targets(page):
    known = set(re.findall(r"(?m)^([a-z-]+):", MAKEFILE))
    commands = re.findall(r"(?m)^ {4}make ((?:[a-z-]+(?![\w=]) ?)+)", text_of(page))
    commands += re.findall(r"`make ((?:[a-z-]+(?![\w=]) ?)+)", text_of(page))
    return {target for line in commands for target in line.split()} - known


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(page) == []


@each_page
def test_every_path_in_backticks_is_there(page):
    assert missing_paths(page) == []


@each_page
def test_every_make_target_in_a_command_is_there(page):
    assert unknown_targets(page) == set()


def test_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A, b\n[a](#a-b) [b](#c) [c](d.md)\n`rlhf/no.py` `python -m policy.no` `make nothing x=1`"
    )
    assert broken_links(page) == ["#c", "d.md"]
    assert missing_paths(page) == ["rlhf/no.py", "python -m policy.no"]
    assert unknown_targets(page) == {"nothing"}


def test_the_name_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == NAME
    assert text_of(ROOT / "README.md").lower().startswith(f"# {NAME}\n")
    assert f"@echo '{NAME}: " in MAKEFILE


BRITISH = re.compile(
    r"(?:normal|optim|standard|quant|minim|maxim|penal|recogn|initial|summar|token|binar|organ|general)is"
    r"(?:e|ing|ation)|cent(?:re|ring)|judgement|licence|(?:label|model|cancel)l(?:ed|ing)|analyser"
    r"|(?:col|behavi|neighb|fav)our|\bdistils?\b"
)
# names in files of earlier runs and in other programs' formats
KEPT = (
    "slope_before_normalisation",
    "quantiles_of_centred",
    "normalised score",
    "was_cancelled",
    "labelledby",
    "same_behaviour",
)
# texts that studies train on, units by which their results are kept, pages made from those; former names
NOT_HELD = (
    "docs/studies/",
    "benchmarks/results/",
    "studies/preference/",
    "studies/scaling/",
    "tests/scaling_cases",
    "studies/pmp_transfer.py",
    "rlhf/recipe/keys.py",
    "rlhf/recipe/stored.py",
    "tests/test_studies_",
    "tests/test_docs.py",
)


def test_the_spelling_is_american():
    below = [
        path
        for folder in FOLDERS
        for end in ("py", "md", "yaml")
        for path in (ROOT / folder).rglob(f"*.{end}")
    ]
    names = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *below)]
    files = [name for name in names if not name.startswith(NOT_HELD)]
    assert len(files) > 500
    found = []
    for file in files:
        text = re.sub("|".join(KEPT), "", text_of(ROOT / file).lower())
        found += [(file, text[m.start() : m.end() + 9]) for m in BRITISH.finditer(text)]
    assert found == []


def test_the_help_of_each_target_names_the_package_that_it_starts():
    rules = re.findall(r"(?m)^([a-z-]+):[^#\n]*## ([^:\n]+): .+\n((?:\t.*\n?)*)", MAKEFILE)
    assert len(rules) == len(re.findall("(?m)^[a-z-]+:.*##", MAKEFILE)) > 15
    starting = {name: (told, STARTED.findall(body)) for name, told, body in rules if STARTED.search(body)}
    assert {"ppo", "reward", "card", "tax", "bench-ppo"} <= starting.keys()
    several = starting.pop("rlhf")[1]
    assert {name: told for name, (told, started) in starting.items() if started != [told]} == {}
    assert set(several) <= {told for told, _ in starting.values()}


def test_the_readme_shows_the_figures_of_the_results_page():
    rows = re.findall(r"(\d\.\d{3}) -> (\d\.\d{3})", text_of(ROOT / "README.md"))
    table = re.findall(r"(?m)^\| `make rlhf.*$", text_of(ROOT / "docs" / "results.md"))
    figures = [tuple(cell.strip() for cell in row.split("|")[4:6]) for row in table]
    assert rows == figures[:3]  # the first table
    assert len(rows) == 3
