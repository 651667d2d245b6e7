"""A small recipe, and how it is refused, for the tests of recipes."""

import pytest

from rlhf.errors import UserError
from rlhf.recipe.load import load

TEXT = """name: x
model: {path: m}
data:
  comparisons: c.jsonl
ppo:
  steps: 3
"""


def writer(folder):
    """Writes a recipe next to the file of comparisons that it names, and returns its path."""
    (folder / "c.jsonl").touch()

    def write(text=TEXT):
        (folder / "r.yaml").write_text(text)
        return "r.yaml"

    return write


def refusal(*arguments):
    """The one line with which a recipe, under overrides, is refused."""
    with pytest.raises(UserError) as caught:
        load(arguments[0], arguments[1:])
    message = str(caught.value)
    assert "\n" not in message
    return message
