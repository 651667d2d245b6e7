"""What a tax run has finished, piece by piece on the disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf import NAME, __version__
from rlhf.runs.artifacts import hash_of, write_atomically

_MADE_WITH = ("torch", "transformers", "peft", "lm_eval")  # another release may say otherwise


class Parts:
    """Results of single (variant, task) pieces of work in a folder, each with the key of what made it.

    A key holds everything that the result depends on; a piece with another key is not there. Pieces of
    several keys lie side by side, so that tables can share a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made_with = {NAME: __version__, **{name: version(name) for name in _MADE_WITH}}

    def get(self, name: str, key: dict[str, Any]) -> Any:
        """The result of that name and key, or None."""
        file = self._file(name, key)
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not done, or damaged: done again
            return None
        return noted["value"] if noted.get("key") == key else None

    def put(self, name: str, key: dict[str, Any], value: Any) -> None:
        """Keep a result, whole or not at all."""
        write_atomically(self._file(name, key), json.dumps({"key": key, "value": value}, ensure_ascii=False))

    def _file(self, name: str, key: dict[str, Any]) -> Path:
        return self.folder / f"{name.replace('/', '-')}--{hash_of([key, self._made_with])[:16]}.json"
