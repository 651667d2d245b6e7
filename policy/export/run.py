"""The policy's export: what was trained, merged in float32, written, and compared with what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from rlhf.export.card import write_card
from rlhf.export.folder import check_reload, gap_of, probes, save
from rlhf.export.hub import push
from rlhf.export.reload import LAST
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_in_float32
from rlhf.models.merging import with_adapters
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import staged_folder
from rlhf.runs.stage import RUNS
from rlhf.tokenization.dialogue import Dialogue, load_dialogue


def export(recipe: Recipe, stage: str, place: Path) -> None:
    """Write the policy of a finished stage to a folder that is not there yet."""
    folder, dialogue = RUNS / recipe.name / stage, load_dialogue(recipe)
    whole = folder / "model"  # of a distillation that trained all weights
    adapter = None if whole.is_dir() else folder / "policy"
    rows = [dialogue.close(*pair) for pair in probes(recipe, dialogue)]
    trained = _trained(recipe, adapter, rows, dialogue.pad_id) if adapter else []
    section = recipe.model if adapter else recipe.model.model_copy(update={"path": str(whole)})
    model: Any = load_in_float32(section)
    if adapter:
        model = with_adapters(model, [(adapter, 1.0)])
    with staged_folder(place) as made:
        model = save(model, dialogue, made, recipe.export.dtype)
        generation_config(recipe, dialogue).save_pretrained(str(made))
        found = check_reload(model, made, "policy", rows)
        pairs = [(_of_next(found[str(n)], rows[n]), there) for n, there in enumerate(trained)]
        gap = gap_of(pairs, recipe)
        write_card(recipe, stage, made, "policy", dialogue, {"gap": gap, "rows": len(rows)})
    print(f"export: the policy of {stage}: {place}", flush=True)
    push(recipe, place, "policy")


def generation_config(recipe: Recipe, dialogue: Dialogue) -> GenerationConfig:
    """How PPO sampled: its temperature, the whole vocabulary, its ends and its longest response."""
    return GenerationConfig(
        do_sample=True,
        temperature=recipe.ppo.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=dialogue.max_response_tokens,
        bos_token_id=dialogue.tokenizer.bos_token_id,
        eos_token_id=list(dialogue.end_ids),
        pad_token_id=dialogue.pad_id,
    )


@torch.no_grad()
def _trained(recipe: Recipe, adapter: Path, rows: list[list[int]], pad_id: int) -> list[torch.Tensor]:
    """Log-probabilities of the last tokens of every row as the stages compute them, with the adapter beside
    the base, in float32."""
    backbone = Backbone(load_in_float32(recipe.model), recipe.lora, adapters=["policy"])
    backbone.load_adapter("policy", adapter)
    found = []
    for row in rows:
        ids = torch.tensor([[*row, pad_id]])
        mask = torch.tensor([[True] * len(row) + [False]])
        found.append(backbone("policy", ids, mask, start=1)[0][0, -(LAST - 1) :])
    return found


def _of_next(logits_TV: torch.Tensor, row: list[int]) -> torch.Tensor:
    """Log-probabilities of the last tokens of a row by the logits before each of them."""
    targets = torch.tensor(row[-len(logits_TV) :][1:])
    return logits_TV[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
