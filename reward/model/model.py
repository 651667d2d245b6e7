"""The reward model as it is saved, loaded and asked for scores.

A saved reward model is a peft adapter with its head for ``AutoModelForSequenceClassification``, the
tokenizer, and ``reward_model.json`` with what those two cannot hold: the offset (Hugging Face's head has no
bias), the base, and the fingerprint of the token contract.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from reward.loss import head_init_std
from reward.model.batch import Example, width
from reward.model.forward import check_packing, score_examples
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError
from rlhf.models.base import in_float32, load_base
from rlhf.models.lora import HEAD, WEIGHTS, lora_config
from rlhf.models.packing import with_hidden_states
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import Pooling, PreferenceTraining
from rlhf.recipe.schema import Model
from rlhf.runs.artifacts import SETTINGS, read_json, write_json
from rlhf.tokenization.dialogue import Dialogue, load_tokenizer

CONFIG = "reward_model.json"
_LOADING = ("dtype", "quantization", "revision")
_TURNS = ("end_of_turn", "template_arguments")
FORMER_CONFIG = "reward.json"  # its name in earlier versions, whose models stay readable


class RewardModelConfig(NamedTuple):
    """What ``reward_model.json`` says."""

    base: str
    """Folder or hub id of the base model."""
    offset: float
    """Added to the head's output; it changes no comparison."""
    gain: float
    """Already folded into the head's weights."""
    contract: str
    """Fingerprint of tokenizer, template, EOS and padding."""
    template: str
    """``chat`` or ``plain``."""
    max_prompt_tokens: int
    """Longest prompt that it was trained on."""
    max_response_tokens: int
    """Longest response that it was trained on."""
    end_of_context: str | None = None
    """The token behind EOS on which the score is read, if there is one."""
    end_of_turn: str | None = None
    """The token that ends a turn where it is not EOS, as it never was in earlier versions."""
    template_arguments: dict[str, Any] = {}  # noqa: RUF012
    """What the chat template reads besides the messages."""
    objective: str = "ranked"
    """What it was trained for; after ``imitation`` there is no score, only an adapter."""
    dtype: str = "float32"
    """``model.dtype`` of its recipe: with the next two, how the base is loaded wherever this scores."""
    quantization: str = "none"
    """``model.quantization`` of the same."""
    revision: str | None = None
    """``model.revision`` of the same."""
    layers: int | None = None
    """How many of the base's layers, from the first, it consists of, its last norm and the head behind them;
    None = all."""
    pooling: Pooling = "last"
    """What the head reads: the state at the last token, or the mean over the response's."""
    averaged: int = 1
    """Of how many members this is the mean; its adapter has so many times the rank of theirs."""

    def as_dict(self) -> dict[str, Any]:
        """As it is written: of what came later only what is not the default, as files before it."""
        usual = self._field_defaults
        later = (*_LOADING, *_TURNS, "layers", "pooling", "averaged")
        return {k: v for k, v in self._asdict().items() if k not in later or v != usual[k]}

    def loading(self) -> dict[str, Any]:
        """The fields of a recipe's ``model`` section that say how the base was loaded."""
        return {name: getattr(self, name) for name in _LOADING}


def load_classifier(
    model: Model, dialogue: Dialogue, layers: int | None = None, pooling: Pooling = "last"
) -> Any:
    """The base, or its first ``layers`` layers, as a sequence classifier with one output, which reads packed
    rows; its head is float32. As Hugging Face calls it, it reads the last token whatever ``pooling``."""
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": dialogue.pad_id, "layers": layers}
    base: Any = with_hidden_states(load_base(model, AutoModelForSequenceClassification, **options))
    base.score, base.pooling = base.score.float(), pooling
    return base


def new_reward_model(
    recipe: Recipe,
    dialogue: Dialogue,
    seed: int | None = None,
    *,
    layers: int | None = None,
    pooling: Pooling = "last",
) -> Any:
    """The base, or its first ``layers`` layers, with a fresh adapter and a fresh scalar head.

    The head's weights start as N(0, 1/(d+1)) (Stiennon 2020; Huang 2024, detail 5), from the recipe's seed
    unless another is given.
    """
    base = load_classifier(recipe.model, dialogue, layers, pooling)
    torch.manual_seed(recipe.seed if seed is None else seed)
    nn.init.normal_(base.score.weight, std=head_init_std(base.score.in_features))
    config = lora_config(recipe.lora, base, task="SEQ_CLS", depth=layers, modules_to_save=["score"])
    return get_peft_model(base, config, autocast_adapter_dtype=True)


