"""The token contract on real rows: three lines that say what a model will read, and what does not hold."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.comparisons import Prompt
from rlhf.tokenization.dialogue import Dialogue

_SOME = 64  # rows that are looked at: the longest, and the first
_SHOWN = 6  # tokens of each part


def describe(dialogue: Dialogue, rows: Sequence[tuple[Prompt, str]]) -> list[str]:
    """Three lines: an example's tokens, what ends a turn, what pads; then a line for each fault found.

    rows: prompts with a response each, at least one; prompts within the limit.
    """
    longest = sorted(rows, key=lambda row: -len(row[1]))[: _SOME // 2]
    some = [*rows[: _SOME // 2], *longest]
    prompt, text = some[0]
    ids, response = dialogue.encode_prompt(prompt), dialogue.encode_response(text)
    lines = [
        f"tokens:   prompt ... {_shown(dialogue, ids[-_SHOWN:])} | response "
        f"{_shown(dialogue, response[:_SHOWN])}{' ...' if len(response) > _SHOWN else ''} | closing "
        f"{_shown(dialogue, dialogue.closing)}",
        f"turn:     {_ending(dialogue)}",
        f"padding:  {_shown(dialogue, [dialogue.pad_id])}",
    ]
    return lines + [f"warning: {fault}" for fault in faults(dialogue, some)]


def faults(dialogue: Dialogue, rows: Sequence[tuple[Prompt, str]]) -> list[str]:
    """What does not hold on some rows, a sentence each."""
    found = []
    of = f"of {len(rows)} rows looked at"
    changed = [t for _, t in rows if dialogue.decode(dialogue.encode_answer(t)).strip() != t.strip()]
    if changed:
        found.append(
            f"{len(changed)} {of} have a response that the tokenizer changes, as {changed[0][:40]!r}"
        )
    ended = sum(dialogue.encode_prompt(prompt)[-1] in dialogue.end_ids for prompt, _ in rows)
    if ended:
        found.append(
            f"{ended} {of} have a prompt that ends in a token that ends a turn, so nothing answers it"
        )
    spelled = [t for prompt, text in rows for t in (*(m.content for m in prompt), text)]
    names = [name for text in spelled if (name := dialogue.spelled.find(text))]
    if names:
        found.append(f"{len(names)} texts {of} spell out a special token, as {names[0]}; it is read as text")
    return found


def _ending(dialogue: Dialogue) -> str:
    own = dialogue.end_token is None
    also = [i for i in dialogue.end_ids[1:] if i != dialogue.eos_id]
    line = f"{_shown(dialogue, [dialogue.end_id])} ends it, {'which is EOS' if own else 'and is not EOS'}"
    line += "" if own else f" ({_shown(dialogue, [dialogue.eos_id])}, which ends a sampled response too)"
    return f"{line}; generation_config.json also has {_shown(dialogue, also)}" if also else line


def _shown(dialogue: Dialogue, ids: Sequence[int]) -> str:
    return " ".join(repr(str(token)) for token in dialogue.tokenizer.convert_ids_to_tokens(list(ids)))
