"""A run's page, or that of several runs: one file of HTML that needs nothing else, below 5 MB."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf import NAME, __version__
from rlhf.errors import UserError
from rlhf.report.gather import Run
from rlhf.report.overoptimization import notices
from rlhf.report.sections import EVALUATIONS, sections
from rlhf.runs.artifacts import write_atomically

MAX_BYTES = 5_000_000  # of a page
SAMPLES = 20  # of a run
_LONGEST = 4000  # characters of a text that is shown; less where the page would be too large


def write_page(runs: Sequence[Run], file: Path) -> None:
    """Write the page of runs, whatever they hold.

    Raises:
        UserError: it is too large even with the shortest texts.
    """
    write_atomically(file, page_of(runs, file)[0])


def page_of(runs: Sequence[Run], file: Path, *, live: bool = False) -> tuple[bytes, str]:
    """The page of runs, and its Content-Security-Policy.

    Args:
        runs: what their folders hold.
        file: where the page is, for its links to files.
        live: it is served while they run: it asks for news, and files are named without links.

    Raises:
        UserError: it is too large even with the shortest texts.
    """
    environment = Environment(
        loader=PackageLoader("rlhf.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    scripts = ("page.js.jinja", "live.js.jinja") if live else ("page.js.jinja",)
    script = "\n".join(_source(environment, name) for name in scripts)
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    asks = "connect-src 'self'; " if live else ""
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; img-src data:; "
        f"{asks}base-uri 'none'; form-action 'none'"
    )
    parts = {
        "runs": runs,
        "sections": sections(runs),
        "style": Markup(_source(environment, "page.css.jinja")),
        "script": Markup(script),
        "policy": policy,
        "live": live,
        "title": " and ".join(run.name for run in runs),
        "project": f"{NAME} {__version__}",
        "notices": notices(runs),
        "faults": [(run, s) for run in runs for s in run.stages.values() if s.state != "finished"],
    }
    template = environment.get_template("page.html.jinja")
    environment.globals |= {"link": lambda source: _link(source, file), "svg": Markup}
    longest = _LONGEST
    while True:
        text = template.render(**parts, samples=[s for run in runs for s in samples_of(run, longest)])
        content = text.encode("utf-8", "replace")
        if len(content) < MAX_BYTES:
            return content, policy
        if longest < 100:
            raise UserError(f"{file}: the page of {len(runs)} runs has more than 5 MB: name fewer (RUNS=...)")
        longest //= 2


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()


def _link(source: tuple[Run, str], page: Path) -> dict[str, str]:
    """Where a file is from the page, and what it is called."""
    run, name = source
    path = Path(os.path.relpath(run.folder / name, page.parent)).as_posix()
    return {"href": quote(path), "name": path}


def samples_of(run: Run, longest: int = _LONGEST) -> list[dict[str, Any]]:
    """Responses before and after, evenly spread over the held-out prompts, as text to be shown.

    longest: characters of a text; the rest is counted.
    """
    rows = run.responses
    number = min(SAMPLES, len(rows))
    chosen = [round(i * (len(rows) - 1) / max(1, number - 1)) for i in range(number)]
    stage = next(
        (name for name in EVALUATIONS if name in run.stages and run.stages[name].page), EVALUATIONS[0]
    )
    found = []
    for line in chosen:
        texts = {key: str(rows[line].get(key) or "") for key in ("prompt", "before", "after")}
        scores = rows[line].get("scores")
        scores = {
            str(name): (float(pair[0]), float(pair[1]))
            for name, pair in (scores if isinstance(scores, dict) else {}).items()
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        }
        first = next(iter(scores.values()), None)
        found.append(
            {
                "run": run.name,
                "line": line + 1,
                "source": (run, f"{stage}/responses.jsonl"),
                "scores": scores,
                "change": "unknown" if first is None else _change(first[1] - first[0]),
                "length": _change(len(texts["after"]) - len(texts["before"])),
                **{key: shown(text, longest) for key, text in texts.items()},
            }
        )
    return found


def _change(difference: float) -> str:
    return "more" if difference > 0 else "less" if difference < 0 else "equal"


def shown(text: str, longest: int = _LONGEST) -> str:
    """A text without characters that a page cannot hold, cut where it is very long."""
    more = len(text) - longest
    text = text[:longest]
    text = "".join(c if c.isprintable() or c in "\n\t" or c.isspace() else "\ufffd" for c in text)
    return f"{text} [... {more:,} more characters]" if more > 0 else text
