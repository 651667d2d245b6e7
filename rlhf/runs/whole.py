"""Whether what a finished stage left is still what it wrote: content hashes against its manifest.

Whoever reads a file of another stage, or of a folder that has a manifest, looks here first: a flipped bit in
an adapter would change every figure after it without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs.artifacts import MANIFEST, PROBE_SCORES, fault_of, read_manifest

READ = {
    "comparisons": ("*.jsonl",),
    "sft": ("policy/*",),
    "distill": ("policy/*", "model/*"),
    "pmp": ("model/*",),
    "reward": ("model*/*", "test_model/*", PROBE_SCORES),
    "ppo": ("policy/*",),
    "dpo": ("policy/*",),
}
"""What other stages read of a finished one: the names of its files. Nothing is read of the last three."""
STAGES = (*READ, "card", "evaluate", "tax")
"""All stages, in order; each has a folder and a make target of its name."""
_UP = 4  # folders above a place in which its manifest is looked for


def check_whole(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Refuse a finished folder that is not as its manifest says.

    names: patterns of the files that matter, such as ``policy/*``.

    Raises:
        UserError: a file is missing or damaged: which, and what makes it anew.
    """
    fault = fault_of(folder, names)
    if fault:
        raise UserError(f"{fault}; remove {folder} and {_maker(folder)}")


def manifest_of(folder: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The manifest of a finished stage, with these keys.

    Raises:
        UserError: it is damaged, and what makes it anew.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.keys() >= set(keys):
        raise UserError(f"{folder / MANIFEST} is damaged; remove {folder} and {_maker(folder)}")
    return manifest


def check_place(place: str | Path) -> None:
    """Refuse a folder or file that a manifest beside or above it knows otherwise; others pass.

    place: as a recipe names it. A hub id and a folder without a manifest have nothing to be compared with.

    Raises:
        UserError: as :func:`check_whole`.
    """
    path = Path(place).expanduser()
    for folder in (path, *path.parents)[: _UP + 1]:
        if not (folder / MANIFEST).exists():
            continue
        if _foreign(folder, named=folder == path):
            return
        below = path.relative_to(folder).as_posix()
        names = READ.get(folder.name, ("*",)) if below == "." else (below, f"{below}/*")
        if "source" in (read_manifest(folder) or ()):  # of `make model`; a template may be edited there
            names = ("*.safetensors",)
        check_whole(folder, names)
        return


def _foreign(folder: Path, *, named: bool) -> bool:
    """Whether a manifest is another tool's; one that is no JSON is ours where the recipe names its folder."""
    if (folder / "fingerprint.json").is_file():
        return False
    try:
        noted = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return not named
    return not (isinstance(noted, dict) and {"identity", "files"} <= noted.keys())


def _maker(folder: Path) -> str:
    if folder.name in STAGES:
        return f"run `make {folder.name} RECIPE=...` for that run again"
    if "source" in (read_manifest(folder) or ()):
        return "run `make model RECIPE=...` again"
    return "make it anew"
