"""The reward model as it is saved, loaded and asked for scores.

A saved reward model is a peft adapter with its head for ``AutoModelForSequenceClassification``, the
tokenizer, and ``reward.json`` with what those two cannot say: the offset (Hugging Face's head has no bias),
the base, and the fingerprint of the token contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from reward.batches import token_batches
from reward.loss import head_init_std
from rlhf.artifacts import read_json, write_json
from rlhf.backbone import lora_config
from rlhf.base import load_base
from rlhf.comparisons import Prompt
from rlhf.dialogue import Dialogue, load_tokenizer
from rlhf.errors import UserError
from rlhf.recipe import Recipe
from rlhf.schema import Model
from rlhf.sequences import right_pad

CARD = "reward.json"
TOKENS_AT_ONCE = 4096  # tokens, padding included, of one scoring batch


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


def new_reward_model(recipe: Recipe, dialogue: Dialogue) -> Any:
    """The base with a fresh adapter and a fresh scalar head, ready for training.

    The head's weights start as N(0, 1/(d+1)) (Stiennon 2020; Huang 2024, detail 5), from the recipe's seed.
    """
    base: Any = load_base(
        recipe.model,
        AutoModelForSequenceClassification,
        num_labels=1,
        pad_token_id=dialogue.pad_id,
    )
    base.score = base.score.float()
    torch.manual_seed(recipe.seed)
    nn.init.normal_(base.score.weight, std=head_init_std(base.score.in_features))
    config = lora_config(recipe.lora, base, task="SEQ_CLS", modules_to_save=["score"])
    return get_peft_model(base, config, autocast_adapter_dtype=True)


def head_of(model: PeftModel) -> nn.Linear:
    """The learning copy of the scalar head."""
    inside: Any = model.base_model.model
    return inside.score.modules_to_save["default"]


@torch.no_grad()
def scores_of(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Raw head output of closed token rows, [len(rows)], in their order, float32 on the CPU."""
    device = next(model.parameters()).device
    out = torch.empty(len(rows))
    for batch in token_batches(rows, TOKENS_AT_ONCE):
        ids_NT, mask_NT = right_pad([rows[i] for i in batch], pad_id)
        logits = model(
            input_ids=ids_NT.to(device), attention_mask=mask_NT.long().to(device), use_cache=False
        ).logits
        out[batch] = logits.squeeze(-1).float().cpu()
    return out


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
        )
        base: PreTrainedModel = load_base(
            Model(path=self.card.base),
            AutoModelForSequenceClassification,
            num_labels=1,
            pad_token_id=self.dialogue.pad_id,
        )
        self.model = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
        self.model.requires_grad_(False)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Normalised scores of responses to prompts, [n]; higher is better."""
        rows = [
            self.dialogue.close(self.dialogue.encode_prompt(p), self.dialogue.encode_response(r))
            for p, r in zip(prompts, responses, strict=True)
        ]
        return scores_of(self.model, rows, self.dialogue.pad_id) + self.card.offset
