"""What is ranked: prompts with responses, of files or sampled, fixed when a session begins.

They are written once, with what they were made of; a session whose files or settings have changed since is
refused, since its answers would be about something else. Nothing heavy is loaded for responses of files.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.comparisons import Comparison, Message, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS, read_distinct
from rlhf.data.readers.files import LINE_LIMIT
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_list, prompt_of
from rlhf.errors import UserError
from rlhf.rank.session import Item
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import hash_of, read_json, write_json
from rlhf.runs.folder import StageFolder
from rlhf.runs.initial_adapter import policy_files
from rlhf.runs.stage import RUNS, differences, input_hashes

FILE = "candidates.json"
MOST_RESPONSES = 9  # of a prompt: there are that many number keys
_BATCH = 16  # prompts sampled together
_SAMPLING = ("prompts", "policies", "responses", "temperature")
_FORMAT = 1
_UNKNOWN = "file"  # who wrote the responses of a file that does not say it


class Candidate(NamedTuple):
    """A prompt, its responses, and who wrote each."""

    prompt: Prompt
    responses: tuple[str, ...]
    writers: tuple[str, ...]


def candidates(recipe: Recipe) -> list[Item]:
    """The items of the run's session; made, and written, where it begins.

    Raises:
        UserError: the files or settings are others than those that the session began with.
    """
    file = RUNS / recipe.name / "rank" / FILE
    LINE_LIMIT.set(recipe.data.max_line_megabytes << 20)
    made_of = _made_of(recipe)
    if file.is_file():
        return _kept(file, made_of)
    items = _of_files(recipe) if recipe.rank.files else _sampled(recipe, file.parent, hash_of(made_of)[:12])
    rows = [dataclasses.asdict(item) for item in items]
    write_json(file, {"made_of": made_of, "items": rows, "sha256": hash_of(rows)})
    return items


def _kept(file: Path, made_of: dict[str, Any]) -> list[Item]:
    kept = read_json(file)
    changes = differences(kept.get("made_of", {}), made_of) if isinstance(kept, dict) else ["all of it"]
    if changes:
        raise UserError(
            f"{file.parent}: this session began with other prompts or responses ({'; '.join(changes[:3])}); "
            'its answers are kept: give the new one a name of its own (SET="name=..."), or undo the change'
        )
    rows = kept.get("items")
    if kept.get("sha256") != hash_of(rows):
        raise UserError(
            f"{file} is damaged: its content hash differs; remove it, and the same command makes it anew; "
            "the answers are kept"
        )
    return [_item([Message(**m) for m in x["prompt"]], x["responses"], x["writers"]) for x in rows]


def _made_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the candidates; not what they are used for."""
    section = recipe.rank
    if section.files:
        settings: dict[str, Any] = {"seed": recipe.seed, "rank.prompts": section.prompts}
        return {"format": _FORMAT, **settings, "files": input_hashes(section.files)}
    files = [*_prompt_files(recipe), *policy_files(recipe, section.policies, "rank.policies")]
    resolved = recipe.model_dump(mode="json")
    return {
        "format": _FORMAT,
        **{key: resolved[key] for key in ("seed", "model", "lora", "dialogue")},
        **{f"rank.{key}": resolved["rank"][key] for key in _SAMPLING},
        "files": input_hashes(files),
    }


def _prompt_files(recipe: Recipe) -> Sequence[str]:
    return recipe.data.prompts or recipe.data.comparisons


def _item(prompt: Iterable[Message], responses: Sequence[str], writers: Sequence[str]) -> Item:
    key = hash_of([prompt_key(tuple(prompt)), list(responses)])[:16]
    return Item(key, tuple(prompt), tuple(responses), tuple(writers))


