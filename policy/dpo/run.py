"""The work of the DPO stage: pairs, the reference's log-probabilities, training, held-out pairs, saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policy.dpo.data import encode
from policy.dpo.trainer import new_trainer
from rlhf.data.comparisons import Counts, drawn
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.markdown import percent, plain
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Dpo
from rlhf.runs.folder import StageFolder
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.processes import check_rows, processes
from rlhf.stats import clustered
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.hf_trainer import adapted_base, save_policy


def fit(recipe: Recipe, section: Dpo, run: StageFolder) -> dict[str, Any]:
    """Train a policy's adapter on the run's comparisons; returns the figures for the manifest.

    Raises:
        UserError: there is no pair to learn, or the training failed.
    """
    dialogue, counts = load_dialogue(recipe), Counts()
    folder = run.parent("comparisons")
    train, held_out = (
        list(read_native(folder / f"{part}.jsonl", "stop", counts)) for part in ("train", "held_out")
    )
    train = drawn(train, section.limit, recipe.seed)
    held_out = drawn(held_out, min(section.eval_samples, len(held_out)), recipe.seed)
    pairs, same = encode(train, dialogue, section.pairs)
    others, _ = encode(held_out, dialogue, section.pairs)
    run.say(
        f"dpo: {len(pairs)} pairs of {len(train)} comparisons to learn, {len(others)} pairs held out"
        + (f"; {same} pairs left out, equal up to dialogue.max_response_tokens" if same else "")
    )
    if not pairs:
        raise UserError(
            f"dpo: {folder / 'train.jsonl'} has no pair of different responses; raise "
            "dialogue.max_response_tokens, or give other comparisons"
        )
    check_rows("dpo", len(pairs))
    backbone = adapted_base(recipe, "dpo", start_folder(recipe, run, "dpo"), run.say)
    trainer = new_trainer(
        recipe, section, dialogue, backbone, pairs, others, folder=run.folder, on_checkpoint=run.note_clock
    )
    trainer.refer_to(*run.remember("reference", lambda: trainer.log_probs(pairs)))
    before = run.remember("held_out", lambda: trainer.log_probs(others))
    trainer.fit()
    figures = judged(before, trainer.log_probs(others), [pair["index"] for pair in others], section.beta)
    save_policy(backbone, dialogue, run)
    run.say(
        f"dpo: held-out pairs in the right order {percent(figures['held_out_accuracy'])}, margin "
        f"{plain(figures['held_out_margin'], '.3f')}, loss {plain(figures['held_out_loss'], '.3f')} (0.693 "
        "at the start)"
    )
    return figures | {
        "pairs": len(pairs),
        "same": same,
        "held_out_pairs": len(others),
        "comparisons": len(train),
        "processes": processes(),
        "counts": counts.as_dict(),
    }


def margins(policy: Sequence[ArrayLike], reference: Sequence[ArrayLike], beta: float) -> NDArray[np.float64]:
    """Implicit reward of the chosen response less that of the rejected, [B].

    The implicit reward is beta log(policy / reference) (Rafailov 2023, eq. 5, up to what depends on the
    prompt alone); the loss of a pair is -log sigmoid(margin) (eq. 7).

    policy, reference: log-probabilities (chosen, rejected), nats, [B] each.
    """
    (c, r), (ref_c, ref_r) = (map(np.asarray, side) for side in (policy, reference))
    return np.asarray(beta * ((c - ref_c) - (r - ref_r)), dtype=np.float64)


def judged(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], clusters: Sequence[int], beta: float
) -> dict[str, Any]:
    """Held-out pairs by the implicit reward: share in the right order, margin, loss; intervals by comparison.

    before, after: log-probabilities (chosen, rejected) by reference and policy, nats.

    Raises:
        UserError: one is not finite, after a training that went wrong.
    """
    margins_B = margins(after, before, beta)
    if not np.isfinite(margins_B).all():
        raise UserError(
            "dpo: the held-out margins are not finite: the training failed; lower dpo.learning_rate, or look "
            "at metrics.jsonl"
        )
    won_B = 0.5 * (np.sign(margins_B) + 1)
    lost_B = np.logaddexp(0, -margins_B)
    return {
        "held_out_accuracy": clustered.share(won_B, clusters).as_dict(),
        "held_out_margin": clustered.mean(margins_B, clusters).as_dict(),
        "held_out_loss": clustered.mean(lost_B, clusters).as_dict(),
        "start_loss": math.log(2),
    }
