"""Parts of the training comparisons that a model does not learn from.

The test part is for a second reward model, which PPO is never rewarded by (Bai 2022, section 4.3).

The validation part is for early stopping: it says which step is kept.

At a few steps of a training the model is judged on that part; its adapter and head are kept in a file, so
that a killed and resumed training chooses from the same, bit for bit. They are written before the checkpoint
of the same step, and those behind the newest checkpoint are made anew.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward.loss import pair_accuracy, ranked_loss
from reward.model.batch import Example, group_of, layout
from rlhf.data.split import connected, split_by_hash
from rlhf.errors import UserError
from rlhf.runs.artifacts import read_json, write_atomically, write_json
from rlhf.runs.processes import processes, rank
from rlhf.training.runtime import gathered


def keep_out(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training rows and, of about ``share`` of their groups (else prompts), those that are kept out.

    Raises:
        UserError: there is only one group.
    """
    if not share:
        return list(rows), []
    groups = list(dict.fromkeys(group_of(row) for row in rows))
    if len(groups) < 2:
        raise UserError(
            "reward.validation: all training comparisons have one prompt or group, so none can be kept out; "
            "set it to 0"
        )
    random.Random(seed).shuffle(groups)
    out = set(groups[: min(len(groups) - 1, max(1, round(share * len(groups))))])
    return [r for r in rows if group_of(r) not in out], [r for r in rows if group_of(r) in out]


def part_for_test(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Rows of the reward model and, about ``share``, of the test model; no prompt or group is in both.

    The part of a prompt with its groups follows from a hash, as that of the held-out comparisons does.

    Raises:
        UserError: all comparisons are connected by prompts and groups.
    """
    if not share:
        return list(rows), []
    names = [
        [f"prompt:{row['prompt']}", *([f"group:{row['group']}"] if row["group"] else [])] for row in rows
    ]
    keys = connected(names)
    if len(set(keys)) < 2:
        raise UserError(
            "reward.test_share: all training comparisons have one prompt or group, so there is none to train "
            "a test model on; set it to 0"
        )
    most, number = Counter(keys).most_common(1)[0]
    numbered = list(zip(keys, rows, strict=True))
    trained = frozenset([most]) if number * 2 > len(keys) else frozenset[str]()
    parts = split_by_hash(numbered, lambda item: item[0], share, f"{seed}:test", trained)
    learned, apart = ([row for _, row in part] for part in parts)
    return learned, apart


class Validation(TrainerCallback):
    """Judges a model in training at a few steps, and puts the best one's weights back at the end.

    Args:
        rows: the comparisons that were kept out.
        folder: where weights and figures go.
        evaluations: how often, evenly spread, the last step included.
        say: prints a line.
    """

    def __init__(
        self, rows: Sequence[Example], folder: Path, evaluations: int, say: Callable[[str], None]
    ) -> None:
        self.rows, self._folder, self._evaluations, self._say = rows, folder, evaluations, say
        self.at: list[int] = []

    def begin(self, model: Any, steps: int, score: Callable[[Any], Tensor]) -> None:
        """What is judged in so many steps, and how the rows are scored, flat and in order."""
        self._model, self._score = model, score
        self.at = sorted({max(1, steps * (i + 1) // self._evaluations) for i in range(self._evaluations)})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer's call after each optimizer step, before it saves."""
        step = state.global_step
        if step not in self.at:
            return
        self._model.eval()
        with torch.no_grad():
            flat_BK, ranks_BK, mask_BK = layout(self.rows)
            scores_BK = self._score(self._model)[flat_BK]
            correct_B, pairs_B = pair_accuracy(scores_BK, ranks_BK, mask_BK)
            figures = {
                "step": step,
                "accuracy": float(correct_B.sum() / pairs_B.sum()),
                "loss": float(ranked_loss(scores_BK, ranks_BK, mask_BK)),
            }
        learning = self._learning()
        with gathered([*learning.values()], changed=False):
            if rank() == 0:
                whole = {n: p.detach().cpu().contiguous() for n, p in learning.items()}
                write_atomically(self._weights(step), save(whole))
                write_json(self._figures(step), figures)
        if processes() > 1:
            dist.barrier()
        self._say(
            f"validation after step {step} of {self.at[-1]}: pair accuracy {figures['accuracy']:.3f}, "
            f"loss {figures['loss']:.3f}, {len(self.rows)} comparisons"
        )

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Put the best weights back (by accuracy, then by loss, then the earliest); returns the figures."""
        table = [read_json(self._figures(step)) for step in self.at]
        best = max(table, key=lambda row: (row["accuracy"], -row["loss"]))
        saved, learning = load_file(self._weights(best["step"])), self._learning()
        with gathered([*learning.values()]):
            for name, parameter in learning.items():
                parameter.copy_(saved[name])
        self._say(f"kept step {best['step']} of {self.at[-1]}, the best on the validation part")
        return {"step": best["step"], "comparisons": len(self.rows), "evaluations": table}

    def _learning(self) -> dict[str, Any]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _weights(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}.safetensors"

    def _figures(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}.json"
