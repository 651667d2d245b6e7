"""A text that a model runs under: the HHH prompt, or nothing (Askell 2021, arXiv 2112.00861).

The file has the structure of Askell's prompt: a preamble of one paragraph, a line of five dashes, then
dialogues whose turns begin with ``Human:`` and ``Assistant:``, with a line of dashes between two of them.

With the template ``chat`` the preamble becomes the system turn and the dialogues become turns of the chat
template. With ``plain`` the model reads the text as it stands, and every dialogue behind it is written in the
same form, for the model without a prompt too; :meth:`rlhf.tokenization.dialogue.Dialogue.encode_prompt` has
no tags.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.tokenization.special_tokens import special_start
from rlhf.tokenization.template import PROBE, RefusedTurnsError

if TYPE_CHECKING:
    from rlhf.tokenization.dialogue import Dialogue

SEPARATOR = "-----"
_SEPARATES = re.compile(r"-{4,}\s*")
_TURN = re.compile(r"(Human|Assistant):[ \t]*(.*)")
_TAGS = {"user": "Human", "assistant": "Assistant"}
_ROLES = {tag: role for role, tag in _TAGS.items()}


class PromptText(NamedTuple):
    """What a prompt file says."""

    preamble: str
    dialogues: tuple[tuple[Message, ...], ...]
    """Turns of each, user and assistant in alternation, the last one the assistant's."""

    @property
    def turns(self) -> tuple[Message, ...]:
        """All of it as one conversation: a system turn, then the dialogues one after the other."""
        return (Message("system", self.preamble), *(turn for turns in self.dialogues for turn in turns))


