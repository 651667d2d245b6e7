"""Loading a recipe: one YAML file plus `section.key=value` overrides, checked before torch is imported."""

from __future__ import annotations

import copy
import difflib
import glob
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf.errors import UserError
from rlhf.models.configuration import check_base
from rlhf.recipe.keys import FORMER, is_list, known_keys, unknown_key
from rlhf.recipe.quick import QUICK, laid_over, origins_with, split_overrides, take_block
from rlhf.recipe.schema import STARTS, Recipe
from rlhf.recipe.types import BASE, OWN_REWARD, function_files
from rlhf.runs.processes import adopt_environment

__all__ = ["Recipe", "check_batch_sizes", "dump", "files_of", "from_command_line", "is_path", "load"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML with two common traps mended: a repeated key is an error, and 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a word, not a list or a mapping", key_node.start_mark
                )
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float, so `1e-4` would be a string.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    typing.cast(Any, re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")),
    list("-+0123456789"),
)


MAX_BYTES = 1 << 20  # of a recipe
MAX_DEPTH = 8  # of a dotted key
MAX_VALUES = 20_000  # of a recipe, aliases written out


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    """A YAML document's value, and its nodes with their places.

    Raises yaml.YAMLError or ValueError for what is no YAML or too much of it, RecursionError where it is
    nested too deep.
    """
    if sum(map(text.count, ":,\n")) > 2 * MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values; a recipe is a page of YAML")
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _count(node, {})
        return loader.construct_document(node), node
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a node with its aliases written out; ValueError where there are too many, or no end."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # of itself, until it is known
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(node)] > MAX_VALUES:
        raise ValueError("it holds itself (an alias inside its own anchor), or too many aliases of aliases")
    return known[id(node)]


