"""`model.dtype: auto`: the type of a run's base, which its first stage chooses and all others keep."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import yaml

from rlhf.errors import UserError
from rlhf.models.configuration import read_config
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST
from rlhf.runs.processes import rank

AUTO = "auto"
_WAIT = 300.0  # seconds for the first process to have loaded torch and measured
_SIZES = (("hidden_size", "n_embd", "d_model"), ("intermediate_size", "n_inner", "ffn_dim"))


def settled(recipe: Recipe, run: Path, *, measured: bool = True) -> Recipe:
    """The recipe with the type that its run has, or will have, in the place of `auto`.

    Args:
        recipe: any recipe; one that names a type comes back as it is.
        run: folder of the run. A type in the resolved recipe of any of its stages counts, a finished one's
            first, so that a run keeps it on another machine too.
        measured: choose by a measurement where there is none yet, and print it; else leave `auto`. All
            processes but the first one wait for its stage's recipe.

    Raises:
        UserError: the first process has left no recipe.
    """
    if recipe.model.dtype != AUTO:
        return recipe
    dtype = _stored(run)
    deadline = time.monotonic() + _WAIT
    while measured and dtype is None and rank() != 0:
        if time.monotonic() > deadline:
            raise UserError(
                f"model.dtype=auto: the first process has chosen no type within {_WAIT:.0f} s; look at its "
                f"last lines; every process must see {run}"
            )
        time.sleep(0.1)
        dtype = _stored(run)
    if measured and dtype is None:
        dtype = _chosen(recipe)
    if dtype is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def _stored(run: Path) -> str | None:
    """The type in the resolved recipe of a stage of a run."""
    files = [*run.glob("*/recipe.yaml")]
    for file in sorted(files, key=lambda file: (not (file.parent / MANIFEST).exists(), file)):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            dtype = str(yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["dtype"])
            if dtype != AUTO:
                return dtype
    return None


def _chosen(recipe: Recipe) -> str:
    if recipe.distill is not None and recipe.distill.method == "full":
        print("model.dtype=auto: float32, which distill.method=full needs", flush=True)
        return "float32"
    from rlhf.training.matrix_units import fastest_dtype

    config = read_config(recipe.model.path) or {}
    width, inner = (next((int(config[n]) for n in names if config.get(n)), None) for names in _SIZES)
    width = width or 1024
    dtype, why = fastest_dtype(width, inner or 4 * width)
    print(f"model.dtype=auto: {dtype}: {why}", flush=True)
    return dtype
