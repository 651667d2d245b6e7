"""What a chat template does: how it renders turns, how it ends them, and what stands before an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError, meta

from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.shared import Dialogue
from rlhf.tokenization.special_tokens import SpelledTokens, added_tokens, id_of, ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "qQq"  # stands for a turn's content while a template is looked at
_OURS = {"messages", "add_generation_prompt", "continue_final_message", "tokenize", "tools", "documents"}
_OURS |= {"conversation", "chat_template", "return_dict", "return_tensors", "padding", "truncation"}
_ASKED = (Message("user", PROBE.lower()),)
_ANSWERED = (*_ASKED, Message("assistant", PROBE))


class RefusedTurnsError(UserError):
    """A chat template refuses turns, as some do a system turn; ``reason`` is the template's own word."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Frame(NamedTuple):
    """What stands around an answer."""

    before: str
    """The last text before an answer in a prompt that is to be answered."""
    gap: str
    """White space that the template puts between the two."""
    end: str | None
    """The token that ends an answer, None where the template has none."""


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], *, reply: bool, arguments: Mapping[str, Any]
) -> str:
    """The text of turns; ``reply`` opens the assistant's turn.

    Raises:
        RefusedTurnsError: the template refuses them.
    """
    messages = [{"role": m.role, "content": m.content} for m in turns]
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=reply, tokenize=False, **arguments
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RefusedTurnsError(
            f"model.path: the chat template of {tokenizer.name_or_path} refuses a prompt "
            f"({reason}; its roles are {', '.join(m.role for m in turns)}); "
            "set dialogue.template=plain, or change the prompts",
            reason,
        ) from None
    return str(text)


def frame_of(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Frame:
    """Look at a template by a probe: a question, answered and to be answered."""
    try:
        asked = render(tokenizer, _ASKED, reply=True, arguments=arguments)
        answered = render(tokenizer, _ANSWERED, reply=False, arguments=arguments)
    except RefusedTurnsError:
        return Frame("\n", "", None)
    tokens = sorted(added_tokens(tokenizer), key=len, reverse=True)
    before, found, tail = answered.rpartition(PROBE)
    behind = tail.lstrip()
    end = next((token for token in tokens if token and behind.startswith(token)), None) if found else None
    if end == tokenizer.bos_token != tokenizer.eos_token:
        end = None
    gap = before.removeprefix(asked) if before.startswith(asked) else ""
    last = max((place for token in tokens if (place := asked.rfind(token)) > 0), default=0)
    return Frame(asked[last:], gap if gap.isspace() else "", end)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, section: Dialogue, *, named: bool) -> int | None:
    """The id of the token that ends a turn, as the recipe has it where its tokens are the tokenizer's
    (``named``), or else the tokenizer's chat template; None where there is none.

    Raises:
        UserError: the recipe's token is not in the tokenizer.
    """
    if named and section.end_of_turn:
        return id_of(tokenizer, section.end_of_turn, "dialogue.end_of_turn")
    end = frame_of(tokenizer, section.template_arguments).end if tokenizer.chat_template else None
    return None if end is None else id_of(tokenizer, end, "model.path")


def check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Template arguments must be the template's own.

    Raises:
        UserError: the template reads no such name.
    """
    key, template = "dialogue.template_arguments", tokenizer.chat_template
    try:
        names = meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(str(template))
        )
    except TemplateError:
        names = set(arguments)  # of a dialect of its own
    reads = sorted(names - _OURS - {"raise_exception", "strftime_now", "namespace", "range"})
    for name in arguments:
        if name in _OURS or name not in names:
            what = f"it reads {', '.join(reads)}" if reads else "it reads none"
            raise UserError(
                f"{key}: the chat template of {tokenizer.name_or_path} takes no argument {name!r} ({what})"
            )


class Behind:
    """Answers of a tokenizer that puts a space before every text: as they stand behind a prompt, without it.

    Args:
        tokenizer: it puts a dummy prefix (SentencePiece) before what it reads.
        spelled: for tokens that a text spells.
        frame: what stands before an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelled: SpelledTokens, frame: Frame) -> None:
        self._tokenizer, self._spelled, self._frame = tokenizer, spelled, frame
        self._before = ids_of(tokenizer, frame.before)

    def encode(self, text: str) -> list[int]:
        """Token ids of an answer behind the text before it."""
        whole = self._spelled.encode(self._frame.before + self._frame.gap + self._spelled.hide(text))
        number = len(self._before)
        return whole[number:] if whole[:number] == self._before else self._spelled.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, the other way round."""
        before, whole = (
            str(self._tokenizer.decode(some, skip_special_tokens=True))
            for some in (self._before, [*self._before, *ids])
        )
        if not whole.startswith(before):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return whole[len(before) :].removeprefix(self._frame.gap)


def has_dummy_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text is read otherwise alone than behind a line."""
    before, alone = ids_of(tokenizer, "\n"), ids_of(tokenizer, PROBE)
    whole = ids_of(tokenizer, f"\n{PROBE}")
    return whole[: len(before)] == before and whole[len(before) :] != alone
