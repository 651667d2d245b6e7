"""The reward model as it is saved, loaded and asked for scores.

A saved reward model is a peft adapter with its head for ``AutoModelForSequenceClassification``, the
tokenizer, and ``reward.json`` with what those two cannot say: the offset (Hugging Face's head has no bias),
the base, and the fingerprint of the token contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from reward.batches import Example, Packed, as_example, attention_mask, micro_batches, pack
from reward.loss import head_init_std
from rlhf.artifacts import read_json, write_json
from rlhf.backbone import WEIGHTS, layers_of, lora_config
from rlhf.base import load_base
from rlhf.comparisons import Prompt
from rlhf.dialogue import Dialogue, load_tokenizer
from rlhf.errors import UserError
from rlhf.recipe import Recipe
from rlhf.runtime import whole_parameters
from rlhf.schema import Model
from rlhf.sequences import chosen_log_probs
from rlhf.stage import processes

if TYPE_CHECKING:
    from reward.trunk import Trunk

CARD = "reward.json"
TOKENS_AT_ONCE = 4096  # tokens, padding included, of one scoring batch
_LOGITS_AT_ONCE = 2048  # positions whose vocabulary logits are in memory at once
_SETTINGS = "adapter_config.json"  # peft's; tensors alone do not say by how much an adapter is scaled
_PACKING_TOLERANCE = 1e-3  # between packed and separate scores, in units of their size


class RewardCard(NamedTuple):
    """What ``reward.json`` says."""

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
    objective: str = "ranked"
    """What it was trained for; after ``imitation`` there is no score, only an adapter."""


class ReadsAnywhere:
    """Mixed into a Hugging Face sequence classifier: its head read where a packed row says.

    Called as anybody calls it, the classifier is what it was. With ``rows_S`` it returns the last hidden
    states [N, T, D] and the head's output [S] at rows ``rows_S`` and columns ``columns_S``; with
    ``hidden_NTD`` as well it starts from those states at layer ``cut``. With ``cut`` alone it returns the
    states that enter that layer.
    """

    def forward(
        self,
        input_ids: Tensor,
        *,
        rows_S: Tensor | None = None,
        cut: int | None = None,
        hidden_NTD: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """See the class."""
        if rows_S is None and cut is None:
            return super().forward(input_ids=input_ids, **options)  # type: ignore[misc]
        inside: Any = self
        decoder = getattr(inside, inside.base_model_prefix)
        part = "all" if cut is None else ("trunk" if hidden_NTD is None else "top")
        with layers_of(decoder, part, cut or 0):
            out_NTD = decoder(
                **({"input_ids": input_ids} if hidden_NTD is None else {"inputs_embeds": hidden_NTD}),
                attention_mask=options["attention_mask"],
                position_ids=options["position_ids"],
                use_cache=False,
            ).last_hidden_state
        if rows_S is None:
            return out_NTD
        read_SD = out_NTD[rows_S, options["columns_S"]]
        return out_NTD, inside.score(read_SD.float()).squeeze(-1)


def reads_anywhere(base: PreTrainedModel) -> PreTrainedModel:
    """Teach a loaded sequence classifier to read packed rows; its weights and saved form stay the same."""
    kind = type(base)
    base.__class__ = type(f"Packed{kind.__name__}", (ReadsAnywhere, kind), {})
    return base


def new_reward_model(recipe: Recipe, dialogue: Dialogue, seed: int | None = None) -> Any:
    """The base with a fresh adapter and a fresh scalar head, ready for training.

    The head's weights start as N(0, 1/(d+1)) (Stiennon 2020; Huang 2024, detail 5), from the recipe's seed
    unless another is given.
    """
    base: Any = reads_anywhere(
        load_base(
            recipe.model,
            AutoModelForSequenceClassification,
            num_labels=1,
            pad_token_id=dialogue.pad_id,
        )
    )
    base.score = base.score.float()
    torch.manual_seed(recipe.seed if seed is None else seed)
    nn.init.normal_(base.score.weight, std=head_init_std(base.score.in_features))
    config = lora_config(recipe.lora, base, task="SEQ_CLS", modules_to_save=["score"])
    return get_peft_model(base, config, autocast_adapter_dtype=True)


def head_of(model: PeftModel) -> nn.Linear:
    """The learning copy of the scalar head."""
    inside: Any = model.base_model.model
    return inside.score.modules_to_save["default"]


def start_tensors(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """Adapter and head of a trained model that another can start from; every tensor has its place there.

    Raises:
        UserError: there is no such model, or it was made with other lora settings or another base.
    """
    file, config = folder / WEIGHTS, folder / _SETTINGS
    for needed in (file, config):
        if not needed.is_file():
            raise UserError(
                f"reward.start: {needed} is not there; name the folder of a trained preference model"
            )
    saved, own = load_file(file), get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(t.shape) for name, t in saved.items()}
    settings: Any = model.peft_config["default"]
    same_scale = read_json(config).get("lora_alpha") == settings.lora_alpha
    if not same_scale or shapes != {name: tuple(t.shape) for name, t in own.items()}:
        raise UserError(
            f"reward.start: {file} does not fit this recipe ({len(saved)} tensors there, {len(own)} here): "
            "it was made with other lora settings or another base"
        )
    return saved


@torch.no_grad()
def start_from(model: PeftModel, folder: Path) -> int:
    """Let a fresh model start from a trained one; returns the number of tensors read.

    Raises:
        UserError: as :func:`start_tensors`.
    """
    saved = start_tensors(model, folder)
    set_peft_model_state_dict(model, saved)
    return len(saved)


def forward_packed(model: Any, packed: Packed, trunk: Trunk | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states [N, T, D] and one score a response [B, K]; 0 where there is no response."""
    mask_BK = packed.mask_BK
    hidden = {} if trunk is None else {"cut": trunk.cut, "hidden_NTD": trunk.states(packed)}
    hidden_NTD, scores_S = model(
        **inputs_of(model, packed),
        **hidden,
        rows_S=packed.rows_BK[mask_BK],
        columns_S=packed.columns_BK[mask_BK],
    )
    scores_BK = torch.zeros(mask_BK.shape, dtype=scores_S.dtype, device=scores_S.device)
    return hidden_NTD, scores_BK.index_put(mask_BK.nonzero(as_tuple=True), scores_S)


