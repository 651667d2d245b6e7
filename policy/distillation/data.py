"""What is distilled on: generic texts, and questions with their best answers, half and half.

Bai 2022 (arXiv 2204.05862), A.1, after Askell 2021: a text stands behind the prompt where a new user turn was
just opened; a question and its best answer are a conversation behind the prompt. The student reads the same
tokens without the prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.data.comparisons import Comparison, Counts, prompt_key, reservoir_sample
from rlhf.data.readers import stream_comparisons
from rlhf.data.readers.files import origins
from rlhf.data.readers.native import read_native
from rlhf.data.split import split_by_hash
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue
from rlhf.tokenization.prompt_prefix import Context

HALVES = TEXTS, QUESTIONS = "texts", "questions"
Ids = NDArray[np.uint32]


class Passage(NamedTuple):
    """Tokens that teacher and student both read (X of Askell 2021), and what each reads before them."""

    half: str
    """``texts`` or ``questions``."""
    group: str
    """The text or prompt that it is of: those of one group stay on one side, and depend on each other."""
    teacher_prefix: Ids
    """What the teacher reads between the prompt and these tokens."""
    student_prefix: Ids
    """What the student reads before them: a BOS or the template's own system turn, often nothing."""
    ids: Ids
    first: int
    """Index of the first token that the student can predict: 0, or 1 where nothing is before it."""
    response_start: int
    """Index of the first token of the answer; of a text, ``first``."""

    @property
    def places(self) -> int:
        """Number of tokens that the student predicts."""
        return len(self.ids) - self.first

    @property
    def student_ids(self) -> list[int]:
        """All that the student reads."""
        return [*self.student_prefix.tolist(), *self.ids.tolist()]

    @property
    def teacher_ids(self) -> list[int]:
        """All that the teacher reads behind the prompt."""
        return [*self.teacher_prefix.tolist(), *self.ids.tolist()]


class Frame(NamedTuple):
    """What texts and questions are put into."""

    context: Context
    """The prompt."""
    bare: Context
    """No prompt."""
    dialogue: Dialogue
    max_tokens: int


def passages(
    recipe: Recipe, section: Distill, run: StageRun, frame: Frame
) -> tuple[list[Passage], list[Passage], dict[str, Any]]:
    """The passages to train on and those held out, each in an order drawn by the seed, and what was counted.

    Raises:
        UserError: a row that cannot be used, a half that gives nothing, or only one text or prompt.
    """
    number = round(section.sequences * section.text_share)
    wanted = {TEXTS: number, QUESTIONS: section.sequences - number}
    parts: tuple[list[Passage], list[Passage]] = ([], [])
    counts: dict[str, Any] = {}
    for half, asked in wanted.items():
        if not asked:
            continue
        tally = Counts()
        source = (
            texts(section.texts, frame)
            if half == TEXTS
            else questions(_comparisons(recipe, section, run, frame.dialogue, tally), frame, tally)
        )
        drawn = reservoir_sample(source, asked, _random(recipe.seed, half))
        if not drawn:
            raise UserError(
                f"distill.{half}: nothing usable{f': {tally}' if tally.read else ''}; name other files"
            )
        few = f" ({asked} were asked for)" if len(drawn) < asked else ""
        run.say(f"distill: {half}: {len(drawn)} sequences{few}{f'; {tally}' if tally.read else ''}")
        counts[half] = {"sequences": len(drawn), **({"counts": tally.as_dict()} if tally.read else {})}
        for part, some in zip(parts, split(drawn, section.held_out, recipe.seed), strict=True):
            part.extend(some)
    for part in parts:
        _random(recipe.seed, "order").shuffle(part)
    return *parts, counts


