"""Model variants: models that are evaluated side by side, each a whole model with any number of adapters.

One adapter of weight 1 is a trained model; weight 1 - a for the adapter of the PPO reference and a for that
of the policy is the model a of the way between them, weight by weight (:mod:`rlhf.models.merging` has the
sum).

No torch before a model is loaded, so that an error is reported in under a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe, is_path
from rlhf.recipe.tax import DEFAULT_VARIANTS, VARIANTS, Tax, interpolated
from rlhf.runs.artifacts import MANIFEST, SETTINGS, hash_of, model_files, read_json, sha256_of
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.stage import RUNS
from rlhf.runs.whole import check_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.evals.model import LanguageModel
    from rlhf.tokenization.prompt_prefix import Context

STAGES = {"sft": "sft", "distilled": "distill", "policy": "ppo", "policy_prompted": "ppo"}
"""The stage that makes a variant of the run."""
PICKLED = "*.bin"  # weights that are no safetensors


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
    """A short description."""

    @property
    def weights(self) -> tuple[Any, ...]:
        """Equal for variants with equal weights, which then need to be loaded only once."""
        return (self.base, self.adapters)


# ---------------------------------------------------------------- which variants


def variant_names(recipe: Recipe, section: Tax, *, planned: bool = False) -> list[str]:
    """Names of all variants that a table has, in the order in which they are shown.

    Without ``tax.variants``: the base, the prompted base where there is a prompt file, and those whose
    stage has finished, or, with ``planned``, is in the recipe.
    """

    def there(name: str) -> bool:
        stage = STAGES.get(name)
        if stage is None:
            return name == "base" or Path(recipe.hhh_prompt).expanduser().is_file()
        if planned:
            return getattr(recipe, stage) is not None
        return (RUNS / recipe.name / stage / MANIFEST).is_file()

    names = section.variants
    if names is None:
        names = [name for name in DEFAULT_VARIANTS if there(name)]
    between = [interpolated(weight) for weight in section.interpolate]
    listed = [n for name in names for n in ([*between, name] if name == "policy" else [name])]
    return [*listed, *section.models]


def variant_stages(names: Sequence[str]) -> list[str]:
    """Stages of the run that must have finished for these variants."""
    return list(dict.fromkeys(stage for name in names if (stage := STAGES.get(name))))


def check_models(section: Tax) -> None:
    """Every model of ``tax.models`` that is named by a path must be there.

    Raises:
        UserError: names the one that is not, and what would do, or a file that is damaged.
    """
    for label, place in section.models.items():
        folder = Path(place).expanduser()
        check_place(folder)
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
    between = {interpolated(weight): weight for weight in section.interpolate}
    found = []
    for name in variant_names(recipe, section):
        if name in section.models:
            found.append(_named(name, section.models[name], recipe))
        elif name in between:
            found.append(_interpolated(name, between[name], recipe))
        else:
            found.append(_of_run(name, recipe))
    return found


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


def _interpolated(name: str, weight: float, recipe: Recipe) -> ModelVariant:
    policy = _of_run("policy", recipe)
    start = start_folder(recipe, recipe.name, "ppo")
    reference = () if start is None else ((str(start), 1 - weight),)
    adapters = (*reference, *((folder, weight) for folder, _ in policy.adapters))
    what = f"{weight:g} of the way from the PPO reference to the policy, weight by weight"
    return ModelVariant(name, policy.base, adapters, what=what)


def _named(label: str, place: str, recipe: Recipe) -> ModelVariant:
    folder = Path(place).expanduser()
    where = str(folder) if folder.is_dir() else place
    if not (folder / SETTINGS).is_file():
        return ModelVariant(label, where, what=f"the model {place}")
    base = base_of(where, recipe)
    return ModelVariant(label, base, ((where, 1.0),), what=f"{base} with the adapter {place}")


def base_of(adapter: str, recipe: Recipe) -> str:
    """The model that an adapter was made for, by its own settings; the recipe's where they name none."""
    settings = read_json(Path(adapter).expanduser() / SETTINGS)
    return str(settings.get("base_model_name_or_path") or recipe.model.path)


# ---------------------------------------------------------------- what a variant is made of


