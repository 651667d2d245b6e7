"""The work of the reward stage: train, normalise, save, reload, judge on held-out prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn

from reward.batches import encode
from reward.loss import normalisation, pair_accuracy
from reward.model import (
    RewardCard,
    head_of,
    new_reward_model,
    read_card,
    save_reward_model,
    scores_of,
)
from reward.probe import fit_probe
from reward.trainer import RankedRewardTrainer, training_arguments
from rlhf.artifacts import MANIFEST, read_json, step_of, write_json
from rlhf.backbone import Backbone
from rlhf.base import best_device, load_base
from rlhf.comparisons import Comparison, Counts
from rlhf.dialogue import Dialogue, load_dialogue
from rlhf.errors import UserError
from rlhf.intervals import Estimate, cluster_mean_interval
from rlhf.metrics import Metrics
from rlhf.recipe import Recipe
from rlhf.runtime import load_bases_whole
from rlhf.sequences import right_pad
from rlhf.sources.native import read_native
from rlhf.stage import StageRun, processes

MODEL = "model"  # the saved reward model, below the stage's folder
_RELOAD_TOLERANCE = 1e-3  # between the trained and the reloaded model's scores, in units of their spread
_RELOAD_TOLERANCE_HALF = 0.1  # the same over a half-precision base


def fit(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Train the reward model of a recipe; returns the figures for the manifest."""
    dialogue = load_dialogue(recipe)
    train, held_out = (
        read_native(run.parent("comparisons") / f"{part}.jsonl", "stop", Counts())
        for part in ("train", "held_out")
    )
    rows = {"train": encode(train, dialogue), "held_out": encode(held_out, dialogue)}
    fresh = new_reward_model(recipe, dialogue)
    results: dict[str, Any] = {}
    if recipe.reward.probe:
        weights_D, results["probe_accuracy"] = _probe(run, fresh, rows, dialogue)
        if recipe.reward.head_init == "probe":
            with torch.no_grad():
                head_of(fresh).weight.copy_(weights_D[None])
    model = _trained(recipe, run, dialogue, fresh, rows["train"])
    results |= _normalise(recipe, model, rows["train"], dialogue)
    card = RewardCard(
        base=recipe.model.path,
        offset=results["offset"],
        gain=results["gain"],
        contract=dialogue.fingerprint(),
        template=recipe.dialogue.template,
        max_prompt_tokens=recipe.dialogue.max_prompt_tokens,
        max_response_tokens=recipe.dialogue.max_response_tokens,
    )
    for part in ("held_out", "train"):
        accuracy = _accuracy(model, rows[part][: len(rows["held_out"])], dialogue.pad_id)
        results[f"{part}_accuracy"] = accuracy.as_dict()
    _save(run, model, card, dialogue)
    probe_rows = [e["responses"][0] for e in rows["held_out"][:4]]
    expected = scores_of(model, probe_rows, dialogue.pad_id) + card.offset
    del model
    if run.is_main:
        load_bases_whole()
        backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
        results["reload_gap"] = _check_reload(backbone, run.folder / MODEL, probe_rows, expected, dialogue)
        ceiling = read_json(run.parent("comparisons") / MANIFEST)["results"].get("noise_ceiling")
        if ceiling:
            results["noise_ceiling"] = ceiling
        _report(results, held_out)
    return results


def _probe(
    run: StageRun, fresh: Any, rows: dict[str, list[dict[str, Any]]], dialogue: Dialogue
) -> tuple[Tensor, dict[str, Any]]:
    """The linear probe on the base below a fresh adapter, which changes nothing yet; fitted once a stage."""
    kept = run.folder / "parts" / "probe.json"
    if not kept.is_file():
        decoder = fresh.to(best_device()).base_model.model.base_model
        probe = fit_probe(decoder, rows["train"], rows["held_out"], dialogue.pad_id)
        figures: dict[str, Any] = {"weights": probe.weights_D.tolist(), "accuracy": probe.accuracy.as_dict()}
        if run.is_main:
            write_json(kept, figures)
            run.note_clock()
    else:
        figures = read_json(kept)
    return torch.tensor(figures["weights"]), figures["accuracy"]


