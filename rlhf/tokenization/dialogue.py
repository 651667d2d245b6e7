"""Messages to token ids and back: the one template, EOS and truncation contract of every stage.

A sequence is ``prompt + response + end of turn``. The end of a turn is the token that the chat template puts
behind an answer, and EOS where it puts none. The reward is read on that token, in training and in PPO alike:
a response that was cut at the length limit is closed with it for scoring too (the appended end-of-context
token of Askell 2021, app. C.4), so that the reward model never meets a format that it was not trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf.data.comparisons import Message
from rlhf.errors import UserError, first_line
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Model
from rlhf.tokenization.special_tokens import SpelledTokens, added_tokens, id_of, pad_id, special_ends
from rlhf.tokenization.template import (
    Behind,
    Frame,
    RefusedTurnsError,
    check_arguments,
    frame_of,
    has_dummy_prefix,
    render,
)


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the recipe allows."""


class Dialogue:
    """A tokenizer with the recipe's contract.

    Args:
        tokenizer: any Hugging Face tokenizer with an EOS token.
        template: ``chat`` or ``plain``.
        max_prompt_tokens: longest prompt.
        max_response_tokens: longest response, without what closes it.
        truncate_prompts: cut a longer prompt at its beginning; otherwise it is an error.
        pad_token: None picks one that does not end a turn.
        end_of_turn: token that ends a turn; None = the one behind an answer in the chat template, else EOS.
        end_of_context: token that closes what the reward reads, behind the end of the turn; None = none.
        template_arguments: what the chat template reads besides the messages.
        also_end: ids that end a sampled response besides the end of the turn and EOS.

    Raises:
        UserError: the tokenizer has no EOS, no chat template (for ``chat``), no token to pad with, or not
            a token that the recipe names.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        max_prompt_tokens: int,
        max_response_tokens: int,
        truncate_prompts: bool = False,
        pad_token: str | None = None,
        end_of_turn: str | None = None,
        end_of_context: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        also_end: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.truncate_prompts = truncate_prompts
        self.template_arguments = dict(template_arguments or {}) if template == "chat" else {}
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path: the tokenizer of {name} has no EOS token, so no response can end; "
                "use a model whose tokenizer has one"
            )
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                f"model.path: the tokenizer of {name} has no chat template; "
                "set dialogue.template=plain, or use an instruct model"
            )
        frame = frame_of(tokenizer, self.template_arguments) if template == "chat" else Frame("\n", "", None)
        self.eos_id = int(tokenizer.eos_token_id)
        self.end_id = self.eos_id
        if end_of_turn is not None:
            self.end_id = id_of(tokenizer, end_of_turn, "dialogue.end_of_turn")
        elif frame.end is not None:
            self.end_id = id_of(tokenizer, frame.end, "model.path")
        self.also_end = {self.eos_id, *also_end}
        self.pad_id = pad_id(tokenizer, pad_token, self.end_id)
        tokenizer.pad_token_id = self.pad_id
        self.end_of_context_id = self._end_of_context(end_of_context)
        self._start, self._appended = special_ends(tokenizer)
        added = added_tokens(tokenizer)
        markers = {str(tokenizer.convert_ids_to_tokens(i)) for i in (*self.end_ids, self.pad_id)} & set(added)
        markers |= {token for token in added if template == "chat" and token in str(tokenizer.chat_template)}
        self.spelled = SpelledTokens(tokenizer, {t for t in added if added[t]} | markers)
        self._behind = Behind(tokenizer, self.spelled, frame) if has_dummy_prefix(tokenizer) else None

    def _end_of_context(self, wanted: str | None) -> int | None:
        if wanted is None:
            return None
        number = id_of(self.tokenizer, wanted, "dialogue.end_of_context")
        if number in (self.pad_id, *self.end_ids):
            raise UserError(
                f"dialogue.end_of_context: {wanted!r} is the padding or the EOS token; name another token, "
                "or leave it out"
            )
        return number

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All that ends a sampled response; the first is the token that ends a turn."""
        return self.end_id, *sorted(self.also_end - {self.end_id})

    @property
    def end_token(self) -> str | None:
        """The token that ends a turn as text, None where it is EOS."""
        return None if self.end_id == self.eos_id else str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready to be continued by a response.

        Raises:
            PromptTooLongError: more than ``max_prompt_tokens`` and not to be truncated.
            RefusedTurnsError: the chat template refuses the turns, as some do a system turn.
        """
        if self.template == "chat":
            ids = self.encode_rendered(self.render(messages, reply=True))
        else:  # what the tokenizer puts behind a text, as an EOS, would end it
            ids = [*self._start, *self.encode_text("\n\n".join(m.content for m in messages))]
        if len(ids) > self.max_prompt_tokens:
            if not self.truncate_prompts:
                raise PromptTooLongError(
                    f"the prompt has {len(ids)} tokens, dialogue.max_prompt_tokens is "
                    f"{self.max_prompt_tokens}"
                )
            ids = ids[-self.max_prompt_tokens :]
        return ids

    def render(self, messages: Sequence[Message], *, reply: bool) -> str:
        """The chat template's text of turns, for :meth:`encode_rendered`; ``reply`` opens an answer.

        Raises:
            RefusedTurnsError: the chat template refuses them.
        """
        turns = [Message(m.role, self.spelled.hide(m.content)) for m in messages]
        return render(self.tokenizer, turns, reply=reply, arguments=self.template_arguments)

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """Why the chat template refuses a prompt, or None."""
        if self.template != "chat":
            return None
        try:
            self.render(messages, reply=True)
        except RefusedTurnsError as error:
            return f"the chat template of {self.tokenizer.name_or_path} refuses the turns ({error.reason})"
        return None

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response without what ends it, cut at ``max_response_tokens``."""
        return self.encode_answer(text)[: self.max_response_tokens]

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of a response of any length, as they stand behind a prompt."""
        return self._behind.encode(text) if self._behind else self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added; those that it spells out are read as text."""
        return self.spelled.encode(self.spelled.hide(text))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a template's text, whose markers are tokens."""
        return self.spelled.encode(text)

    @property
    def closing(self) -> list[int]:
        """What ends every sequence that the reward model reads: the end of the turn, and its own token."""
        return [self.end_id] if self.end_of_context_id is None else [self.end_id, self.end_of_context_id]

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """The ids of a response up to what ended it."""
        return list(itertools.takewhile(lambda i: i not in self.end_ids, ids))

    def close(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """The sequence that the reward model reads: prompt, response, exactly one closing."""
        return [*prompt_ids, *self.until_end(response_ids), *self.closing]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids up to what ends them, special tokens left out."""
        ids = self.until_end(ids)
        return self._behind.decode(ids) if self._behind else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Hash of vocabulary, template, end of turn and padding: equal means equal ids for equal text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = (
            _bare(backend) if backend is not None else str(sorted(self.tokenizer.get_vocab().items()))
        )
        template = self.tokenizer.chat_template if self.template == "chat" else "plain"
        parts = [vocabulary, str(template), *map(str, self.closing), str(self.pad_id)]
        # what follows was not there, or was read otherwise, when the first models were saved
        if self.template_arguments:
            parts.append(json.dumps(self.template_arguments, sort_keys=True))
        if self._behind:
            parts.append("responses behind their prompts")
        if self._appended and self.template == "plain":
            parts.append("nothing behind prompts")
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def _bare(backend: Any) -> str:
    """A tokenizer as text, without the padding and truncation that its last call has left in it."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        UserError: there is none at that place.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise UserError(
            f"model.path: no tokenizer at {path} ({reason}); run `make model RECIPE=...` or check the path"
        ) from None


