"""How long the rows of a recipe are and how many, as far as that can be told without loading a model: from
small local files and the model's tokenizer, else from the recipe's own limits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.data.comparisons import Comparison
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe, files_of
from rlhf.recipe.tax import DEFAULT_VARIANTS

_BYTES = 400_000  # of files that are read; larger ones would take longer than the answer is worth
_TURN, _SYSTEM = 6, 32  # tokens that a chat template adds to a turn, and before the first one


class Lengths(NamedTuple):
    """Tokens of the longest rows, and their number."""

    prompt: int
    """Longest prompt of a comparison, and of a rollout."""
    responses: int
    """Most responses of a comparison."""
    comparisons: int | None
    """Number of them, held-out ones included; None = not known before they are read."""
    measured: bool
    """Read from the files; else these are the recipe's limits."""
    tokens: int | None = None
    """Of all comparisons together at most, by the size of local files; None = not known."""
    context: int = 0
    """Of the text of `hhh_prompt`, where a variant of the tax table runs behind it."""


def lengths_of(recipe: Recipe) -> Lengths:
    """The lengths of a recipe's comparisons and prompts."""
    data, limit = recipe.data, recipe.dialogue.max_prompt_tokens
    count, most = data.limit, 2
    if data.sampled:
        count, most = recipe.collect.prompts, recipe.collect.responses
    given = [] if data.sampled else [*data.comparisons, *data.held_out_comparisons]
    found = _comparisons(given, recipe) if given else []
    if found:
        most, count = max(len(c.responses) for c in found), min(len(found), data.limit or len(found))
    prompts = [c.prompt for c in found]
    if data.rankings:
        most = data.rankings
    if _small(data.prompts):
        try:
            prompts += read_prompts(data.prompts, on_bad_rows="skip")[0]
        except UserError:
            prompts = []  # the stage that reads them tells it better
    size = tokens_of(recipe.model.path, random=recipe.model.source == "random")
    context = size(text) if (text := _context(recipe)) else 0
    known = bool(prompts) and (data.sampled or bool(found)) and (_small(data.prompts) or not data.prompts)
    if not known:
        return Lengths(limit, most, count, measured=False, tokens=_tokens(given), context=context)
    chat = recipe.dialogue.template == "chat"
    sized = sorted(prompts, key=lambda p: -sum(len(m.content) for m in p))[:40]
    longest = max(sum(size(m.content) + _TURN * chat for m in p) + _SYSTEM * chat for p in sized)
    return Lengths(min(limit, longest), most, count, measured=True, context=context)


def _context(recipe: Recipe) -> str:
    """The text before all that a prompted variant of the tax table reads; empty where there is none."""
    file, variants = Path(recipe.hhh_prompt).expanduser(), recipe.tax and recipe.tax.variants
    if recipe.tax is None or not {"prompted", "policy_prompted"} & set(variants or DEFAULT_VARIANTS):
        return ""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def tokens_of(path: str, *, random: bool) -> Callable[[str], int]:
    """Counts a text's tokens: by the tokenizer where the model is in place, else a token for four letters,
    and for each byte of the tiny random model."""
    file = Path(path).expanduser() / "tokenizer.json"
    if file.is_file() and not random:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: len(text.encode()) if random else len(text) // 4 + 1


def _tokens(specs: Sequence[str]) -> int | None:
    """A token for every four bytes of local files; None where some are elsewhere."""
    if not specs or any(spec.startswith("hub:") for spec in specs):
        return None
    return sum(os.path.getsize(path) for spec in specs for path in files_of(spec)) // 4


def _small(specs: Sequence[str]) -> bool:
    """Whether specs name local files that are read in no time."""
    if not specs or any(spec.startswith("hub:") for spec in specs):
        return False
    paths = [Path(path) for spec in specs for path in files_of(spec)]
    return bool(paths) and all(p.is_file() for p in paths) and sum(p.stat().st_size for p in paths) < _BYTES


def _comparisons(specs: Sequence[str], recipe: Recipe) -> list[Comparison]:
    if not _small(specs):
        return []
    try:
        return read_comparisons(specs, on_bad_rows="skip", columns=recipe.data.columns)[0]
    except (UserError, json.JSONDecodeError):
        return []