def _fault(error: Exception) -> str:
    """What is wrong with a YAML text, in words."""
    if isinstance(error, RecursionError):
        return "not a recipe: its values are nested too deep"
    kind = "YAML" if isinstance(error, yaml.YAMLError | UnicodeDecodeError) else "recipe"
    return f"not {'valid ' if kind == 'YAML' else 'a '}{kind}: {getattr(error, 'problem', None) or error}"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: YAML file of one experiment.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Returns:
        The validated, frozen recipe.

    Raises:
        UserError: missing file, malformed YAML, unknown key (with the nearest valid name), wrong type, or a
            combination that cannot work; the message names file, line and key.
    """
    values, origins = _read(Path(path))
    block = take_block(values, origins)
    quick, overrides = split_overrides(overrides)
    if quick and block is None:
        raise UserError(f"override '{QUICK}=true': {path} has no {QUICK} block with smaller sizes; add one")
    if block is not None and quick:
        values, origins = laid_over(values, block), origins_with(origins)
    elif block is not None:
        _check_block(values, block, overrides, origins)
    recipe = _validated(values, overrides, origins)
    if quick:
        recipe = recipe.model_copy(update={"name": f"{recipe.name}-{QUICK}"})
    for key, fault in _missing(recipe):
        where = _where(key, origins)
        own_data = fault.startswith("no file") and where.startswith(f"{path}:")
        raise UserError(f"{where}: {key}: {fault}{_source_of_data(Path(path)) if own_data else ''}")
    return recipe


def _source_of_data(path: Path) -> str:
    """Where the data of a recipe are to be had, as the line "# Data:" of its header says."""
    found = re.search(r"^# Data: +(.*\S)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return f", or get the data as the recipe's header says: {found[1]}" if found else ""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a recipe's file holds, and where each key stands by its dotted path; "" stands in the file."""
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = difflib.get_close_matches(str(path), known, n=1, cutoff=0.3)
        remedy = f"did you mean {hint[0]}?" if hint else f"recipes here: {', '.join(known) or 'none'}"
        what = "not a plain file" if path.exists() else "no such recipe file"
        raise UserError(f"{path}: {what}; {remedy}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MB; a recipe is a page of YAML")
    try:
        values, node = _parse(path.read_text(encoding="utf-8"))
        lines = _line_numbers(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {_fault(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this file holds {type(values).__name__}")
    return values, {"": str(path), **{key: f"{path}:{line}" for key, line in lines.items()}}


def _validated(values: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]) -> Recipe:
    """The recipe of a file's values under overrides, which are noted in ``origins``."""
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override, origins)
    known = known_keys()
    for key in origins:
        if key in FORMER and key not in known:
            raise UserError(f"{_where(key, origins)}: unknown key {key}; {FORMER[key]}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, origins)) from None


def _check_block(
    values: dict[str, Any], block: dict[str, Any], overrides: Sequence[str], origins: dict[str, str]
) -> None:
    """A ``quick`` block that is not asked for must be valid too, as it stands or with the same overrides."""
    merged, lines = laid_over(values, block), origins_with(origins)
    faults = []
    for some in ((), overrides):
        try:
            _validated(merged, some, lines)
            return
        except UserError as error:
            faults.append(error)
    _validated(values, overrides, origins)  # a fault of the recipe itself is told as such
    raise UserError(f"{faults[0]} (in the {QUICK} block)")


def _line_numbers(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Line of every key, by its dotted path."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            lines[key] = key_node.start_mark.line + 1
            lines.update(_line_numbers(value_node, f"{key}."))
    return lines


def _apply(values: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    key, separator, raw = override.partition("=")
    parts = key.strip().split(".")
    shown = f"override {override if len(override) < 80 else override[:77] + '...'!r}"
    if not separator or not all(parts) or len(parts) > MAX_DEPTH:
        raise UserError(f"{shown}: write it as section.key=value, for example ppo.steps=10")
    try:
        value, _ = _parse(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{shown}: {_fault(error)}") from None
    for depth in range(1, len(parts)):
        if parts[depth].isdigit() and is_list(parts[:depth]):
            whole = ".".join(parts[:depth])
            raise UserError(f"{shown}: one item of a list cannot be set; give the whole list, {whole}=[...]")
    target: Any = values
    for depth, part in enumerate(parts[:-1], 1):
        if part not in target:
            origins[".".join(parts[:depth])] = shown
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"{shown}: {part} is a value, not a section")
    target[parts[-1]] = value
    origins[key.strip()] = shown


def _where(key: str, origins: dict[str, str]) -> str:
    """Where a key stands, or the nearest section above it that does, or the file."""
    while key not in origins:
        key = key.rpartition(".")[0]
    return origins[key]


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    """One line for the first fault, with the remedy; the number of further ones at the end."""
    faults = error.errors()
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    where = _where(key, origins)
    if first["type"] == "extra_forbidden":
        message = unknown_key(first["loc"])
    elif first["type"] == "missing":
        message = f"{key} is missing; add it to the recipe"
    else:
        value = first.get("input")
        shown = f" (got {_shown(value)})" if isinstance(value, str | int | float | bool | list) else ""
        message = f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}{shown}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {message}{more}"


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return "an integer of thousands of digits"


def files_of(spec: str) -> list[str]:
    """Paths that a spec names, sorted: itself where it exists, else what it matches as a glob."""
    path = os.path.expanduser(spec)
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def is_path(model: str) -> bool:
    """Whether a model's name is a folder's: a hub id is NAME or OWNER/NAME, and never begins like a path."""
    first, *rest = model.split("/")
    return (
        os.path.exists(os.path.expanduser(model))
        or first in ("", ".", "..")
        or first.startswith("~")
        or len(rest) > 1
        or (bool(rest) and os.path.isdir(first))
    )


def _missing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The keys that name what is not there, each with the fault and what to do, before anything starts."""
    data, card, sft, distill, tax = recipe.data, recipe.card, recipe.sft, recipe.distill, recipe.tax
    own = function_files(recipe.collect.judge) if data.sampled else []
    files: dict[str, Sequence[str]] = {
        "hhh_prompt": [recipe.hhh_prompt] if distill else [],
        "data.comparisons": [] if data.sampled else data.comparisons,
        "data.held_out_comparisons": data.held_out_comparisons,
        "data.prompts": data.prompts,
        "data.held_out_prompts": data.held_out_prompts,
        "rank.files": recipe.rank.files,
        "sft.data": [] if sft is None or sft.chosen else sft.data,
        "distill.texts": distill.texts if distill else [],
        "distill.questions": distill.questions if distill else [],
        "card.comparisons": card.comparisons,
        "card.outliers": card.outliers,
        "collect.judge": own,
        "inside.pairs": recipe.inside.pairs,
        "inside.texts": recipe.inside.texts,
        "evaluate.judge": function_files(recipe.evaluate.judge),
        "ppo.rewards": recipe.ppo.function_files,
        **{f"tax.tasks.{name}.files": task.files for name, task in (tax.tasks if tax else {}).items()},
    }
    for key, specs in files.items():
        for spec in specs:
            if not spec.startswith("hub:") and not files_of(spec):
                yield key, f"no file matches {spec}; check the path"
    models: dict[str, str | None] = {
        "card.model": card.model,
        "card.against": card.against,
        "distill.teacher": distill.teacher if distill else None,
        **{f"tax.models.{label}": place for label, place in (tax.models if tax else {}).items()},
        "tax.toxicity.judge": tax.toxicity.judge if tax else None,
    }
    models |= {f"ppo.rewards[{n}].model": r.model for n, r in enumerate(recipe.ppo.rewards)
               if r.model != OWN_REWARD}  # fmt: skip
    starts = {f"{name}.start": getattr(getattr(recipe, name), "start", None) for name in STARTS}
    folders: list[tuple[str, str | None]] = [("ppo.reward_model", place) for place in recipe.ppo.reward_model]
    folders += [("evaluate.reward_model", recipe.evaluate.reward_model), *starts.items()]
    for section in ("collect", "rank"):
        policies = getattr(recipe, section).policies
        folders += [(f"{section}.policies", place) for place in policies if place != BASE]
    # what is no path is a model of the hub, or a judge by name
    folders += [(key, place) for key, place in models.items() if place == "" or (place and is_path(place))]
    for key, place in folders:
        stages = STARTS[key.removesuffix(".start")] if key in starts else ()
        if place is None or place in stages or os.path.isdir(os.path.expanduser(place)):
            continue
        if os.path.exists(place) or not place.startswith(f"runs/{recipe.name}/"):  # else this run makes it
            remedy = ", or name a hub id" if key in models else ""
            remedy = f", or name a stage of this run ({' or '.join(stages)})" if stages else remedy
            yield key, f"{place or repr(place)} is not a folder; check the path{remedy}"
    for name in recipe.trackers:
        if importlib.util.find_spec(name) is None:
            yield "trackers", f"{name} is not installed; run `pip install {name}`"


def check_batch_sizes(recipe: Recipe, processes: int, *stages: str) -> None:
    """The batches of some stages, or of all, must divide over the processes: nothing is rounded silently.

    Raises:
        UserError: names the numbers and batch sizes that would work.
    """
    wrong = []
    for stage in stages or ("sft", "pmp", "reward", "ppo", "dpo"):
        section, name = getattr(recipe, stage), f"{stage}.batch_size"
        size = section.batch_size if section else processes
        if stage == "ppo":
            name, size = f"{name} / ppo.minibatches", size // section.minibatches
        if size % processes:
            wrong.append(
                f"{name} = {size} does not divide over {processes} processes; "
                f"use a multiple of {processes}, for example {-(-size // processes) * processes}"
            )
    if wrong:
        raise UserError("; ".join(wrong))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, all defaults written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def from_command_line(arguments: Sequence[str] | None = None) -> Recipe:
    """The recipe named on a stage's command line: ``RECIPE [section.key=value ...]``."""
    adopt_environment()
    words = [
        w for w in (sys.argv[1:] if arguments is None else arguments) if not w.startswith("--local_rank")
    ]
    if not words:
        raise UserError(
            "no recipe given; write RECIPE [section.key=value ...], for example recipes/tiny.yaml"
        )
    flags = [w for w in words if w.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]}: there are no flags; write overrides as section.key=value")
    recipe = load(words[0], words[1:])
    check_base(recipe.model.path, recipe.lengths)
    if recipe.distill is not None and recipe.distill.teacher is not None:
        check_base(recipe.distill.teacher, recipe.lengths, "distill.teacher")
    return recipe
