"""The kinds of values that fields of a recipe have; the judges and rewards that several sections name."""

from __future__ import annotations

import functools
import os
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

Positive = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
LessThanHalf = Annotated[float, Field(ge=0, lt=0.5)]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]
OneOrMany = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Files = Annotated[list[str], OneOrMany]
Policies = Annotated[list[Folder], OneOrMany, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)


STARTS: dict[str, tuple[str, ...]] = {
    "distill": ("sft",),
    "pmp": ("sft", "distill"),
    "reward": ("sft", "distill"),
    "ppo": ("sft", "distill"),
    "dpo": ("sft", "distill"),
}
"""The stages of the same run that the `start` of a section may name instead of a folder."""

FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
"""A function of a file of the user's own."""
BASE = "base"
"""The base model without an adapter, where a policy is named."""
OWN_REWARD = "reward"
"""The value of a model that stands for what this run's reward stage makes."""


class Endpoint(Section):
    """A judge over HTTP: a server with OpenAI's chat completions, such as vLLM, llama.cpp or Ollama."""

    url: str
    """Where the interface begins, as in http://127.0.0.1:8000/v1; `/chat/completions` is put behind it."""
    model: str
    """Name of the model, as the server knows it."""
    prompt: str = (
        "Rate the response to the prompt from 0 (useless) to 10 (excellent).\n\n[prompt]\n{prompt}\n\n"
        "[response]\n{response}\n\nAnswer with the number alone."
    )
    """What the judge is asked; {prompt} and {response} stand for the texts."""
    pattern: str | None = None
    """Regular expression with one group, the number, such as 'Grade: (\\d+)'; its last match in the answer
    counts. null = the whole answer is the number, dressed up as `Score: 7/10` at most."""
    lowest: float = 0.0
    """Smallest number that is an answer."""
    highest: float = 10.0
    """Largest number that is an answer."""
    on_prose: Literal["stop", "ignore"] = "stop"
    """An answer that is no number in this range, in all tries, is an error, or no score for this response."""
    tries: Positive = 3
    """How often a question is asked before a server counts as down, or its answer as prose."""
    timeout_seconds: Rate = 60.0
    """How long one answer may take."""
    concurrency: Positive = 8
    """Questions at once."""
    temperature: NonNegative = 0.0
    """Of the judge's sampling."""
    max_tokens: Positive = 16
    """Longest answer, in tokens; a model that reasons first needs more."""
    key_variable: str | None = None
    """Name of the environment variable with the server's key; null = none is sent."""
    remote: bool = False
    """The server may be on another machine, which then reads prompts and responses."""
    cache: str | None = "runs/judge_cache"
    """Folder where answers are kept, for all runs; null = every question is asked."""

    @model_validator(mode="after")
    def _asks(self) -> Endpoint:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {self.url} is none of http: give one as in http://127.0.0.1:8000/v1")
        if parts.hostname not in ("localhost", "127.0.0.1", "::1") and not self.remote:
            raise ValueError(
                f"url {self.url} is on another machine, which would read all prompts and responses: set "
                "remote: true if it may"
            )
        if "{response}" not in self.prompt:
            raise ValueError("prompt does not hold {response}, so every response would get one score")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is no regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"pattern has {groups} groups; put the number in the only one, as in (\\d+)")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} is not below highest {self.highest:g}")
        return self


def _judge(value: object, names: tuple[str, ...]) -> object:
    """A judge as a recipe names it, checked, with messages of one line."""
    if isinstance(value, dict):
        try:
            return Endpoint.model_validate(value)
        except ValidationError as error:
            fault = error.errors()[0]
            where = "".join(f"{part}: " for part in fault["loc"])
            raise ValueError(f"{where}{fault['msg'].removeprefix('Value error, ')}") from None
    if isinstance(value, str) and value not in names and not FUNCTION.fullmatch(value):
        raise ValueError(
            f"name {', '.join(names)}, a function as FILE.py:NAME, or a server as {{url: ..., model: ...}}"
        )
    return value


Judged = Annotated[str | Endpoint, BeforeValidator(functools.partial(_judge, names=("vader",)))]
"""Who scores texts: a gold judge by name, a function FILE.py:NAME, or a server."""
JudgedOrReward = Annotated[
    str | Endpoint, BeforeValidator(functools.partial(_judge, names=("vader", OWN_REWARD)))
]
"""The same, or a reward model."""


def function_files(*judges: str | Endpoint | None) -> list[str]:
    """Files of the judges that are functions, each once."""
    found = (FUNCTION.fullmatch(judge) for judge in judges if isinstance(judge, str))
    return list(dict.fromkeys(match["file"] for match in found if match))


class RewardPart(Section):
    """One of several rewards, which PPO adds up: a model, a function or a judge."""

    model: Folder | None = None
    """Reward model: a folder of ours, `reward` (all members of this run's reward stage, combined as
    `ensemble` says), or folder or hub id of any sequence classifier with one label."""
    function: str | None = None
    """FILE.py:NAME, a function of prompts, completions and columns, as trl's `reward_funcs` are. The file is
    run as your own code."""
    judge: Judged | None = None
    """`vader`, or a server {url, model, prompt, ...}."""
    name: str = ""
    """What the log calls it, `reward/<name>`; empty = the function's name, the judge's or the model's."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What it is multiplied with before all are added up; 0 = only logged."""
    normalize: bool = False
    """Less the mean of all of its scores so far, divided by their standard deviation, before the weight."""

    @model_validator(mode="after")
    def _one(self) -> RewardPart:
        kinds = (self.model, self.function, self.judge)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("a reward is one of model, function and judge")
        if self.function is not None and not FUNCTION.fullmatch(self.function):
            raise ValueError(f"function: {self.function} is not of the form FILE.py:NAME")
        if not re.fullmatch(r"[\w.-]+", self.label):
            raise ValueError(
                f"name: {self.label!r} is no name for a log: use letters, digits, dots and dashes"
            )
        return self

    @property
    def label(self) -> str:
        """Its name in the log."""
        if self.name:
            return self.name
        if self.model is not None:
            parts = self.model.rstrip("/").split("/")
            return parts[-3] if parts[-2:] == ["reward", "model"] and len(parts) > 2 else parts[-1]
        judge = self.function or self.judge
        if isinstance(judge, Endpoint):
            return judge.model.rpartition("/")[2]
        return str(judge).rpartition(":")[2]

    @property
    def scored_by(self) -> str | Endpoint | None:
        """The function or the judge; None for a model."""
        return self.function or self.judge