def _hash_of_files(files: Sequence[Path], place: str) -> str:
    """Content hash of files that are there; of the place's name where there is none, as of a hub id."""
    hashes = {f.name: _hash_of_file(f, f.stat().st_mtime_ns) for f in files if f.is_file()}
    return hash_of(hashes or {"hub": place})


@functools.cache
def _hash_of_file(file: Path, changed: int) -> str:
    """Content hash, computed once for all variants on the same base; ``changed``: when it last was, in ns."""
    return sha256_of(file)


def model_hash(place: str) -> str:
    """Content hash of a model or adapter; a hub id stands for itself."""
    return _hash_of_files(model_files(place, PICKLED), place)


def tokenizer_hash(variant: ModelVariant) -> str:
    """Content hash of a variant's tokenizer, without its chat template; a hub id stands for itself."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    return _hash_of_files([Path(variant.base).expanduser() / name for name in names], variant.base)


def variant_hash(variant: ModelVariant, recipe: Recipe) -> str:
    """Content hash of what a variant's output depends on: weights, tokenizer, prompt, precision."""
    parts = {
        "base": model_hash(variant.base),
        "adapters": [[model_hash(folder), weight] for folder, weight in variant.adapters],
        "prompt": sha256_of(Path(recipe.hhh_prompt).expanduser()) if variant.prompted else None,
        "dialogue": recipe.dialogue.as_before(),
        "precision": [recipe.model.dtype, recipe.model.quantization],
        "revision": recipe.model.revision if variant.base == recipe.model.path else None,
    }
    return hash_of(parts)


# ---------------------------------------------------------------- loading


def load_variant(
    variant: ModelVariant, recipe: Recipe, *, same: LanguageModel | None = None, tokens_per_batch: int = 2048
) -> LanguageModel:
    """Load a variant on the best device, in the precision of the recipe's section ``model``.

    Args:
        variant: which one.
        recipe: the whole recipe.
        same: a variant in memory with the same :attr:`ModelVariant.weights`, whose model is used again.
        tokens_per_batch: tokens of one forward pass.

    Raises:
        UserError: there is no such model or prompt, or an adapter does not fit it.
    """
    from rlhf.evals.model import LanguageModel
    from rlhf.tokenization.prompt_prefix import window_of
    from rlhf.tokenization.template import end_of_turn

    model, tokenizer = (same.model, same.tokenizer) if same else _load(variant, recipe)
    own = variant.base == recipe.model.path
    prefix_ids: Sequence[int] = ()
    if variant.prompted:
        context = prompt_of(recipe, tokenizer)
        context.check_window(window_of(model.config))
        prefix_ids = context.prefix_ids
    return LanguageModel(
        model,
        tokenizer,
        prefix_ids=prefix_ids,
        tokens_at_once=tokens_per_batch,
        end_of_turn=end_of_turn(tokenizer, recipe.dialogue, named=own),
    )


def _load(variant: ModelVariant, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from rlhf.models.base import best_device, load_base
    from rlhf.models.merging import with_adapters
    from rlhf.tokenization.dialogue import load_tokenizer

    own = variant.base == recipe.model.path
    section = (
        recipe.model if own else recipe.model.model_copy(update={"path": variant.base, "revision": None})
    )
    options = {"revision": section.revision} if own else {}
    try:
        tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, **options)
        base = load_base(section)
    except UserError as error:  # which is about `model.path`
        if own:
            raise
        reason = str(error).removeprefix("model.path: ").replace("run `make model RECIPE=...` or ", "")
        raise UserError(f"variant {variant.name}: {reason}") from None
    model = with_adapters(base, variant.adapters)
    torch.nn.Module.to(model, best_device())  # transformers refuses to move an 8-bit model
    return model, tokenizer


def prompt_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Context:
    """The prompt `hhh_prompt` in the tokens of a variant.

    Raises:
        UserError: there is no such file, or it cannot be read as a prompt.
    """
    from rlhf.tokenization.dialogue import dialogue_of
    from rlhf.tokenization.prompt_prefix import Context

    return Context.read(recipe.hhh_prompt, dialogue_of(recipe, tokenizer))
