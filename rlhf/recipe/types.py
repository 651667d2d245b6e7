"""The kinds of values that fields of a recipe have."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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
