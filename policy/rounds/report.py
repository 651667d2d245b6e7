"""What came of each round: a line, rounds.json and rounds.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from policy.rounds import plan
from rlhf.markdown import Figure, plain, table
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Rounds
from rlhf.runs.artifacts import MANIFEST, print_page, read_json, write_atomically, write_json
from rlhf.runs.stage import RUNS

_NAMES = {"gold": "gold score", "judge": "test score", "reward": "reward"}  # of a summary, the best first


@dataclass(frozen=True)
class Row:
    """One round."""

    number: int
    run: str
    policies: list[str]
    """Who wrote its new responses; empty where it began with comparisons that were there."""
    new: int
    """Comparisons that it added."""
    train: int
    """Comparisons that its reward model learned from."""
    accuracy: dict[str, Figure | None]
    """Of the reward model before the round and after it, on the round's held-out comparisons; None = none."""
    score: str
    """What the policy is measured by: ``gold``, ``judge`` or ``reward``."""
    gain: Figure
    """After less before on the held-out prompts: {before, after, mean, ci95, n}."""
    kl: Figure
    length: dict[str, float]

    def cells(self) -> list[str]:
        """As a row of the table."""
        accuracy = [
            plain(found, ".3f") if (found := self.accuracy[when]) else "" for when in ("before", "after")
        ]
        return [
            *(str(self.number), str(self.new), str(self.train), *accuracy),
            f"{self.gain['before']:.3f} -> {self.gain['after']:.3f}",
            *(plain(self.gain, "+.3f"), plain(self.kl, ".2f")),
            f"{self.length['before']:.1f} -> {self.length['after']:.1f}",
        ]

    def line(self) -> str:
        """In words."""
        cells = self.cells()
        known = f", reward accuracy {cells[3] or 'unknown'} -> {cells[4]}" if cells[4] else ""
        return (
            f"round {self.number}: {self.new} new comparisons, {self.train} to train on{known}, "
            f"{_NAMES[self.score]} {cells[5]}, KL {cells[7]}, length {cells[8]}"
        )


def row_of(recipe: Recipe, rounds: Rounds, number: int, new: int) -> Row:
    """The figures of a finished round, which added ``new`` comparisons, from what its stages wrote."""
    name = plan.run_name(recipe, number)
    results: dict[str, Any] = read_json(RUNS / name / "comparisons" / MANIFEST)["results"]
    summary = read_json(RUNS / name / "evaluate" / "summary.json")
    score = next(key for key in _NAMES if key in summary)
    paired = summary[score]
    accuracy: dict[str, Figure | None] = {"before": None, "after": None}
    file = RUNS / name / "card" / "card.json"
    if file.is_file():
        card = read_json(file)
        accuracy["after"] = card["accuracy"]["overall"]
        if card["against"]:
            accuracy["before"] = card["against"]["other_accuracy"]
    return Row(
        number=number,
        run=name,
        policies=plan.policies(recipe, rounds, number) if new else [],
        new=new,
        train=results["train"],
        accuracy=accuracy,
        score=score,
        gain={**{key: paired[key] for key in ("before", "after", "ci95", "n")}, "mean": paired["diff"]},
        kl=summary["kl"],
        length={key: summary["response_length"][key] for key in ("before", "after")},
    )


def write(recipe: Recipe, rows: Sequence[Row]) -> None:
    """rounds.json and rounds.md in the folder of the recipe's name; the page is printed."""
    folder = RUNS / recipe.name
    write_json(folder / "rounds.json", {"name": recipe.name, "rounds": [asdict(row) for row in rows]})
    head = [
        "round",
        "new",
        "trained on",
        "accuracy before",
        "after",
        _NAMES[rows[-1].score],
        "gain",
        "KL, nats",
        "tokens",
    ]
    parts = [
        f"# Rounds of {recipe.name}",
        "In each round the newest policies and the base write responses, which are ranked; a reward model is "
        "trained on all comparisons so far, and PPO from the start against it. Accuracy: of the reward model "
        "before the round and of its own, on the round's comparisons with held-out prompts. Scores, KL and "
        "length are of held-out prompts that no round trains on. Intervals: 95% over prompts.",
        table(head, [row.cells() for row in rows]),
    ]
    write_atomically(folder / "rounds.md", "\n\n".join(part.rstrip("\n") for part in parts) + "\n")
    print_page(folder / "rounds.md")