def head_of(model: PeftModel) -> nn.Linear:
    """The learning copy of the scalar head."""
    inside: Any = model.base_model.model
    return inside.score.modules_to_save["default"]


def start_tensors(model: PeftModel, folder: Path, key: str = "reward.start") -> dict[str, Tensor]:
    """Adapter and head of a trained model that another can start from; every tensor has its place there.

    The adapter of a language model, as a policy's, has no head: the fresh one stays.

    Args:
        model: what is to start from it.
        folder: the trained model, or the adapter.
        key: the recipe's key that names the folder, for messages.

    Raises:
        UserError: there is no such model, or it was made with other lora settings, another base or other
            ``layers`` of it.
    """
    file, config = folder / WEIGHTS, folder / SETTINGS
    for needed in (file, config):
        if not needed.is_file():
            raise UserError(f"{key}: {needed} is not there; name the folder of a trained preference model")
    saved, own = load_file(file), get_peft_model_state_dict(model, save_embedding_layers=False)
    made = read_json(config)
    settings: Any = model.peft_config["default"]
    shapes = {name: tuple(t.shape) for name, t in saved.items()}
    wanted = {name: tuple(t.shape) for name, t in own.items()}
    if made.get("task_type") == "CAUSAL_LM":
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(f"{HEAD}.")}
    if made.get("lora_alpha") != settings.lora_alpha or shapes != wanted:
        raise UserError(
            f"{key}: {file} does not fit this recipe ({len(saved)} tensors there, {len(wanted)} here): "
            "it was made with other lora settings or another base, or other layers of it"
        )
    return saved


@torch.no_grad()
def start_from(model: PeftModel, folder: Path, key: str = "reward.start") -> int:
    """Let a fresh model start from a trained one; returns the number of tensors read.

    Raises:
        UserError: as :func:`start_tensors`.
    """
    saved = start_tensors(model, folder, key)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, own | saved)
    return len(saved)


