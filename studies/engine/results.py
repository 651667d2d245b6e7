"""Look-ups in the finished units of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from studies.engine.units import Unit, read_result


@dataclass(frozen=True)
class Results:
    """Units, and what the file of each holds."""

    units: Sequence[Unit]
    found: Sequence[dict[str, Any]]

    @classmethod
    def read(cls, units: Sequence[Unit], folder: Path) -> Self:
        """The results of finished units.

        Raises:
            FileNotFoundError: one is not done.
        """
        found = []
        for unit in units:
            content = read_result(unit, folder)
            if content is None:
                raise FileNotFoundError(f"{folder} has no result of {unit.name}")
            found.append(content)
        return cls(units, found)

    def all(self, kind: str, **settings: Any) -> list[dict[str, Any]]:
        """The results of a kind with these settings, in the order of the units."""
        return [
            content["result"]
            for unit, content in zip(self.units, self.found, strict=True)
            if unit.kind == kind and all(unit.settings.get(k) == v for k, v in settings.items())
        ]

    def one(self, kind: str, **settings: Any) -> dict[str, Any]:
        """The result of the one unit with these settings.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = self.all(kind, **settings)
        if len(found) != 1:
            raise KeyError(f"{len(found)} results for {kind} {settings}")
        return found[0]

    def values(self, kind: str, name: str, **settings: Any) -> list[Any]:
        """The values a setting takes among the units of a kind, in ascending order."""
        some = [u.settings for u in self.units if u.kind == kind]
        return sorted({s[name] for s in some if all(s.get(k) == v for k, v in settings.items())})

    def by_seed(self, kind: str, **settings: Any) -> list[dict[str, Any]]:
        """The results of all seeds for otherwise these settings, by ascending seed."""
        return [self.one(kind, seed=seed, **settings) for seed in self.values(kind, "seed")]
