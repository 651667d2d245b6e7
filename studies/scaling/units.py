"""What each kind of unit does: make one rung, change it, or measure it; and keep the result.

    rung       a language model trained from nothing, or a given one: its sizes      (weights)
    distil     a context distilled into the rung                                     (adapter)
    ppo        a short PPO of the rung, with plain text mixed in or without          (adapter)
    evaluate   one arm on all items

A result depends on the unit's settings and on what it needs, on nothing else. Texts and items depend on the
seed and the purpose alone: the rungs of a seed meet the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_model

from rlhf.evals.model import LanguageModel
from rlhf.models.backbone import REFERENCE, Backbone
from studies.engine.units import Compute, Settings, Unit, keep, weights_path
from studies.scaling import distil, evaluate, reinforce, rungs
from studies.scaling.adapters import ADAPTER, backbone_of, bare_ids, load_adapter, save_adapter
from studies.scaling.data.texts import Library, context_of
from studies.scaling.plan import BASE, PROMPTED


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Do a unit; returns its result, and leaves the weights that others need in the folder."""
    return KINDS[unit.kind](unit, folder)


def rung(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a rung, or count a given one."""
    s = unit.settings
    model, tokenizer = rungs.load(s, None)
    counts = {
        "N": rungs.matrix_weights(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
    }
    if "model" in s:
        return counts
    library = library_of(s)
    rows = rungs.token_rows(tokenizer, library.training(s["tokens"] // s["window"], s["window"]), s["window"])
    model.train()
    losses = rungs.language_model(model, rows, s)
    keep(weights_path(unit, folder), lambda file: save_model(model, str(file)))
    few = max(1, len(losses) // 20)
    return counts | {"first_loss": losses[0], "last_loss": sum(losses[-few:]) / few, "steps": len(losses)}


def distilled(unit: Unit, folder: Path) -> dict[str, Any]:
    """Distil the context."""
    backbone, tokenizer = _loaded(unit, folder)
    s = unit.settings
    library = library_of(s)
    own = not s["context"]
    found = distil.distil(
        backbone, tokenizer, context(s, library), library, s, scratch(unit, folder), continued=own
    )
    keep(weights_path(unit, folder), lambda file: save_adapter(backbone, file))
    return found


def reinforced(unit: Unit, folder: Path) -> dict[str, Any]:
    """PPO."""
    backbone, tokenizer = _loaded(unit, folder, value=True)
    s = unit.settings
    found = reinforce.reinforce(backbone, tokenizer, library_of(s), s, scratch(unit, folder))
    keep(weights_path(unit, folder), lambda file: save_adapter(backbone, file))
    return dict(found)


def evaluated(unit: Unit, folder: Path) -> dict[str, Any]:
    """Measure one arm."""
    s = unit.settings
    library = library_of(s)
    role = REFERENCE if s["arm"] in (BASE, PROMPTED) else ADAPTER
    backbone, tokenizer = _loaded(unit, folder)
    if role == ADAPTER:
        load_adapter(backbone, weights_path(unit.needs[1], folder))
    prefix = bare_ids(tokenizer, context(s, library)) if s["arm"] == PROMPTED else []
    backbone.activate(role)
    with backbone.folded(role):
        lm = LanguageModel(backbone.base, tokenizer, prefix_ids=prefix)
        return dict(evaluate.outcomes(lm, library, s))


KINDS: dict[str, Compute] = {
    "rung": rung,
    "distil": distilled,
    "ppo": reinforced,
    "evaluate": evaluated,
}


def scratch(unit: Unit, folder: Path) -> Path:
    """Where a training loop may write while the unit is done."""
    return folder / f"{unit.kind}-{unit.key}"


def library_of(s: Settings) -> Library:
    """The texts of a unit."""
    return Library([path for path, _ in s["text"]], s["seed"], pure="model" in s)


def context(s: Settings, library: Library) -> str:
    """The context of a unit: that of the file that was given, else a story."""
    files = [path for path, _ in s["context"]]
    words = s["context_words"]
    return context_of(files[0], words) if files else library.context(words)


def _loaded(unit: Unit, folder: Path, *, value: bool = False) -> tuple[Backbone, Any]:
    """The rung that a unit needs, with a fresh adapter (one is made for arms without, to no effect)."""
    need = unit.needs[0]
    weights = weights_path(need, folder) if "layers" in need.settings else None
    model, tokenizer = rungs.load(need.settings, weights)
    shape: Settings = {"rank": 1, "alpha": 1} | unit.settings
    return backbone_of(model, shape, value=value), tokenizer