def inputs_of(model: Any, packed: Packed) -> dict[str, Tensor]:
    """What the base reads of a packed batch."""
    return {
        "input_ids": packed.ids_NT,
        "attention_mask": attention_mask(packed.segments_NT, dtype_of(model)),
        "position_ids": packed.positions_NT,
    }


def dtype_of(model: Any) -> torch.dtype:
    """Type of the base's weights."""
    inside = getattr(model, "module", model)
    return inside.base_model.model.dtype


def response_log_probs(hidden_NTD: Tensor, packed: Packed, vocabulary: nn.Module) -> tuple[Tensor, Tensor]:
    """Summed log-probability of the wanted responses and the number of their tokens, [B, K] each.

    Both are 0 for responses that were not wanted. ``vocabulary`` maps hidden states to logits.
    """
    states_1SD = hidden_NTD[packed.states_2S[0], packed.states_2S[1]][None]
    logps_S = chosen_log_probs(
        states_1SD, vocabulary, packed.targets_S[None], temperature=1.0, chunk=_LOGITS_AT_ONCE
    )[0][0]
    shape = packed.mask_BK.shape
    zeros = torch.zeros(shape.numel(), dtype=logps_S.dtype, device=logps_S.device)
    sums = zeros.index_add(0, packed.owners_S, logps_S)
    counts = zeros.index_add(0, packed.owners_S, torch.ones_like(logps_S))
    return sums.view(shape), counts.view(shape)


@torch.no_grad()
def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    share: bool = True,
    tokens: int = TOKENS_AT_ONCE,
    vocabulary: nn.Module | None = None,
    trunk: Trunk | None = None,
) -> tuple[Tensor, ...]:
    """Raw head output of every response, flat and in order, [sum of K], float32 on the CPU.

    With ``vocabulary`` also the responses' summed log-probabilities and their token counts, shaped alike.
    """
    device = next(model.parameters()).device
    first = [0]
    for example in examples:
        first.append(first[-1] + len(example["responses"]))
    parts = 1 if vocabulary is None else 3
    out = torch.zeros(parts, first[-1])
    for batch in micro_batches(examples, tokens, share=share):
        some = [examples[i] for i in batch]
        packed = pack(some, pad_id, share=share, wanted="none" if vocabulary is None else "all").to(device)
        hidden_NTD, scores_BK = forward_packed(model, packed, trunk)
        found = [scores_BK]
        if vocabulary is not None:
            found += response_log_probs(hidden_NTD, packed, vocabulary)
        for b, index in enumerate(batch):
            k = len(examples[index]["responses"])
            for part, values_BK in enumerate(found):
                out[part, first[index] : first[index] + k] = values_BK[b, :k].float().cpu()
    return tuple(out)