def texts(specs: Sequence[str], frame: Frame) -> Iterator[Passage]:
    """Windows of generic texts.

    The lines of a .txt file are one text, whose windows are texts of their own to the split; all windows of a
    row with a ``text`` field stay together.

    Raises:
        UserError: a row without text (file and line).
    """
    size = frame.max_tokens
    for origin in origins(specs, key="distill.texts"):
        waiting: list[int] = []
        for number, row in origin.rows:
            if isinstance(row, str):
                waiting += frame.dialogue.encode_text(row + "\n")
                while len(waiting) >= size:
                    window, waiting = waiting[:size], waiting[size:]
                    yield _text(window, str(window), frame)
                continue
            text = row.get("text") if isinstance(row, Mapping) else None
            if not isinstance(text, str):
                raise UserError(
                    f"{origin.where(number)}: no text; distill.texts wants lines or rows with a `text` field"
                )
            ids = frame.dialogue.encode_text(text)
            yield from (_text(ids[i : i + size], text, frame) for i in range(0, len(ids) - 1, size))
        if len(waiting) > 1:
            yield _text(waiting, str(waiting), frame)


def _text(ids: Sequence[int], group: str, frame: Frame) -> Passage:
    before, prefix = frame.context.opening_ids, frame.bare.prefix_ids
    first = 0 if prefix else 1
    return Passage(TEXTS, _hash(group), _ids(before), _ids(prefix), _ids(ids), first, first)


def questions(comparisons: Iterable[Comparison], frame: Frame, counts: Counts) -> Iterator[Passage]:
    """Every prompt with its best response, once; what is too long to have an answer in it is counted."""
    seen: set[str] = set()
    for comparison in comparisons:
        key = prompt_key(comparison.prompt)
        if key in seen:
            counts.drop("prompt that came before")
            continue
        seen.add(key)
        passage = question(comparison, key, frame)
        if passage is None:
            counts.drop("question longer than distill.max_tokens")
        else:
            yield passage


def question(comparison: Comparison, group: str, frame: Frame) -> Passage | None:
    """A prompt and its best response as a conversation; None where no answer would be left.

    With the template ``chat`` the answer ends in EOS, as everywhere; with ``plain`` nothing closes it.
    """
    best = comparison.responses[min(range(len(comparison.ranks)), key=comparison.ranks.__getitem__)]
    end = [frame.dialogue.end_id] if frame.dialogue.template == "chat" else []
    response = [*frame.context.answer(best), *end]
    teacher = [*frame.context.after_dialogue(comparison.prompt, reply=True), *response]
    student = [*frame.bare.prefix_ids, *frame.bare.after_dialogue(comparison.prompt, reply=True), *response]
    pairs = zip(teacher[::-1], student[::-1], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    ids = teacher[len(teacher) - common :][: frame.max_tokens]
    prefix = student[: len(student) - common]
    first = 0 if prefix else 1
    response_start = max(first, common - len(response))
    if response_start >= len(ids):
        return None
    before = teacher[: len(teacher) - common]
    return Passage(QUESTIONS, group, _ids(before), _ids(prefix), _ids(ids), first, response_start)


def _comparisons(
    recipe: Recipe, section: Distill, run: StageRun, dialogue: Dialogue, counts: Counts
) -> Iterable[Comparison]:
    if section.questions:
        return stream_comparisons(
            section.questions,
            on_bad_rows=recipe.data.on_bad_rows,
            counts=counts,
            key="distill.questions",
            refuses=dialogue.refusal,
        )
    return read_native(run.parent("comparisons") / "train.jsonl", "stop", counts)


def split(drawn: Sequence[Passage], share: float, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Passages of one half to train on and held out, whole groups at a time, by a hash of (seed, group).

    Raises:
        UserError: there is one group only.
    """
    if len({passage.group for passage in drawn}) < 2:
        raise UserError(f"distill.{drawn[0].half}: only one text or prompt, which cannot be split; give more")
    # salted: the training comparisons are what another hash of (seed, prompt) has left over
    return split_by_hash(drawn, lambda passage: passage.group, share, f"distill:{seed}")


def content_hash(all_passages: Iterable[Passage]) -> str:
    """SHA-256 of all that a teacher reads behind its prompt, in its order."""
    digest = hashlib.sha256()
    for passage in all_passages:
        digest.update(np.asarray([len(passage.teacher_prefix), len(passage.ids)], np.int64).tobytes())
        digest.update(passage.teacher_prefix.tobytes() + passage.ids.tobytes())
    return digest.hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _ids(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.uint32)


def _random(seed: int, purpose: str) -> random.Random:
    return random.Random(json.dumps([seed, "distill", purpose]))