def _unranked(row: Row, _: str) -> list[Candidate]:
    responses = row["responses"]
    if not all(isinstance(text, str) for text in responses):
        raise BadRow("responses are not a list of strings")
    writers = row.get("writers")
    if not isinstance(writers, list) or len(writers) != len(responses):
        writers = [_UNKNOWN] * len(responses)
    return [Candidate(prompt_of(row["prompt"]), tuple(responses), tuple(map(str, writers)))]


def _of_comparison(item: Comparison | LeftOut) -> list[Candidate | LeftOut]:
    if isinstance(item, LeftOut):
        return [item]
    return [Candidate(item.prompt, item.responses, (_UNKNOWN,) * len(item.responses))]


_FORMATS: tuple[Reader[Candidate], ...] = (
    Reader(
        '{"prompt", "responses"}, with or without ranks',
        lambda row: "prompt" in row and is_list(row, "responses"),
        _unranked,
    ),
    *(reader.then(_of_comparison) for reader in READERS),
)


def _problem(found: Candidate) -> str | None:
    distinct = {text.strip() for text in found.responses}
    if not 2 <= len(distinct) <= MOST_RESPONSES:
        return f"not 2 to {MOST_RESPONSES} different responses"
    return prompt_problem(found.prompt) or ("empty response" if "" in distinct else None)


def _of_files(recipe: Recipe) -> list[Item]:
    section = recipe.rank
    found, counts = read_distinct(
        "prompt with responses", section.files, _FORMATS, _problem,
        lambda x: (prompt_key(x.prompt), tuple(sorted(x.responses))),
        on_bad_rows=recipe.data.on_bad_rows, key="rank.files",
    )  # fmt: skip
    print(f"rank.files: {counts}", flush=True)
    random.Random(f"{recipe.seed}:rank").shuffle(found)
    return [_distinct(*candidate) for candidate in found[: section.prompts]]


def _distinct(prompt: Prompt, responses: Sequence[str], writers: Sequence[str]) -> Item:
    """The item; a text that stands twice has its first writer, one that says nothing is left out."""
    said: dict[str, tuple[str, str]] = {}
    for text, who in zip(responses, writers, strict=True):
        if text.strip():
            said.setdefault(text.strip(), (text, who))
    return _item(prompt, [text for text, _ in said.values()], [who for _, who in said.values()])


def _sampled(recipe: Recipe, folder: Path, key: str) -> list[Item]:
    """Responses of the policies; batches that are done survive an interruption."""
    from rlhf.collect.responses import sampled_responses
    from rlhf.data.prompts import read_prompts
    from rlhf.data.stored import within_prompt_limit
    from rlhf.runs.dtype import settled
    from rlhf.tokenization.dialogue import load_dialogue

    section, dialogue = recipe.rank, load_dialogue(recipe)
    recipe = settled(recipe, folder.parent)
    specs = _prompt_files(recipe)
    prompts, counts = read_prompts(
        specs, on_bad_rows=recipe.data.on_bad_rows, key="data.prompts", refuses=dialogue.refusal
    )
    prompts = within_prompt_limit(prompts, lambda prompt: prompt, recipe, dialogue, counts)
    if not prompts:
        raise UserError(f"nothing usable in {', '.join(specs)}: {counts}")
    random.Random(f"{recipe.seed}:rank").shuffle(prompts)
    run = StageFolder("rank", folder / f"sampling-{key}")
    items, few = [], 0
    for batch in sampled_responses(
        recipe, run, dialogue, prompts[: section.prompts], policies=section.policies,
        responses=section.responses, temperature=section.temperature, prompts_per_batch=_BATCH,
        purpose="rank",
    ):  # fmt: skip
        for prompt, texts, writers in zip(batch.prompts, batch.responses, batch.writers, strict=True):
            item = _distinct(prompt, texts, writers)
            few += len(item.responses) < 2
            if len(item.responses) >= 2:
                items.append(item)
    if few:
        print(f"rank: {few} prompts are left out: fewer than 2 different responses", flush=True)
    if not items:
        raise UserError("rank: no prompt has 2 different responses: raise rank.temperature or rank.responses")
    return items