def _trained(
    recipe: Recipe, run: StageRun, dialogue: Dialogue, fresh: Any, rows: list[dict[str, Any]]
) -> nn.Module:
    """The trained model; an interrupted training goes on from its newest checkpoint."""
    arguments = training_arguments(recipe, run)
    per_step = recipe.reward.batch_size
    steps = recipe.reward.epochs * -(-len(rows) // per_step)
    checkpoint = run.checkpoints.newest()
    done = step_of(checkpoint)
    if checkpoint and run.is_main:
        print(f"reward: going on after step {done} of {steps}", flush=True)
    metrics = Metrics(
        run.folder,
        total=steps,
        done=done,
        shown={"reward/loss": ".3f", "reward/pair_accuracy": ".2f"},
        description="reward",
        active=run.is_main,
    )
    trainer = RankedRewardTrainer(
        run=run,
        metrics=metrics,
        pad_id=dialogue.pad_id,
        model=fresh,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=dialogue.tokenizer,
    )
    folder = _resumable(checkpoint / f"checkpoint-{done}") if checkpoint else None
    trainer.train(resume_from_checkpoint=folder)
    metrics.close()
    if trainer.state.global_step != trainer.state.max_steps:
        raise RuntimeError(f"trained {trainer.state.global_step} of {trainer.state.max_steps} steps")
    trained: Any = trainer.model
    return trained.eval()


def _resumable(folder: Path) -> str:
    """A trainer's checkpoint, seen to hold what a trainer would silently start anew.

    Raises:
        UserError: optimiser, schedule or random state is missing, or another number of processes wrote it.
    """
    if processes() == 1:
        needed = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    else:
        needed = ["latest", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(processes()))]
    missing = [name for name in needed if not (folder / name).is_file()]
    written = len(list(folder.glob("rng_state_*.pth"))) or 1
    if written != processes():
        raise UserError(
            f"{folder}: {written} processes wrote it, and {processes()} cannot go on from it: "
            f"use PROCS={written}, or remove {folder.parent.parent} to start again"
        )
    if missing:
        raise UserError(
            f"{folder}: the optimiser state is incomplete ({missing[0]} is missing); "
            f"remove {folder.parent} to go on from the one before"
        )
    return str(folder)


@torch.no_grad()
def _normalise(recipe: Recipe, model: Any, rows: list[dict[str, Any]], dialogue: Dialogue) -> dict[str, Any]:
    """Fold the gain into the head and find the offset: mean 0, variance 1 on reference responses.

    The reference responses are those of the training comparisons (Ziegler 2019 takes samples of the
    reference policy, which in the lab is the same thing).
    """
    responses = [r for e in rows for r in e["responses"]]
    number = min(len(responses), recipe.reward.reference_responses)
    chosen = random.Random(recipe.seed).sample(responses, number)
    scores = scores_of(model, chosen, dialogue.pad_id)
    try:
        gain, offset = normalisation(scores)
    except ValueError as error:
        raise UserError(
            f"reward: {error}: the training failed; lower reward.learning_rate, or look at metrics.jsonl"
        ) from None
    with _whole(head_of(model).weight):
        head_of(model).weight.mul_(gain)
    return {"gain": gain, "offset": offset, "reference_responses": number}


def _whole(parameter: Tensor) -> Any:
    """A parameter in one piece while it is changed or read (ZeRO-3 keeps it in parts)."""
    import contextlib

    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _accuracy(model: nn.Module, rows: list[dict[str, Any]], pad_id: int) -> Estimate:
    """Pair accuracy over comparisons, equal scores counting half, the interval clustered by comparison."""
    scores = iter(scores_of(model, [r for e in rows for r in e["responses"]], pad_id).tolist())
    correct, pairs = [], []
    for example in rows:
        ranks = torch.tensor([example["ranks"]])
        mine = torch.tensor([[next(scores) for _ in example["ranks"]]])
        right, number = pair_accuracy(mine, ranks, torch.ones_like(ranks, dtype=torch.bool))
        correct.append(float(right))
        pairs.append(int(number))
    return cluster_mean_interval(correct, pairs)


def _save(run: StageRun, model: Any, card: RewardCard, dialogue: Dialogue) -> None:
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
            if run.is_main:
                save_reward_model(model, run.folder / MODEL, card, dialogue)
    elif run.is_main:
        save_reward_model(model, run.folder / MODEL, card, dialogue)
    if processes() > 1:
        dist.barrier()


@torch.no_grad()
def _check_reload(
    backbone: Backbone, folder: Path, rows: list[list[int]], expected: Tensor, dialogue: Dialogue
) -> float:
    """Load what was saved the way PPO will, and compare scores: a lost head must be noticed here.

    Raises:
        RuntimeError: the scores differ.
    """
    backbone.load_adapter("reward", folder)
    ids_NT, mask_NT = right_pad(rows, dialogue.pad_id)
    scores = backbone("reward", ids_NT, mask_NT) + read_card(folder).offset
    gap = float((scores - expected).abs().max())
    exact = backbone.base.dtype == torch.float32
    if gap > (_RELOAD_TOLERANCE if exact else _RELOAD_TOLERANCE_HALF):
        raise RuntimeError(f"the saved reward model scores differently when loaded again (by {gap:.2g})")
    return gap


def _report(results: dict[str, Any], held_out: list[Comparison]) -> None:
    def shown(name: str) -> str:
        figure = results[name]
        low, high = figure["ci95"] or (float("nan"), float("nan"))
        return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"

    line = f"reward: held-out pair accuracy {shown('held_out_accuracy')} on {len(held_out)} comparisons"
    if "probe_accuracy" in results:
        line += f"; linear probe on frozen features {shown('probe_accuracy')}"
    if "noise_ceiling" in results:
        line += f"; noise ceiling of the labels {shown('noise_ceiling')}"
    print(line, flush=True)
