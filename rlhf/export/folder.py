"""The folder of an exported model: written beside its place, checked in a fresh process, then renamed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST, write_json
from rlhf.runs.stage import RUNS, parent_identity
from rlhf.runs.whole import READ, check_whole

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.tokenization.dialogue import Dialogue

Which = Literal["policy", "reward"]
AUTO = {"policy": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
"""The auto class that loads each."""
_PROBES = 4  # comparisons that the check reads
_CLOSE = 1e-3  # between logits of the same float32 weights by two ways through the model
_HALF = 0.02  # between logits of the same weights in a half type, in units of the largest


def wanted(recipe: Recipe, which: Which, stages: Sequence[str]) -> str | None:
    """The stage that a model is exported from, the first finished one; None where none is to be.

    stages: that can have made it, in order.

    Raises:
        UserError: the recipe asks for a model that no stage has made, or for one of another recipe, or it is
            not whole.
    """
    asked = recipe.export.models
    if asked is not None and which not in asked:
        return None
    there = [stage for stage in stages if (RUNS / recipe.name / stage / MANIFEST).exists()]
    if not there:
        if asked is None and which == "reward":
            return None
        raise UserError(
            f"export: no {which} in {RUNS / recipe.name}: run `make {stages[0]} RECIPE=...` with the same "
            "recipe first"
        )
    parent_identity(recipe, there[0], "export")
    check_whole(RUNS / recipe.name / there[0], READ[there[0]])
    return there[0]


def place_of(recipe: Recipe, name: str) -> Path:
    """The folder that an export makes.

    Raises:
        UserError: it is there already.
    """
    own = recipe.export.folder
    place = (Path(own) if own else RUNS / recipe.name / "export") / name
    if os.path.lexists(place):
        raise UserError(
            f"{place} is there already, and nothing is written over it: remove it, or name another place "
            '(SET="export.folder=...")'
        )
    return place


def save(model: Any, dialogue: Dialogue, folder: Path, dtype: str) -> Any:
    """Write a merged model under its own class of transformers, and its tokenizer; returns it as written.

    model: float32, used up. dtype: of the written weights.

    Raises:
        UserError: transformers has no such class, or the type cannot hold the weights.
    """
    import torch

    from rlhf.models.kernels.onednn import leave_onednn

    known = (kind for kind in type(model).__mro__ if not kind.__module__.startswith(("rlhf.", "peft.")))
    kind = next(known)
    if not kind.__module__.startswith(("transformers.models.", "transformers_modules.")):
        raise UserError(
            f"export: transformers has no {type(model).__name__.removeprefix('Packed')}, so nobody could "
            "load it: use the adapter with this project, or export the policy alone (export.models=[policy])"
        )
    model.__class__ = kind
    leave_onednn(model)
    for name, weight in model.state_dict(keep_vars=True).items():  # rotary frequencies are none, and stay
        weight.data = weight.data.to(getattr(torch, dtype)) if weight.is_floating_point() else weight.data
        if not torch.isfinite(weight).all():
            raise UserError(f"export.dtype={dtype}: {name} is not finite in it; use bfloat16 or float32")
    model.save_pretrained(str(folder))
    dialogue.tokenizer.save_pretrained(str(folder))
    return model


def check_reload(model: Any, folder: Path, which: Which, rows: list[list[int]]) -> dict[str, Tensor]:
    """Load what was written in a fresh process, without this project, and compare its logits with those of
    the model in memory, which have to be equal; returns them by row.

    Raises:
        RuntimeError: the written model is another one.
    """
    import torch
    from safetensors.torch import load_file

    from rlhf.export import reload

    expected = reload.logits_of(model, rows)
    with tempfile.TemporaryDirectory() as scratch:
        ids, out = Path(scratch) / "rows.json", Path(scratch) / "logits.safetensors"
        write_json(ids, rows)
        words = (folder.resolve(), AUTO[which], ids, out, torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-I", str(Path(reload.__file__)), *map(str, words)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the exported model cannot be loaded:\n{done.stderr}")
        found = load_file(out)
    gap = max(float((found[row] - expected[row]).abs().max()) for row in expected)
    # some families keep parts of a half-precision model in float32 when they load it
    allowed = (
        0 if model.dtype == torch.float32 else _HALF * max(float(x.abs().max()) for x in expected.values())
    )
    if not gap <= allowed:
        raise RuntimeError(f"the exported {which} gives other logits in a fresh process (by {gap:.2g})")
    return found


def probes(recipe: Recipe, dialogue: Dialogue) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of the first held-out comparisons, as tokens: what the check reads."""
    from rlhf.data.comparisons import Counts
    from rlhf.data.readers.native import read_native

    file = RUNS / recipe.name / "comparisons" / "held_out.jsonl"
    found = []
    for comparison in read_native(file, "stop", Counts())[:_PROBES]:
        prompt = dialogue.encode_prompt(comparison.prompt)
        found += [(prompt, dialogue.encode_response(text)) for text in comparison.responses[:2]]
    return found


def gap_of(pairs: Sequence[tuple[Tensor, Tensor]], recipe: Recipe) -> float | None:
    """Largest difference between what the exported and the trained model give; None where nothing is known.

    Raises:
        RuntimeError: both are float32, and it is more than the order of sums explains.
    """
    gap = max((float((found - trained).abs().max()) for found, trained in pairs), default=None)
    if gap is not None and (math.isnan(gap) or (recipe.export.dtype == "float32" and gap > _CLOSE)):
        raise RuntimeError(f"the exported model differs from the trained one by {gap:.2g}")
    return gap