def read_text(file: Path) -> str:
    """The text of a prompt file, UTF-8.

    Raises:
        UserError: there is none, or it is not UTF-8 (file and line).
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; check the path (hhh_prompt)") from None


def parse(text: str, name: str) -> PromptText:
    """Read a prompt file's text.

    Args:
        text: the content.
        name: of the file, for messages.

    Raises:
        UserError: it has another structure; the message names file and line and says what belongs there.
    """
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if _SEPARATES.fullmatch(line):
            blocks.append([])
        elif line.strip() or blocks[-1]:
            blocks[-1].append((number, line))
    preamble, dialogues = blocks[0], [block for block in blocks[1:] if block]
    if not text.strip():
        raise UserError(
            f"{name}:1: the prompt file is empty; it holds a preamble, a line {SEPARATOR}, dialogues"
        )
    for number, line in preamble:
        if _TURN.match(line):
            raise UserError(
                f"{name}:{number}: a turn before the line {SEPARATOR}; put a preamble and that line above"
            )
    if not preamble:
        raise UserError(f"{name}:1: no preamble; write a paragraph above the first line {SEPARATOR}")
    if not dialogues:
        raise UserError(
            f"{name}:{preamble[-1][0]}: no dialogue behind the preamble; add a line {SEPARATOR} and turns "
            "that begin with `Human: ` and `Assistant: `"
        )
    return PromptText(
        _joined(line for _, line in preamble), tuple(_turns(block, name) for block in dialogues)
    )


def _turns(block: Sequence[tuple[int, str]], name: str) -> tuple[Message, ...]:
    """The turns of one dialogue."""
    turns: list[tuple[int, str, list[str]]] = []
    for number, line in block:
        found = _TURN.match(line)
        if found:
            turns.append((number, _ROLES[found[1]], [found[2]]))
        elif turns:
            turns[-1][2].append(line)
        else:
            raise UserError(
                f"{name}:{number}: a dialogue begins with `Human: `, not with {line.strip()[:40]!r}"
            )
    for index, (number, role, lines) in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise UserError(f"{name}:{number}: `{_TAGS[expected]}: ` is expected here; the turns alternate")
        if not _joined(lines):
            raise UserError(f"{name}:{number}: an empty turn; write what is said, or remove it")
    if turns[-1][1] != "assistant":
        raise UserError(
            f"{name}:{turns[-1][0]}: the dialogue ends without an answer; add an `Assistant: ` turn"
        )
    return tuple(Message(role, _joined(lines)) for _, role, lines in turns)


def _joined(lines: Any) -> str:
    return "\n".join(line.rstrip() for line in lines).strip()


def window_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can read, None where it does not say."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


class Context:
    """What stands before everything that a model reads (C of Askell 2021); make one by :meth:`read`.

    Attributes:
        name: of the file, without folder and ending; ``none`` for no prompt.
        sha256: content hash of the prompt's text.
        prefix_ids: token ids of the prompt, up to the end of its last dialogue. Without a prompt what the
            tokenizer puts before every text, as a BOS; often nothing.
        opening_ids: what opens a new user turn behind the prompt; nothing without a prompt.
    """

    def __init__(self, dialogue: Dialogue, name: str, text: str, prompt: PromptText | None) -> None:
        self._dialogue = dialogue
        self._turns = prompt.turns if prompt else ()
        self._chat = dialogue.template == "chat"
        self.name = name
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        lead = special_start(dialogue.tokenizer)
        self.opening_ids: list[int] = []
        if not prompt:
            self.prefix_ids = lead
        elif self._chat:
            self.prefix_ids = self._dialogue.encode_rendered(self._render(self._turns, reply=False))
            opened = self._behind((Message("user", PROBE),), reply=False)
            self.opening_ids = self._dialogue.encode_rendered(opened[: opened.index(PROBE)])
        else:
            whole = text.strip()
            if not _SEPARATES.fullmatch(whole.split("\n")[-1]):
                whole = f"{whole}\n\n{SEPARATOR}"
            self.prefix_ids = [*lead, *self._dialogue.encode_text(f"{whole}\n\n")]
            self.opening_ids = self._dialogue.encode_text("Human:")

    @classmethod
    def none(cls, dialogue: Dialogue) -> Context:
        """No prompt: dialogues come out as :meth:`Dialogue.encode_prompt` has them (template ``chat``)."""
        return cls(dialogue, "none", "", None)

    @classmethod
    def read(cls, path: str | Path, dialogue: Dialogue, *, window: int | None = None) -> Context:
        """The prompt of a file.

        Args:
            path: the file, UTF-8.
            dialogue: tokenizer and template.
            window: tokens that the model can read, for a check.

        Raises:
            UserError: the file is missing, not UTF-8 or of another structure (file and line), longer than
                the window, or refused by the chat template.
        """
        file = Path(path).expanduser()
        text = read_text(file)
        context = cls(dialogue, file.stem, text, parse(text, str(file)))
        context.check_window(window)
        return context

    def check_window(self, window: int | None, more: int = 0) -> None:
        """Whether prompt and ``more`` tokens behind it fit in a model's window; None = no limit is known.

        Raises:
            UserError: they do not.
        """
        needed = len(self.prefix_ids) + more
        if window is not None and needed > window:
            behind = f" with the {more} tokens behind it" if more else ""
            raise UserError(
                f"hhh_prompt: the prompt {self.name!r} has {len(self.prefix_ids)} tokens, {needed}{behind}, "
                f"and the model reads {window}; use a shorter prompt or text, or a model with a longer window"
            )

    def after_dialogue(self, messages: Sequence[Message], *, reply: bool) -> list[int]:
        """Token ids of turns behind :attr:`prefix_ids`.

        Args:
            messages: the turns, in order.
            reply: open the assistant's turn, so that :meth:`answer` can follow.

        Raises:
            UserError: the chat template refuses the turns, or rewrites the prompt because of them.
        """
        if self._chat:
            ids = self._dialogue.encode_rendered(self._behind(messages, reply=reply))
            bare = not self._turns and ids[: len(self.prefix_ids)] == self.prefix_ids
            return ids[len(self.prefix_ids) :] if bare else ids
        parts = [f"{_TAGS[m.role]}: {m.content}" if m.role in _TAGS else m.content for m in messages]
        return self._dialogue.encode_text("\n\n".join([*parts, "Assistant:"] if reply else parts))

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer behind ``after_dialogue(..., reply=True)``, not closed."""
        if self._chat:
            return self._dialogue.encode_answer(text)
        return self._dialogue.encode_text(f" {text.strip()}")

    def _behind(self, messages: Sequence[Message], *, reply: bool) -> str:
        """The text that turns add to that of the prompt."""
        before = self._render(self._turns, reply=False) if self._turns else ""
        whole = self._render((*self._turns, *messages), reply=reply)
        if not whole.startswith(before):
            raise UserError(
                f"hhh_prompt: the chat template of {self._dialogue.tokenizer.name_or_path} writes earlier "
                "turns differently when others follow, so no prompt can stand before them; "
                "set dialogue.template=plain"
            )
        return whole[len(before) :]

    def _render(self, turns: Sequence[Message], *, reply: bool) -> str:
        try:
            return self._dialogue.render(turns, reply=reply)
        except RefusedTurnsError as error:
            what = "the prompt" if self._turns else "the turns"
            raise UserError(
                f"hhh_prompt: the chat template of {self._dialogue.tokenizer.name_or_path} refuses {what} "
                f"({error.reason}); set dialogue.template=plain"
            ) from None
