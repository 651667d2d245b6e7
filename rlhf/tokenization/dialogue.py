"""Messages to token ids and back: the one template, EOS and truncation contract of every stage.

A sequence is ``prompt + response + EOS``. The reward is read on that EOS, in training and in PPO alike: a
response that was cut at the length limit is closed with EOS for scoring too (the appended end-of-context
token of Askell 2021, app. C.4), so that the reward model never meets a format that it was not trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the recipe allows."""


class Dialogue:
    """A tokenizer with the recipe's contract.

    Args:
        tokenizer: any Hugging Face tokenizer with an EOS token.
        template: ``chat`` or ``plain``.
        max_prompt_tokens: longest prompt.
        max_response_tokens: longest response, without the closing EOS.
        truncate_prompts: cut a longer prompt at its beginning; otherwise it is an error.
        pad_token: None picks one that is not EOS.
        end_of_context: token that closes what the reward reads, behind EOS; None = EOS alone does.

    Raises:
        UserError: the tokenizer has no EOS, no chat template (for ``chat``), no token to pad with, or not
            the end-of-context token.
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
        end_of_context: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.truncate_prompts = truncate_prompts
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
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = _pad_id(tokenizer, pad_token)
        tokenizer.pad_token_id = self.pad_id
        self.end_of_context_id = _end_of_context_id(tokenizer, end_of_context, self.pad_id)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready to be continued by a response.

        Raises:
            PromptTooLongError: more than ``max_prompt_tokens`` and not to be truncated.
            UserError: the chat template refuses the turns, as some do a system turn.
        """
        if self.template == "chat":
            turns = [{"role": m.role, "content": m.content} for m in messages]
            try:
                ids = self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except TemplateError as error:
                raise UserError(
                    f"model.path: the chat template of {self.tokenizer.name_or_path} refuses a prompt "
                    f"({error}; its roles are {', '.join(m.role for m in messages)}); "
                    "set dialogue.template=plain, or change the prompts"
                ) from None
        else:
            ids = self.tokenizer("\n\n".join(m.content for m in messages))["input_ids"]
        ids = [int(i) for i in ids]  # type: ignore[arg-type]
        if len(ids) > self.max_prompt_tokens:
            if not self.truncate_prompts:
                raise PromptTooLongError(
                    f"the prompt has {len(ids)} tokens, dialogue.max_prompt_tokens is "
                    f"{self.max_prompt_tokens}"
                )
            ids = ids[-self.max_prompt_tokens :]
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response without the closing EOS, cut at ``max_response_tokens``."""
        return self.encode_text(text)[: self.max_response_tokens]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @property
    def closing(self) -> list[int]:
        """What ends every sequence that the reward model reads: EOS, and its own token where there is one."""
        return [self.eos_id] if self.end_of_context_id is None else [self.eos_id, self.end_of_context_id]

    def close(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """The sequence that the reward model reads: prompt, response, exactly one closing."""
        response = list(response_ids)
        if self.eos_id in response:
            response = response[: response.index(self.eos_id)]
        return [*prompt_ids, *response, *self.closing]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids up to EOS, special tokens left out."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Hash of vocabulary, merges, template, EOS and padding: equal means equal ids for equal text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = (
            _bare(backend) if backend is not None else str(sorted(self.tokenizer.get_vocab().items()))
        )
        template = self.tokenizer.chat_template if self.template == "chat" else "plain"
        parts = [vocabulary, str(template), *map(str, self.closing), str(self.pad_id)]
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def _bare(backend: Any) -> str:
    """A tokenizer as text, without the padding and truncation that its last call has left in it."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())


def _pad_id(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> int:
    """A padding id that is not EOS: the named token, the tokenizer's own, or another special token.

    Hugging Face's sequence classifier reads the score at the last token that is not padding, so a padding
    token that equals EOS would hide the real EOS.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            raise UserError(f"dialogue.pad_token: {wanted!r} is not in the tokenizer; name a token that is")
        if vocabulary[wanted] == tokenizer.eos_token_id:
            raise UserError(f"dialogue.pad_token: {wanted!r} is the EOS token; name another special token")
        return vocabulary[wanted]
    own = tokenizer.pad_token_id
    if own is not None and own != tokenizer.eos_token_id:
        return int(own)
    used = {tokenizer.eos_token, tokenizer.bos_token}
    specials = [*tokenizer.all_special_tokens, tokenizer.unk_token]
    for token in specials:
        if token is not None and token not in used:
            return vocabulary[token]
    raise UserError(
        f"model.path: the tokenizer of {tokenizer.name_or_path} has no special token besides EOS and BOS to "
        "pad with; name a token that never occurs in your text with dialogue.pad_token=..."
    )


def _end_of_context_id(tokenizer: PreTrainedTokenizerBase, wanted: str | None, pad_id: int) -> int | None:
    if wanted is None:
        return None
    number = tokenizer.get_vocab().get(wanted)
    if number is None or number in (pad_id, tokenizer.eos_token_id):
        what = "not in the tokenizer" if number is None else "the padding or the EOS token"
        raise UserError(f"dialogue.end_of_context: {wanted!r} is {what}; name another token, or leave it out")
    return int(number)


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        UserError: there is none at that place.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path: no tokenizer at {path} ({reason}); run `make model RECIPE=...` or check the path"
        ) from None


def load_dialogue(recipe: Recipe) -> Dialogue:
    """The recipe's tokenizer with the recipe's contract."""
    if recipe.model.source != "hub" and not Path(recipe.model.path).is_dir():  # do not ask the hub for it
        raise UserError(f"model.path: {recipe.model.path} is not there; run `make model RECIPE=...` first")
    tokenizer = load_tokenizer(
        recipe.model.path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return dialogue_of(recipe, tokenizer)


def dialogue_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dialogue:
    """The recipe's template and lengths with a tokenizer that is loaded already."""
    section = recipe.dialogue
    return Dialogue(
        tokenizer,
        template=section.template,
        max_prompt_tokens=section.max_prompt_tokens,
        max_response_tokens=section.max_response_tokens,
        truncate_prompts=section.on_long_prompts == "truncate",
        pad_token=section.pad_token,
        end_of_context=section.end_of_context,
    )
