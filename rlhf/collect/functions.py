"""Reward functions of the user's own: loaded from a file, called as trl calls its ``reward_funcs``.

A function gets ``prompts``, ``completions``, ``completion_ids`` and the columns of the prompts by name, and
returns a number a completion, or None where it does not apply. With ``template: chat`` prompts and
completions are lists of messages, with ``plain`` they are texts, as in trl by the form of the data set. The
file is the user's own code: who names it in a recipe asks for it to be run, with all rights of this process.

No torch here, so that a mistake is told before anything is loaded.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rlhf.data.comparisons import Prompt, prompt_key
from rlhf.errors import UserError, first_line
from rlhf.recipe.types import FUNCTION

Columns = Mapping[str, Mapping[str, Any]]
"""What the rows of the prompts hold besides, by :func:`rlhf.data.comparisons.prompt_key`."""
_ALWAYS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # that every call gives
_IDS = "completion_ids"


class RewardFunction:
    """A function of a file as a judge of responses (:data:`rlhf.collect.judges.Judge`).

    Args:
        spec: FILE.py:NAME.
        key: the recipe's key that names it, for messages.
        chat: whether it gets messages, not texts.
        names: columns that it can ask for.
        columns: their values; None where it is only looked at.
        has_ids: whether the calls give token ids.
        may_pass: whether None is an answer, which becomes NaN.

    Raises:
        UserError: the file cannot be read or run, has no such function, or the function needs an argument
            that nothing gives.
    """

    def __init__(
        self,
        spec: str,
        key: str,
        *,
        chat: bool,
        names: Sequence[str] = (),
        columns: Columns | None = None,
        has_ids: bool = False,
        may_pass: bool = False,
    ) -> None:
        self.spec, self.key, self.chat, self.names = spec, key, chat, tuple(names)
        self.columns, self.may_pass = columns or {}, may_pass
        self.trainer_state = SimpleNamespace(global_step=0, max_steps=0)
        self.metrics: dict[str, list[float]] = {}
        """What the function gave to ``log_metric`` since somebody emptied it, by name."""
        self.file, self._function = _loaded(spec, key)
        self._given = self._arguments((*_ALWAYS, *self.names, *([_IDS] if has_ids else [])))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """One number a response; NaN where the function does not apply.

        The function gets copies, so nothing that it does to its arguments reaches the caller.

        Raises:
            UserError: the function raised, or returned anything but one finite number (or None) a response.
        """
        values: dict[str, Any] = {
            "prompts": [self._messages(prompt) for prompt in prompts],
            "completions": [self._completion(text) for text in responses],
            "trainer_state": self.trainer_state,
            "log_extra": lambda *_args, **_options: None,
            "log_metric": lambda name, value: self.metrics.setdefault(name, []).append(float(value)),
            _IDS: None if completion_ids is None else [list(ids) for ids in completion_ids],
        }
        for name in self.names:
            values[name] = [self._column(prompt, name) for prompt in prompts]
        try:
            found = self._function(**{name: values[name] for name in self._given})
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error, 200)}{_place(error, self.file)}"
            raise UserError(
                f"{self.key}: {self.spec} failed on {len(responses)} responses ({reason}); correct it and "
                "run again"
            ) from error
        return self._checked(found, len(responses))

    def _arguments(self, known: Sequence[str]) -> list[str]:
        """Those of the known arguments that the function takes.

        Raises:
            UserError: it needs another one.
        """
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.key}: {self.spec} cannot be called ({error}); name a function") from None
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for p in parameters:
            unnamed = p.kind is p.POSITIONAL_ONLY
            if unnamed or (p in by_name and p.default is p.empty and p.name not in known):
                columns = ", ".join(self.names) or "none"
                remedy = (
                    f"no column gives it (data.prompt_columns: {columns}); add the column there, or give the "
                    "argument a default"
                )
                if unnamed:
                    remedy = "arguments are given by name; remove the / from its definition"
                elif p.name == _IDS:
                    remedy = "only rewards of PPO are given token ids"
                raise UserError(f"{self.key}: {self.spec} needs an argument {p.name!r}: {remedy}")
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return [name for name in known if takes_all or name in {p.name for p in by_name}]

    def _messages(self, prompt: Prompt) -> str | list[dict[str, str]]:
        if self.chat:
            return [{"role": message.role, "content": message.content} for message in prompt]
        return "\n\n".join(message.content for message in prompt)

    def _completion(self, text: str) -> str | list[dict[str, str]]:
        return [{"role": "assistant", "content": text}] if self.chat else text

    def _column(self, prompt: Prompt, name: str) -> Any:
        row = self.columns.get(prompt_key(prompt))
        if row is None:
            raise UserError(
                f"{self.key}: {self.spec} takes the column {name}, and a prompt is of no row that has any "
                f"({' '.join(prompt[-1].content.split())[:60]!r}...): give data.prompts and "
                "data.held_out_prompts"
            )
        return row.get(name)

    def _checked(self, found: object, expected: int) -> list[float]:
        """What the function returned as floats."""
        fault = f"{self.key}: {self.spec} returned "
        if hasattr(found, "tolist"):  # an array or a tensor
            found = found.tolist()
        if not isinstance(found, list | tuple):
            raise UserError(
                f"{fault}a {type(found).__name__}, not a list with a number a response; correct it"
            )
        if len(found) != expected:
            raise UserError(f"{fault}{len(found)} numbers for {expected} responses; correct it")
        scores = []
        for row, value in enumerate(found):
            number = _number(value)
            if number is None or not math.isfinite(number):
                if value is not None or not self.may_pass:
                    what = "None, and a judge must score every response" if value is None else f"{value!r}"
                    raise UserError(f"{fault}{what} for response {row + 1} of {expected}; correct it")
                number = math.nan
            scores.append(number)
        return scores


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None


def _loaded(spec: str, key: str) -> tuple[str, Callable[..., Any]]:
    """The file and its function."""
    match = FUNCTION.fullmatch(spec)
    if match is None:
        raise UserError(f"{key}: {spec} is not of the form FILE.py:NAME")
    file = Path(match["file"]).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{key}: {match['file']} is not there; check the path")
    try:
        module = _module(file, file.read_bytes())
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    function = getattr(module, match["name"], None)
    if not callable(function):
        own = [
            n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        has = f"it has {', '.join(own)}" if own else "it has none"
        what = "is no function" if hasattr(module, match["name"]) else "is no function of the file"
        raise UserError(f"{key}: {match['name']} {what} {match['file']}; {has}")
    return match["file"], function


@functools.cache
def _module(file: Path, source: bytes) -> ModuleType:
    """A file as a module, run once as long as it is the same; modules beside it can be imported by it."""
    module = ModuleType(f"{file.stem}_{hashlib.sha256(source).hexdigest()[:8]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses look for themselves
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end, so that it hides nothing
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error, 200)}{_place(error, str(file))}"
        raise UserError(f"{file} cannot be run ({reason}); correct it") from None
    return module


def _place(error: BaseException, file: str) -> str:
    """Where in the user's file an error came from, as `, line 7`."""
    name = Path(file).name
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == name]
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""