def load_dialogue(recipe: Recipe, max_response_tokens: int | None = None) -> Dialogue:
    """The recipe's tokenizer with the recipe's contract; a stage may read responses up to a length of its
    own, which the fingerprint does not know."""
    if recipe.model.source != "hub" and not Path(recipe.model.path).is_dir():  # do not ask the hub for it
        raise UserError(f"model.path: {recipe.model.path} is not there; run `make model RECIPE=...` first")
    tokenizer = load_tokenizer(
        recipe.model.path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if recipe.dialogue.template_arguments and recipe.dialogue.template == "chat":
        check_arguments(tokenizer, recipe.dialogue.template_arguments)
    dialogue = dialogue_of(recipe, tokenizer, also_end=generation_ends(recipe.model))
    dialogue.max_response_tokens = max_response_tokens or dialogue.max_response_tokens
    return dialogue


def generation_ends(model: Model) -> list[int]:
    """What the authors of a model let a response end with, from ``generation_config.json``; often nothing."""
    try:
        config: Any = GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    except (OSError, ValueError):  # there is none
        return []
    ends = config.eos_token_id
    return [int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None]


def dialogue_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, also_end: Iterable[int] = ()
) -> Dialogue:
    """The recipe's template and lengths with a tokenizer that is loaded already."""
    section = recipe.dialogue
    return Dialogue(
        tokenizer,
        template=section.template,
        max_prompt_tokens=section.max_prompt_tokens,
        max_response_tokens=section.max_response_tokens,
        truncate_prompts=section.on_long_prompts == "truncate",
        pad_token=section.pad_token,
        end_of_turn=section.end_of_turn,
        end_of_context=section.end_of_context,
        template_arguments=section.template_arguments,
        also_end=also_end,
    )
