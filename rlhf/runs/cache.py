"""Values that are computed once and kept on disk, so that an interrupted stage goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.runs.artifacts import hash_of, write_atomically


def remember(
    folder: Path,
    name: str,
    key: object,
    compute: Callable[[], Any],
    *,
    is_main: bool = True,
    on_new: Callable[[], None] = lambda: None,
) -> Any:
    """The value of a name and a key: read where an earlier start left it, computed and written otherwise.

    A file that is damaged, even by one bit, counts as not there. Values of one name and several keys lie side
    by side.

    Args:
        folder: where the values lie, a file each.
        name: of the value; a slash in it becomes a dash.
        key: all that the value depends on, JSON-able; None where the folder belongs to one stage, whose
            fingerprint says that.
        compute: gives the value, JSON-able. Every process of a run that lacks it calls this.
        is_main: whether this process writes.
        on_new: called after a new value was written.

    Returns:
        The value as JSON gives it back, new or not.
    """
    suffix = "" if key is None else f"--{hash_of(key)[:16]}"
    file = folder / f"{name.replace('/', '-')}{suffix}.json"
    try:
        noted = json.loads(file.read_bytes())
        if noted["sha256"] == hash_of(noted["value"]):
            return noted["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = json.loads(json.dumps(compute(), ensure_ascii=False))
    if is_main:
        content = {"key": key, "value": value, "sha256": hash_of(value)}
        write_atomically(file, json.dumps(content))
        on_new()
    return value
