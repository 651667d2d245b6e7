"""Variants: models that are evaluated side by side, each a whole model with any number of adapters on top.

One adapter of weight 1 is a trained model; weight 1 - a for the adapter of the PPO reference and a for that
of the policy is the model a of the way between them, weight by weight (:mod:`rlhf.models.merging` has the
sum).

No torch before a model is loaded, so that a mistake is told in under a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe, is_path
from rlhf.recipe.tax import DEFAULT_VARIANTS, VARIANTS, Tax, interpolated
from rlhf.runs.artifacts import MANIFEST, SETTINGS, hash_of, read_json, sha256_of
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.stage import RUNS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.tokenization.prompt_prefix import Context

STAGES = {"sft": "sft", "distilled": "distill", "policy": "ppo", "policy_prompted": "ppo"}
"""The stage that makes a variant of the run."""


@dataclasses.dataclass(frozen=True)
class ModelVariant:
    """One model to be evaluated."""

    name: str
    """As it is called in tables."""
    base: str
    """Folder or hub id of a whole model; its tokenizer is the variant's."""
    adapters: tuple[tuple[str, float], ...] = ()
    """Folders of adapters on that model, each with its weight."""
    prompted: bool = False
    """Whether it runs behind the recipe's prompt `hhh_prompt`."""
    what: str = ""
    """What it is, in a few words."""

    @property
    def weights(self) -> tuple[Any, ...]:
        """Equal for variants with equal weights, which then need to be loaded only once."""
        return (self.base, self.adapters)


class LoadedVariant(NamedTuple):
    """A variant in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix_ids: list[int]
    """Token ids of the prompt that it runs behind; empty where it has none."""


# ---------------------------------------------------------------- which variants


def variant_names(recipe: Recipe, section: Tax, *, planned: bool = False) -> list[str]:
    """Names of all variants that a table has, in the order in which they are shown.

    Without ``tax.variants``: the base, the prompted base where there is a prompt file, and those whose
    stage has finished, or, with ``planned``, is in the recipe.
    """
    names = section.variants
    if names is None:
        there = {
            name: getattr(recipe, stage) is not None
            if planned
            else (RUNS / recipe.name / stage / MANIFEST).is_file()
            for name, stage in STAGES.items()
        }
        there |= {"base": True, "prompted": Path(recipe.hhh_prompt).expanduser().is_file()}
        names = [name for name in DEFAULT_VARIANTS if there[name]]
    between = [interpolated(weight) for weight in section.interpolate] if "policy" in names else []
    listed: list[str] = []
    for name in names:
        listed += [*between, name] if name == "policy" else [name]
    return [*listed, *section.models]


def variant_stages(names: Sequence[str]) -> list[str]:
    """Stages of the run that must have finished for these variants."""
    return list(dict.fromkeys(stage for name in names if (stage := STAGES.get(name))))


def check_models(section: Tax) -> None:
    """Every model of ``tax.models`` that is named by a path must be there.

    Raises:
        UserError: names the one that is not, and what would do.
    """
    for label, place in section.models.items():
        folder = Path(place).expanduser()
        if not is_path(place) or any((folder / name).is_file() for name in ("config.json", SETTINGS)):
            continue
        what = "holds neither an adapter nor a model" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"tax.models.{label}: {place} {what}; name a folder with {SETTINGS} or config.json, or a hub id"
        )


def variants_of(recipe: Recipe, section: Tax) -> list[ModelVariant]:
    """The variants of a table; the stages of :func:`variant_stages` must have finished.

    Raises:
        UserError: an adapter's settings cannot be read.
    """
    parts = {interpolated(weight): weight for weight in section.interpolate}
    variants = []
    for name in variant_names(recipe, section):
        if name in section.models:
            variants.append(_other(name, section.models[name], recipe))
        elif name in parts:
            variants.append(_between(name, parts[name], recipe))
        else:
            variants.append(_of_run(name, recipe))
    return variants


def _of_run(name: str, recipe: Recipe) -> ModelVariant:
    prompted = name in ("prompted", "policy_prompted")
    what = VARIANTS[name].replace("`hhh_prompt`", recipe.hhh_prompt)
    stage = STAGES.get(name)
    if stage is None:
        return ModelVariant(name, recipe.model.path, prompted=prompted, what=what)
    folder = RUNS / recipe.name / stage
    if (folder / "model" / "config.json").is_file():  # a stage that trained all weights
        return ModelVariant(name, str(folder / "model"), prompted=prompted, what=what)
    adapter = str(folder / "policy")
    return ModelVariant(name, base_of(adapter, recipe), ((adapter, 1.0),), prompted, what)


def _between(name: str, weight: float, recipe: Recipe) -> ModelVariant:
    policy = _of_run("policy", recipe)
    start = start_folder(recipe, recipe.name, "ppo")
    reference = () if start is None else ((str(start), 1 - weight),)
    far = ((folder, weight) for folder, _ in policy.adapters)
    what = f"{weight:g} of the way from the PPO reference to the policy, weight by weight"
    return ModelVariant(name, policy.base, (*reference, *far), what=what)


def _other(label: str, place: str, recipe: Recipe) -> ModelVariant:
    folder = Path(place).expanduser()
    where = str(folder) if folder.is_dir() else place
    if (folder / SETTINGS).is_file():
        base = base_of(where, recipe)
        return ModelVariant(label, base, ((where, 1.0),), what=f"{base} with the adapter {place}")
    return ModelVariant(label, where, what=f"the model {place}")


def base_of(adapter: str, recipe: Recipe) -> str:
    """The model that an adapter was made for, by its own settings; the recipe's where they do not say."""
    return str(
        read_json(Path(adapter).expanduser() / SETTINGS).get("base_model_name_or_path") or recipe.model.path
    )