def scores_of(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Raw head output of closed token rows, [len(rows)], in their order, float32 on the CPU."""
    return score_examples(model, [as_example(row) for row in rows], pad_id, share=False)[0]


def check_packing(model: nn.Module, examples: Sequence[Example], pad_id: int) -> str | None:
    """Compare packed with separate rows on a few real examples; returns a warning where they differ.

    An architecture may ignore a four-dimensional mask or positions of its own; its rows then stay separate.
    """
    some = sorted(examples, key=lambda e: len(e["responses"]), reverse=True)[:2]
    try:
        packed, separate = (score_examples(model, some, pad_id, share=share)[0] for share in (True, False))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return f"this architecture does not take packed rows ({reason}); prompts are not shared"
    gap = float((packed - separate).abs().max())
    exact = dtype_of(model) == torch.float32
    if gap > _PACKING_TOLERANCE * (1 if exact else 100) * max(1.0, float(separate.abs().max())):
        return f"packed rows score differently with this architecture (by {gap:.2g}); prompts are not shared"
    return None


def vocabulary_head(recipe: Recipe, model: Any) -> nn.Module:
    """The frozen map from hidden states to vocabulary logits, which a sequence classifier does not have.

    Where the base ties it to its embeddings it is those, without a copy unless ZeRO-3 will take them apart.
    """
    decoder = model.base_model.model.base_model
    embedding = decoder.get_input_embeddings().weight
    if getattr(decoder.config.get_text_config(), "tie_word_embeddings", False):
        with whole_parameters([embedding]):
            head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
            apart = processes() > 1 and recipe.distributed.zero_stage == 3
            head.weight = (
                nn.Parameter(embedding.detach().clone(), requires_grad=False) if apart else embedding
            )
        return head
    causal: Any = load_base(recipe.model)
    return causal.get_output_embeddings().to(embedding.device)


def save_reward_model(model: PeftModel, folder: Path, card: RewardCard, dialogue: Dialogue) -> None:
    """Write adapter, head, tokenizer and card."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    dialogue.tokenizer.save_pretrained(str(folder))
    write_json(folder / CARD, card._asdict())


def read_card(folder: Path) -> RewardCard:
    """The card of a saved reward model.

    Raises:
        UserError: the folder holds no reward model of ours.
    """
    file = folder / CARD
    if not file.is_file():
        raise UserError(f"{folder} holds no reward model ({CARD} is missing); run `make reward RECIPE=...`")
    return RewardCard(**read_json(file))


def check_same_contract(card: RewardCard, recipe: Recipe, dialogue: Dialogue, folder: Path) -> None:
    """A reward adapter can share the policy's base only if base and tokens are the same.

    Raises:
        UserError: they differ; the remedy is to let it score decoded text as a model of its own.
    """
    if card.base != recipe.model.path:
        what = f"its base is {card.base}, this recipe's is {recipe.model.path}"
    elif card.contract != dialogue.fingerprint():
        what = "its tokenizer or template differs from this recipe's"
    else:
        return
    raise UserError(
        f"ppo.reward_model: {folder} does not fit ({what}); "
        "set ppo.retokenise=true to load it beside the policy and let it score the decoded text"
    )


class TextRewardModel:
    """A reward model on a base of its own that reads text, whatever tokenizer the policy has.

    Args:
        folder: a reward model of ours.
        device: where it runs.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.card = read_card(folder)
        self.dialogue = Dialogue(
            load_tokenizer(folder),
            template=self.card.template,
            max_prompt_tokens=self.card.max_prompt_tokens,
            max_response_tokens=self.card.max_response_tokens,
            truncate_prompts=True,
            end_of_context=self.card.end_of_context,
        )
        base = reads_anywhere(
            load_base(
                Model(path=self.card.base),
                AutoModelForSequenceClassification,
                num_labels=1,
                pad_token_id=self.dialogue.pad_id,
            )
        )
        self.model = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
        self.model.requires_grad_(False)
        self._share: bool | None = None  # not known before there is something to share

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Normalised scores of responses to prompts, [n]; higher is better.

        Neighbouring responses to one prompt are forwarded behind one copy of it.
        """
        examples: list[Example] = []
        before: Prompt | None = None
        for prompt, response in zip(prompts, responses, strict=True):
            if not examples or prompt != before:
                examples.append(
                    as_example([]) | {"prompt": self.dialogue.encode_prompt(prompt), "responses": []}
                )
                before = prompt
            examples[-1]["responses"].append(self.dialogue.close([], self.dialogue.encode_response(response)))
        for example in examples:
            example["ranks"] = example["spoken"] = [0] * len(example["responses"])
        if self._share is None and any(len(e["responses"]) > 1 for e in examples):
            self._share = check_packing(self.model, examples, self.dialogue.pad_id) is None
        share = bool(self._share)
        return score_examples(self.model, examples, self.dialogue.pad_id, share=share)[0] + self.card.offset
