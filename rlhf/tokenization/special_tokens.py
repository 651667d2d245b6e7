"""Special tokens: which there are, which stand before a text, which pads, and those that a text spells out.

A text that holds the letters ``<|end|>`` does not end a turn: its special tokens are read as text. The
markers of a chat template are tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACE = "\ue000{}\ue001"  # stands for a spelled token while a template is rendered; letters of private use
_PLACED = re.compile(_PLACE.format("([0-9]+)"))


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Token ids of a text, nothing put before or behind it."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False, **options)["input_ids"]]


def special_start(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text: [BOS], or nothing."""
    return special_ends(tokenizer)[0]


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before every text, and those behind it."""
    whole, bare = [int(i) for i in tokenizer("a")["input_ids"]], ids_of(tokenizer, "a")
    for i in range(len(whole)):
        if whole[i : i + len(bare)] == bare:
            return whole[:i], whole[i + len(bare) :]
    return [], []


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The tokens that are cut out of a text before anything else, each with whether it is a special one."""
    found = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return found | dict.fromkeys(map(str, tokenizer.all_special_tokens), True)


class SpelledTokens:
    """Reads special tokens that stand in a text as text.

    Args:
        tokenizer: of the dialogue.
        names: the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._names = sorted((name for name in set(names) if len(name) > 1), key=lambda n: (-len(n), n))
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def find(self, text: str) -> str | None:
        """The first token that a text spells, or None."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def hide(self, text: str) -> str:
        """The text with placeholders for the tokens that it spells, ready for a template."""
        return self._pattern.sub(lambda found: _PLACE.format(self._names.index(found[0])), text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which tokens are tokens, and placeholders the letters of theirs."""
        first, *others = _PLACED.split(text)
        ids = ids_of(self._tokenizer, first) if first else []
        for number, between in zip(others[::2], others[1::2], strict=True):
            if int(number) < len(self._names):
                ids += [*self._letters(self._names[int(number)]), *self._behind(between)]
            else:  # a text that has such a place of its own
                ids += self._behind(_PLACE.format(number) + between)
        return ids

    def _letters(self, name: str) -> list[int]:
        found = self._behind(name, split_special_tokens=True)
        if self._tokenizer.convert_tokens_to_ids(name) not in found:
            return found
        return [*self._behind(name[:1]), *self._behind(name[1:])]  # it is no special one

    def _behind(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text behind a line break, so without what is put before every text."""
        before, whole = (ids_of(self._tokenizer, t, **options) for t in ("\n", f"\n{text}"))
        fits = whole[: len(before)] == before
        return whole[len(before) :] if fits else ids_of(self._tokenizer, text, **options)


def id_of(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> int:
    """The id of a token that the recipe names under ``key``.

    Raises:
        UserError: it is not in the tokenizer.
    """
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise UserError(f"{key}: {token!r} is not in the tokenizer; name another token, or leave it out")
    return int(number)


def pad_id(tokenizer: PreTrainedTokenizerBase, wanted: str | None, end_id: int) -> int:
    """A padding id that does not end a turn: the named token, the tokenizer's own, or another special token.

    Hugging Face's sequence classifier reads the score at the last token that is not padding, so a padding
    token that also ends a turn would hide the real end.

    Raises:
        UserError: there is none.
    """
    key, vocabulary = "dialogue.pad_token", tokenizer.get_vocab()
    if wanted is not None:
        number = id_of(tokenizer, wanted, key)
        if number == end_id:
            what = "is the EOS token" if end_id == tokenizer.eos_token_id else "ends a turn"
            raise UserError(f"{key}: {wanted!r} {what}; name another special token")
        return number
    own = tokenizer.pad_token_id
    if own is not None and own != end_id:
        return int(own)
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.convert_ids_to_tokens(end_id)}
    named = [*tokenizer.all_special_tokens, tokenizer.unk_token]
    added = added_tokens(tokenizer)
    markers = str(tokenizer.chat_template or "")
    for sign in ("pad", "reserved", "unused", ""):  # Llama 3 and GPT-NeoX list theirs nowhere else
        named += [t for t, special in added.items() if special and sign in t.lower() and t not in markers]
    for token in named:
        if token is not None and token not in used:
            return int(vocabulary[token])
    bytewise = "ByteLevel" in repr(getattr(tokenizer, "backend_tokenizer", ""))
    never = {"<0xFF>", "\xff"} if bytewise else {"<0xFF>"}  # a byte that UTF-8 does not have
    free = next(iter(sorted(never & vocabulary.keys())), "TOKEN")
    raise UserError(
        f"model.path: the tokenizer of {tokenizer.name_or_path} has no special token besides EOS and BOS to "
        f"pad with; name a token that never occurs in your text, for example {setting(key, free)}"
    )


def setting(key: str, value: str) -> str:
    """How a text is set on the command line so that it survives two shells and YAML."""
    if re.search(r"""[$`"'\\!\s]""", value):
        return f"{key}: {json.dumps(value)} in the recipe"
    plain = yaml.safe_load(value) == value if re.match(r"[^][{}&*!|>%@?:,-]", value) else False
    return f"SET=\"{key}='{value}'\"" if plain else f'SET="{key}=\\"\'{value}\'\\""'
