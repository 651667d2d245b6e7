"""The candidates as tasks for other tools; what those export, `data.comparisons` reads.

Label Studio (its tag Ranker): a JSON list of tasks to import, and the labeling configuration. Argilla 2: the
settings and the records of data sets, as JSON, for a few lines of its SDK. Responses are shuffled, and who
wrote them is not there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.rank.session import Item
from rlhf.runs.artifacts import write_atomically, write_json

TOOLS = ("label-studio", "argilla")
_CONFIGURATION = """<View>
  <Text name="shown" value="$shown"/>
  <List name="results" value="$items" title="Responses, the best on top"/>
  <Ranker name="rank" toName="results"/>
</View>
"""


def write_tasks(tool: str, items: Sequence[Item], folder: Path, instructions: str) -> list[str]:
    """Write the tasks for a tool into a folder; returns what to say about them."""
    file = folder / f"{tool}.json"
    if tool == "argilla":
        write_json(file, argilla(items, instructions))
        return [
            f"wrote {file}: settings and records for rg.Dataset of the SDK of Argilla 2; docs/ranking.md has "
            "the lines"
        ]
    config = folder / "label-studio.xml"
    write_json(file, label_studio(items))
    write_atomically(config, _CONFIGURATION)
    return [f"wrote {file}: import it into a project of Label Studio with the labeling interface {config}"]


def _shuffled(item: Item) -> list[str]:
    return random.Random(item.id).sample(item.responses, len(item.responses))


def label_studio(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Tasks: ``prompt`` as messages, which comes back in the export; ``shown`` is their text on the page."""
    return [
        {
            "data": {
                "prompt": [{"role": m.role, "content": m.content} for m in item.prompt],
                "shown": "\n\n".join(f"[{m.role}]\n{m.content}" for m in item.prompt),
                "items": [{"id": str(n), "body": text} for n, text in enumerate(_shuffled(item), 1)],
            }
        }
        for item in items
    ]


def argilla(items: Sequence[Item], instructions: str) -> list[dict[str, Any]]:
    """Data sets, one for each number of responses, since a ranking names all of them.

    Each has settings (a chat field ``prompt``, text fields ``response-1``, ..., one ranking) and records.
    """
    found = []
    for number in sorted({len(item.responses) for item in items}):
        names = [f"response-{n}" for n in range(1, number + 1)]
        records = [
            {
                "prompt": [{"role": m.role, "content": m.content} for m in item.prompt],
                **dict(zip(names, _shuffled(item), strict=True)),
            }
            for item in items
            if len(item.responses) == number
        ]
        fields = [{"name": "prompt", "type": "chat"}, *({"name": n, "type": "text"} for n in names)]
        question = {"name": "ranking", "type": "ranking", "values": names}
        found.append(
            {"guidelines": instructions, "fields": fields, "questions": [question], "records": records}
        )
    return found
