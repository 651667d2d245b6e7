"""The pages of a ranking session as routes of the server: the one to rank on, and the owner's."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhf import NAME, __version__
from rlhf.rank.agreement import agreement
from rlhf.rank.session import LONGEST_NAME, LONGEST_REASON, Session
from rlhf.rank.store import Answer
from rlhf.web.server import RefusedError, Reply, Request, Routes, json_reply


def routes(session: Session, run: str, instructions: str, owner: str) -> Routes:
    """The routes of a session. owner: path of the owner's page, which those who rank do not get."""
    environment = Environment(
        loader=PackageLoader("rlhf.rank", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"project": f"{NAME} {__version__}", "run": run}
    page = environment.get_template("page.html.jinja").render(
        instructions=instructions, longest_name=LONGEST_NAME, longest_reason=LONGEST_REASON
    )
    style = _text("rlhf.report", "page.css.jinja") + _text("rlhf.rank", "page.css.jinja")
    script = _text("rlhf.rank", "page.js.jinja")

    def owners(_: Request) -> Reply:
        return Reply(environment.get_template("owner.html.jinja").render(**summary(session)))

    return {
        "GET /": lambda _: Reply(page),
        "GET /style.css": lambda _: Reply(style, "text/css"),
        "GET /page.js": lambda _: Reply(script, "text/javascript"),
        f"GET /{owner}": owners,
        "POST /save": lambda request: json_reply(session.save(*_who(request), request.body)),
        **{
            f"POST /{name}": functools.partial(_call, getattr(session, name))
            for name in ("next", "undo", "leave", "alive")
        },
    }


def owner_path() -> str:
    """A path that those who rank cannot guess."""
    return f"owner-{secrets.token_urlsafe(12)}"


def _text(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _who(request: Request) -> tuple[str, str]:
    name, seat = request.body.get("name"), request.body.get("seat")
    if not isinstance(name, str) or not isinstance(seat, str):
        raise RefusedError(400, "who is it? reload the page")
    return name, seat


def _call(method: Callable[[str, str], dict[str, Any]], request: Request) -> Reply:
    return json_reply(method(*_who(request)))


def _is_ranked(row: Answer) -> bool:
    return not (row.get("skipped") or row.get("all_bad"))


def summary(session: Session) -> dict[str, Any]:
    """What the owner sees: progress, people, agreement, and how those who wrote the responses fare."""
    given = list(session.answers.values())
    people: dict[str, list[Answer]] = {}
    for answers in given:
        for name, row in answers.items():
            people.setdefault(name, []).append(row)
    ranked = [{name: row["ranks"] for name, row in answers.items() if _is_ranked(row)} for answers in given]
    whole = sum(
        sum(not row.get("skipped") for row in answers.values()) >= session.overlap for answers in given
    )
    return {
        "items": len(given),
        "whole": whole,
        "overlap": session.overlap,
        "answers": sum(map(len, given)),
        "people": [_person(name, rows) for name, rows in sorted(people.items())],
        "writers": _writers(session),
        **agreement(ranked),
    }


def _person(name: str, rows: list[Answer]) -> dict[str, Any]:
    seconds = sorted(row["seconds"] for row in rows if row.get("seconds"))
    return {
        "name": name,
        "answers": len(rows),
        "skipped": sum(bool(row.get("skipped")) for row in rows),
        "all_bad": sum(bool(row.get("all_bad")) for row in rows),
        "seconds": seconds[len(seconds) // 2] if seconds else None,
    }


def _writers(session: Session) -> list[tuple[str, float, int]]:
    """(writer, share of the responses of others that its own beat, a tie half; how many met)."""
    won: dict[str, list[float]] = {}
    for item, answers in session.answers.items():
        writers = session.items[item].writers
        for ranks in (row["ranks"] for row in answers.values() if _is_ranked(row)):
            for i, one in enumerate(writers):
                for j, other in enumerate(writers):
                    if one != other:
                        better = (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])
                        won.setdefault(one, []).append(0.5 + 0.5 * better)
    return [(name, sum(found) / len(found), len(found)) for name, found in sorted(won.items())]


def lines(found: dict[str, Any]) -> list[str]:
    """The summary for a terminal."""
    people = "one person" if len(found["people"]) == 1 else f"{len(found['people'])} people"
    said = [f"{found['answers']} answers by {people}; "
            f"{found['whole']} of {found['items']} prompts have all they need"]  # fmt: skip
    if found["pairwise"]:
        low, high = found["pairwise"]["ci95"]
        interval = "" if low is None or math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        alpha = "not known" if found["alpha"] is None else f"{found['alpha']:.2f}"
        said.append(
            f"agreement on {found['prompts']} prompts: {found['pairwise']['mean']:.2f}{interval} of the "
            f"pairs of responses (0.5 by chance), Krippendorff's alpha {alpha} (0 by chance)"
        )
    return said
