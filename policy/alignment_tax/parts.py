"""What a tax run has finished, piece by piece on the disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.artifacts import write_atomically


class Parts:
    """Results of single (arm, task) pieces of work in a folder, each with the key of what made it.

    A key holds everything that the result depends on; a piece with another key is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, key: dict[str, Any]) -> Any:
        """The result of that name and key, or None."""
        file = self._file(name)
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not done, or damaged: done again
            return None
        return noted["value"] if noted.get("key") == key else None

    def put(self, name: str, key: dict[str, Any], value: Any) -> None:
        """Keep a result, whole or not at all."""
        write_atomically(self._file(name), json.dumps({"key": key, "value": value}, ensure_ascii=False))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-')}.json"
