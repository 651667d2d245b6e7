"""CONTRIBUTING's lists of hops lead from a command line to a formula, each function to the next."""

import ast
import itertools
import re

import pytest
from conftest import ROOT

FORMULAS = {
    "KL penalty": "-kl_coef *",
    "GAE": "gamma * lam",
    "PPO clip": "clamp(",
    "Reward loss": "-logsigmoid(",
}
FILES = {"KL penalty": 4, "GAE": 4, "PPO clip": 5, "Reward loss": 5}  # opened, __main__ included
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LISTS = dict(re.findall(r"(?m)^- \*\*([^*]+)\*\*: (`[^\n]+(?:\n  -> [^\n]+)*)", PAGE))


def names_of(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def code_of(place):
    """Source of ``file:function``, ``file:Class.method`` or ``file:CONSTANT``, without docstrings."""
    file, _, path = place.partition(":")
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in path.split("."):
        node = next(part for part in node.body if name in names_of(part))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    return ast.unparse(node)


def ways_to_call(place):
    """How the code before may name a place: its function, its class, or the attribute that holds it."""
    file, _, path = place.partition(":")
    names = path.split(".")
    if names[-1] != "__call__" and len(names) == 2:
        return {names[1], names[0]}
    if names[-1] == "__call__":
        return {
            re.sub(r"(?<!^)(?=[A-Z])", "_", names[0]).lower(),
            file.rpartition("/")[2].removesuffix(".py"),
        }
    return {names[0]}


def test_there_is_a_list_for_each_formula():
    assert LISTS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("formula", FORMULAS)
def test_each_function_names_the_next_one_down_to_the_formula(formula):
    places = re.findall(r"`([^`]+)`", LISTS[formula])
    assert places[0].endswith("/__main__.py:main")
    for here, there in itertools.pairwise(re.findall(r"`([^`]+)`|(transformers' loop)", LISTS[formula])):
        if there[1]:
            assert "trainer.train(" in code_of(here[0])
        elif here[0]:
            names = ways_to_call(there[0])
            assert any(re.search(rf"\b{name}\b", code_of(here[0])) for name in names), (here, there)
    assert FORMULAS[formula] in code_of(places[-1])
    assert len({place.partition(":")[0] for place in places}) == FILES[formula]
