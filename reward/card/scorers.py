"""Anything that gives a response a score: this project's reward models, and Hugging Face's classifiers.

A classifier (``AutoModelForSequenceClassification`` with one label, or a peft adapter for one) is read in its
own way: its tokenizer, its chat template where it has one, its dtype from the recipe.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel, load_peft_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from reward.card.ood import activations
from reward.model.model import TextRewardModel, config_file, load_config
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError, first_line, out_of_memory
from rlhf.models.base import best_device, check_kind
from rlhf.models.masks import right_pad
from rlhf.models.token_batches import token_batches
from rlhf.recipe.load import Recipe, is_path
from rlhf.runs.artifacts import SETTINGS, WEIGHTS
from rlhf.tokenization.dialogue import load_tokenizer

TOKENS_AT_ONCE = 4096  # tokens, padding included, of one forward pass
_NO_LIMIT = 10**9  # a tokenizer without a limit says more than this
_NOT_LOADED = (
    "{key}: no sequence classifier can be loaded from {path} ({{}}); check the path (only safetensors are "
    "read, and code of the model only with model.trust_remote_code=true)"
)


class Scorer(Protocol):
    """What the card asks of a model."""

    normalized: bool
    """Whether the scores have mean 0 and variance 1 on reference responses."""
    gain: float | None
    """What the scores were multiplied with after training to bring them there; None = not known."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """Scores of responses to prompts, [n]; higher is better."""

    def cut(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.bool_]:
        """True where prompt or response is longer than what is read, [n]."""

    def read(self, response: str) -> Hashable:
        """What a response is to the model: equal for two that it cannot tell apart behind one prompt."""

    def describe(self) -> dict[str, Any]:
        """What the model is and how it reads a text, JSON-able; ``path`` is always there."""


def load_scorer(path: str, recipe: Recipe, *, key: str = "card.model") -> Scorer:
    """The scorer at a path, on the best device.

    Args:
        path: folder of a reward model of ours (it has ``reward_model.json``), of a classifier or of an
            adapter for one; or the hub id of the latter two.
        recipe: its ``model`` section says the dtype and whether a model's own code may run.
        key: the recipe's key that names the path, for messages.

    Raises:
        UserError: there is no such model, it has not one label, no trained head, or no safetensors.
    """
    check_scorer(path, recipe, key=key)
    place = Path(path).expanduser()
    if config_file(place):
        return RewardModelScorer(place, path, recipe.model.trust_remote_code)
    return ClassifierScorer(str(place) if place.is_dir() else path, recipe, key)


def check_scorer(path: str, recipe: Recipe, *, key: str) -> None:
    """What can be said against a model before its weights are read.

    Raises:
        UserError: as :func:`load_scorer`.
    """
    place = Path(path).expanduser()
    if is_path(path) and not place.is_dir():
        raise UserError(f"{key}: {path} is not a folder; name a reward model's folder or a hub id")
    if config_file(place):
        if load_config(place).objective == "imitation":
            raise UserError(f"{key}: {path} was trained by imitation and gives no score; name a reward model")
        return
    where = str(place) if place.is_dir() else path
    if _adapter_of(where, key) is None:
        _config(where, recipe, key)


class RewardModelScorer:
    """A reward model that this project has trained."""

    normalized = True

    def __init__(self, folder: Path, path: str, trust_remote_code: bool) -> None:
        self.config, self.path = load_config(folder), path
        self.gain: float | None = self.config.gain
        self.model = TextRewardModel(folder, best_device(), trust_remote_code=trust_remote_code)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """Normalized scores, [n]."""
        return _finite(self.model.score(prompts, responses), self.path)

    def cut(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.bool_]:
        """True where the prompt lost its beginning or the response its end."""
        dialogue = self.model.dialogue
        whole = copy.copy(dialogue)
        whole.max_prompt_tokens = whole.max_response_tokens = sys.maxsize
        return np.array(
            [
                len(whole.encode_prompt(p)) > dialogue.max_prompt_tokens
                or len(whole.encode_response(r)) > dialogue.max_response_tokens
                for p, r in zip(prompts, responses, strict=True)
            ],
            dtype=bool,
        )

    def read(self, response: str) -> Hashable:
        """Its ids up to the cut."""
        dialogue = self.model.dialogue
        return tuple(dialogue.close([], dialogue.encode_response(response)))

    def activations(self, prompts: Sequence[Prompt], layer: int) -> Tensor:
        """What one layer makes of prompts, [N, D]; see :func:`reward.card.ood.activations`."""
        inside: Any = self.model.model
        rows = [self.model.dialogue.encode_prompt(p) for p in prompts]
        decoder = inside.base_model.model.base_model
        return activations(decoder, rows, self.model.dialogue.pad_id, layer)

    def describe(self) -> dict[str, Any]:
        """The path and what ``reward_model.json`` says."""
        return {"path": self.path, "kind": "reward model of this project", **self.config.as_dict()}


class ClassifierScorer:
    """A sequence classifier with one label, as it is or as an adapter on its base.

    The text is the chat template's of prompt and response; without a template the turns and the response are
    joined by blank lines. What is too long loses its beginning (a leading special token stays). The model is
    given the mask of real tokens. Where its configuration names a padding token, its head is read on the last
    token that is not this one, as its authors had it; where it names none, padding is a token that does not
    occur in the batch. So no score depends on the rest of its batch.
    """

    normalized = False
    gain: float | None = None

    def __init__(self, path: str, recipe: Recipe, key: str) -> None:
        self.path = path
        trust = recipe.model.trust_remote_code
        self.model, self.base, own_tokenizer = _load(path, recipe, key)
        self.model = self.model.to(best_device()).eval().requires_grad_(False)
        self.tokenizer = _tokenizer(path if own_tokenizer else self.base, trust, key)
        self.config = self.model.config.get_text_config()
        pad = self.tokenizer.pad_token_id
        if self.base != path and own_tokenizer and pad is not None:
            self.config.pad_token_id = pad  # the base's configuration knows nothing of the adapter's training
        elif self.config.pad_token_id is None and pad != self.tokenizer.eos_token_id:
            self.config.pad_token_id = pad
        self.pad_id: int | None = self.config.pad_token_id
        self.limit = _limit(self.model, self.tokenizer)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """The head's output, [n]."""
        rows = [self._shortened(self._ids(p, r)) for p, r in zip(prompts, responses, strict=True)]
        scores = torch.empty(len(rows))
        for batch in token_batches([len(row) for row in rows], TOKENS_AT_ONCE):
            scores[batch] = self._forward([rows[i] for i in batch])
        return _finite(scores, self.path)

    def cut(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.bool_]:
        """True where prompt and response together are longer than the model's limit."""
        rows = (self._ids(p, r) for p, r in zip(prompts, responses, strict=True))
        return np.array([len(row) > self.limit for row in rows], dtype=bool)

    def read(self, response: str) -> Hashable:
        """The text: what is cut here is a beginning."""
        return response.strip()

    def describe(self) -> dict[str, Any]:
        """Path, architecture and how a text is read."""
        pad = None if self.pad_id is None else self.tokenizer.convert_ids_to_tokens(self.pad_id)
        return {
            "path": self.path,
            "kind": "sequence classifier" if self.base == self.path else "adapter of a sequence classifier",
            "base": None if self.base == self.path else self.base,
            "architecture": self.model.config.architectures and self.model.config.architectures[0],
            "template": "chat" if self.tokenizer.chat_template else "plain",
            "padding": pad,
            "max_tokens": None if self.limit == sys.maxsize else self.limit,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def _ids(self, prompt: Prompt, response: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer("\n\n".join([*(m.content for m in prompt), response]))["input_ids"])
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        turns.append({"role": "assistant", "content": response})
        try:
            ids = self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        except TemplateError as error:
            raise UserError(
                f"{self.path}: its chat template refuses a dialogue ({error}; the roles are "
                f"{', '.join(t['role'] for t in turns)}); leave such comparisons out"
            ) from None
        return [int(i) for i in cast(list[int], ids)]

    def _shortened(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.limit:
            return ids
        start = ids[:1] if ids[0] in self.tokenizer.all_special_ids else []
        return [*start, *ids[len(ids) - self.limit + len(start) :]]

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        pad = self.pad_id
        if pad is None:
            pad = _unused(rows, self.model.get_input_embeddings().num_embeddings)
            if pad is None and len(rows) > 1:  # every token occurs, so only a row by itself is safe
                return torch.cat([self._forward([row]) for row in rows])
            self.config.pad_token_id = pad
        ids_NT, mask_NT = right_pad(rows, 0 if pad is None else pad)
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids_NT.to(device), attention_mask=mask_NT.long().to(device)).logits
        return logits.squeeze(-1).float().cpu()


def _limit(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest row in tokens, by the tokenizer and by the model, which may number positions behind padding."""
    config = model.config.get_text_config()
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:  # RoBERTa and its kin
            limits.append(module.num_embeddings - first - 1)
    return min((int(n) for n in limits if n is not None and 0 < n < _NO_LIMIT), default=sys.maxsize)


def _unused(rows: Sequence[Sequence[int]], vocabulary: int) -> int | None:
    """The smallest token id that is in no row, None where all are."""
    used = set().union(*rows)
    return next((i for i in range(vocabulary) if i not in used), None)


def _finite(scores: Tensor, path: str) -> NDArray[np.float64]:
    found = scores.double().numpy()
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise UserError(
            f"{path} gives {bad} of {found.size} responses a score that is not a finite number; "
            "set model.dtype=float32, or use another model"
        )
    return found


def _load(path: str, recipe: Recipe, key: str) -> tuple[Any, str, bool]:
    """The classifier, the place of its base (the path itself without an adapter), whose tokenizer to take."""
    adapter = _adapter_of(path, key)
    if adapter is None:
        model, missing = _classifier(path, recipe, key)
        if missing:
            raise UserError(
                f"{key}: {path} has no trained head ({missing[0]} is missing); it is no reward model"
            )
        return model, path, True
    base, local = str(adapter.base_model_name_or_path), Path(path).is_dir()
    if local and not (Path(path) / WEIGHTS).is_file():
        raise UserError(f"{key}: {path}/{WEIGHTS} is not there; only safetensors are read")
    if is_path(base) and not Path(base).is_dir():
        raise UserError(f"{key}: the base of {path} is not there: no folder {base}; run where it is")
    model, missing = _classifier(base, recipe, f"{key}: the base of {path}", num_labels=1)
    with _as_user_error(f"{key}: the adapter {path} does not fit its base {base} ({{}})"):
        saved, own = load_peft_weights(path, device="cpu"), model.state_dict()
        for name in missing:  # what the base's files lack must be in the adapter, or it would be random
            shapes = [tuple(t.shape) for k, t in saved.items() if k.endswith(f".{name}")]
            if tuple(own[name].shape) not in shapes:
                found = f"its shape is {shapes[0]}" if shapes else "it is not saved"
                raise UserError(
                    f"{key}: {path} has no {name} with one output ({found}); it is no reward model"
                )
        whole = PeftModel.from_pretrained(model, path)
    return whole, base, not local or (Path(path) / "tokenizer_config.json").is_file()


def _adapter_of(path: str, key: str) -> PeftConfig | None:
    """The configuration of a peft adapter for a sequence classifier, None where the path is no adapter."""
    local = Path(path).is_dir()
    if local and not (Path(path) / SETTINGS).is_file():
        return None
    try:
        with _as_user_error(f"{key}: {path}/{SETTINGS} cannot be read ({{}})"):
            adapter = PeftConfig.from_pretrained(path)
    except UserError:
        if local:
            raise
        return None  # a hub id of something else
    task = getattr(adapter.task_type, "value", adapter.task_type)
    if task != "SEQ_CLS":
        raise UserError(f"{key}: {path} is an adapter for {task}, not for a sequence classifier")
    return adapter


def _classifier(path: str, recipe: Recipe, key: str, **options: Any) -> tuple[Any, list[str]]:
    """The model and the names of the weights that its files do not have."""
    section = recipe.model
    config = _config(path, recipe, key, **options)
    check_kind(AutoModelForSequenceClassification, config, f"{key}: {path}")
    with _as_user_error(_NOT_LOADED.format(key=key, path=path)):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, section.dtype),
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    return model, sorted(info["missing_keys"])


def _config(path: str, recipe: Recipe, key: str, **options: Any) -> Any:
    """The configuration of a classifier with one label."""
    with _as_user_error(_NOT_LOADED.format(key=key, path=path)):
        config = AutoConfig.from_pretrained(path, trust_remote_code=recipe.model.trust_remote_code, **options)
    if config.num_labels != 1:
        kind = (config.architectures or [type(config).__name__])[0]
        raise UserError(
            f"{key}: {path} has {config.num_labels} labels ({kind}); "
            "a reward model is a sequence classifier with one (num_labels=1)"
        )
    return config


@contextlib.contextmanager
def _as_user_error(message: str) -> Iterator[None]:
    """A library's error as one line of ours, with its first line in the braces."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        if out_of_memory(error):
            raise
        reason = first_line(error, 200)
        raise UserError(message.replace("{}", reason)) from None


def _tokenizer(path: str, trust_remote_code: bool, key: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)
    except UserError:
        raise UserError(f"{key}: {path} has no tokenizer; save it beside the model") from None