def save_reward_model(model: PeftModel, folder: Path, config: RewardModelConfig, dialogue: Dialogue) -> None:
    """Write adapter, head, tokenizer and configuration."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    dialogue.tokenizer.save_pretrained(str(folder))
    write_json(folder / CONFIG, config.as_dict())


def config_file(folder: Path) -> Path | None:
    """The file that makes a folder a reward model of ours, under its present or its former name."""
    return next((folder / name for name in (CONFIG, FORMER_CONFIG) if (folder / name).is_file()), None)


def load_config(folder: Path) -> RewardModelConfig:
    """The configuration of a saved reward model.

    Raises:
        UserError: the folder holds no reward model of ours.
    """
    file = config_file(folder)
    if file is None:
        raise UserError(f"{folder} holds no reward model ({CONFIG} is missing); run `make reward RECIPE=...`")
    return RewardModelConfig(**read_json(file))


def config_of(
    recipe: Recipe,
    dialogue: Dialogue,
    section: PreferenceTraining,
    *,
    gain: float,
    offset: float,
    layers: int | None = None,
) -> RewardModelConfig:
    """What is saved beside a trained model."""
    precision = {name: getattr(recipe.model, name) for name in ("dtype", "quantization", "revision")}
    names = ("template", "max_prompt_tokens", "end_of_context", "template_arguments")
    return RewardModelConfig(
        base=recipe.model.path,
        offset=offset,
        gain=gain,
        contract=dialogue.fingerprint(),
        objective=section.objective,
        end_of_turn=dialogue.end_token,
        layers=layers,
        pooling=section.pooling,
        max_response_tokens=dialogue.max_response_tokens,
        **{name: getattr(recipe.dialogue, name) for name in names},
        **precision,
    )


def shapes_of(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """What a backbone has to know of reward models by adapter: ``depths``, how many of the base layers those
    consist of that do not have them all, ``ranks``, how many times the rank they have that are the average
    of several, and ``pooled``, which read the mean state."""
    configs = {name: load_config(folder) for name, folder in zip(names, folders, strict=True)}
    return {
        "depths": {name: config.layers for name, config in configs.items() if config.layers is not None},
        "ranks": {name: config.averaged for name, config in configs.items() if config.averaged > 1},
        "pooled": [name for name, config in configs.items() if config.pooling == "mean"],
    }


def check_has_score(config: RewardModelConfig, folder: Path) -> None:
    """A model trained by imitation has an adapter and an untrained head: it gives no score.

    Raises:
        UserError: it is such a model.
    """
    if config.objective == "imitation":
        raise UserError(
            f"{folder} was trained by imitation and gives no score; train it with reward.objective=ranked or "
            "binary, or name another reward model"
        )


def check_same_contract(config: RewardModelConfig, recipe: Recipe, dialogue: Dialogue, folder: Path) -> None:
    """A reward adapter can share the policy's base only if it has a score, and the same base and tokens.

    Raises:
        UserError: it has no score; or they differ, and the remedy is to let it score decoded text as a model
            of its own.
    """
    check_has_score(config, folder)
    own = recipe.model
    here = {name: getattr(own, name) for name in _LOADING}
    differs = [
        f"model.{n} is {kept} there, {here[n]} here"
        for n, kept in config.loading().items()
        if kept != here[n]
    ]
    if config.base != own.path:
        what = f"its base is {config.base}, this recipe's is {own.path}"
    elif differs:
        what = "; ".join(differs)
    elif config.contract != dialogue.fingerprint():
        what = "its tokenizer or template differs from this recipe's"
    else:
        return
    raise UserError(
        f"ppo.reward_model: {folder} does not fit ({what}); "
        "set ppo.retokenize=true to load it beside the policy and let it score the decoded text"
    )


def too_short(where: str, read: int, sampled: int) -> str:
    """The warning that a reward model meets longer responses than it was trained on."""
    return (
        f"{where}={read} is less than the {sampled} tokens that PPO samples (dialogue.max_response_tokens): "
        "the reward model will score longer responses than it has seen; raise it, or sample fewer"
    )


class TextRewardModel:
    """A reward model on a base of its own that reads text, whatever tokenizer the policy has.

    Args:
        folder: a reward model of ours.
        device: where it runs.
        trust_remote_code: ``model.trust_remote_code`` of the recipe that uses it.
        unpacked: with its base in float32 whatever its type, for an adapter that is to be merged.

    Raises:
        UserError: the folder holds no reward model of ours, or one without a score.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        trust_remote_code: bool = False,
        unpacked: bool = False,
    ) -> None:
        self.config = load_config(folder)
        check_has_score(self.config, folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.dialogue = Dialogue(
            tokenizer,
            template=self.config.template,
            max_prompt_tokens=self.config.max_prompt_tokens,
            max_response_tokens=self.config.max_response_tokens,
            truncate_prompts=True,
            end_of_turn=self.config.end_of_turn or tokenizer.eos_token,
            end_of_context=self.config.end_of_context,
            template_arguments=self.config.template_arguments,
        )
        options = self.config.loading() | {"trust_remote_code": trust_remote_code}
        shape = self.config.layers, self.config.pooling
        base = load_classifier(Model(path=self.config.base, **options), self.dialogue, *shape)
        base = in_float32(base) if unpacked else base
        self.model = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
        self.model.requires_grad_(False)
        self._share, self._checked = True, 0  # tokens of the longest row with which sharing has been tried

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Normalized scores of responses to prompts, [n]; higher is better.

        Neighboring responses to one prompt are forwarded behind one copy of it.
        """
        examples: list[Example] = []
        for prompt, group in itertools.groupby(zip(prompts, responses, strict=True), key=itemgetter(0)):
            closed = [self.dialogue.close([], self.dialogue.encode_response(text)) for _, text in group]
            own = {"prompt": self.dialogue.encode_prompt(prompt), "responses": closed, "index": -1}
            examples.append(own | dict.fromkeys(("ranks", "spoken"), [0] * len(closed)))
        shared = [e for e in examples if len(e["responses"]) > 1]
        if self._share and (longest := max((width(e, True) for e in shared), default=0)) > self._checked:
            self._share = check_packing(self.model, examples, self.dialogue.pad_id) is None
            self._checked = longest
        share = self._share and bool(shared)
        return score_examples(self.model, examples, self.dialogue.pad_id, share=share)[0] + self.config.offset