# ---------------------------------------------------------------- what a variant is made of


def model_files(place: str) -> list[Path]:
    """The files of a local model or adapter that decide what it says; a hub id has none here."""
    folder = Path(place).expanduser()
    names = ("config.json", "reward*.json", SETTINGS, "tokenizer.json", "*.safetensors", "*.bin", "*.jinja")
    return [file for name in names for file in sorted(folder.glob(name)) if folder.is_dir()]


def tokenizer_hash(variant: ModelVariant) -> str:
    """Content hash of a variant's tokenizer, without its chat template; a hub id stands for itself."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    files = [Path(variant.base).expanduser() / name for name in names]
    hashes = {f.name: _hash_of_file(f, f.stat().st_mtime_ns) for f in files if f.is_file()}
    return hash_of(hashes or {"hub": variant.base})


def model_hash(place: str) -> str:
    """Content hash of a model or adapter: of its files, or of its name where it lies on the hub."""
    files = {file.name: _hash_of_file(file, file.stat().st_mtime_ns) for file in model_files(place)}
    return hash_of(files or {"hub": place})


@functools.cache
def _hash_of_file(file: Path, changed: int) -> str:
    """Content hash, computed once for all variants on the same base; ``changed``: when it last was, in ns."""
    return sha256_of(file)


def variant_hash(variant: ModelVariant, recipe: Recipe) -> str:
    """Content hash of everything that decides what a variant says: weights, tokenizer, prompt, precision."""
    parts = {
        "base": model_hash(variant.base),
        "adapters": [[model_hash(folder), weight] for folder, weight in variant.adapters],
        "prompt": sha256_of(Path(recipe.hhh_prompt).expanduser()) if variant.prompted else None,
        "dialogue": recipe.dialogue.model_dump(mode="json"),
        "precision": [recipe.model.dtype, recipe.model.quantization],
        "revision": recipe.model.revision if variant.base == recipe.model.path else None,
    }
    return hash_of(parts)


# ---------------------------------------------------------------- loading


def load_variant(
    variant: ModelVariant, recipe: Recipe, *, same: LoadedVariant | None = None
) -> LoadedVariant:
    """Load a variant on the best device, in the precision of the recipe's section ``model``.

    Args:
        variant: which one.
        recipe: the whole recipe.
        same: a variant in memory with the same :attr:`ModelVariant.weights`, whose model is used again.

    Raises:
        UserError: there is no such model or prompt, or an adapter does not fit it.
    """
    from rlhf.tokenization.prompt_prefix import window_of

    model, tokenizer = same[:2] if same else _load(variant, recipe)
    prefix_ids: list[int] = []
    if variant.prompted:
        context = prompt_of(recipe, tokenizer)
        context.check_window(window_of(model.config))
        prefix_ids = list(context.prefix_ids)
    return LoadedVariant(model, tokenizer, prefix_ids)


def _load(variant: ModelVariant, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from rlhf.models.base import best_device, load_base
    from rlhf.models.merging import with_adapters

    own = variant.base == recipe.model.path
    section = recipe.model.model_copy(
        update={"path": variant.base, "revision": recipe.model.revision if own else None}
    )
    tokenizer = tokenizer_of(variant, recipe)
    try:
        model = load_base(section)
    except UserError as error:
        raise _blamed(error, variant, own) from None
    model = with_adapters(model, variant.adapters)
    torch.nn.Module.to(model, best_device())  # transformers refuses to move an 8-bit model
    return model, tokenizer


def tokenizer_of(variant: ModelVariant, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a variant, which is its base's.

    Raises:
        UserError: there is none.
    """
    from rlhf.tokenization.dialogue import load_tokenizer

    own = variant.base == recipe.model.path
    options = {"revision": recipe.model.revision} if own else {}
    try:
        return load_tokenizer(variant.base, trust_remote_code=recipe.model.trust_remote_code, **options)
    except UserError as error:
        raise _blamed(error, variant, own) from None


def prompt_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Context:
    """The prompt `hhh_prompt` in the tokens of a variant.

    Raises:
        UserError: there is no such file, or it cannot be read as a prompt.
    """
    from rlhf.tokenization.dialogue import dialogue_of
    from rlhf.tokenization.prompt_prefix import Context

    return Context.read(recipe.hhh_prompt, dialogue_of(recipe, tokenizer))


def _blamed(error: UserError, variant: ModelVariant, own: bool) -> UserError:
    """An error of a loader that knows only ``model.path``, with the variant that it is about."""
    if own:
        return error
    reason = str(error).removeprefix("model.path: ").replace("run `make model RECIPE=...` or ", "")
    return UserError(f"variant {variant.name}: {reason}")
