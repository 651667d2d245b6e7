"""The policy that the test model finds best, kept while PPO goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save
from torch import Tensor

from rlhf.runs.artifacts import read_json, write_atomically, write_json
from rlhf.stats.intervals import Z95
from rlhf.stats.overoptimization import WINDOW

Tensors = dict[str, Tensor]
_HALF = WINDOW // 2
_WEIGHTS, _STATE = "best.safetensors", "best.json"


class Kept(NamedTuple):
    """A policy."""

    step: int
    """Its rollout's, counted from 1; it had one update less."""
    bound: float
    """Of its test score: the lower end of a 95% interval of the mean over the rollouts around it."""
    tensors: Tensors


class BestPolicy:
    """Chooses among the policies that wrote the rollouts.

    A policy counts as good as the mean test score of the five rollouts around its own, less 1.96 standard
    errors, so that neither one lucky rollout nor the few at the start decide. The policies whose rollouts are
    not all there yet wait.
    """

    def __init__(self) -> None:
        self.best: Kept | None = None
        self.waiting: dict[int, Tensors] = {}
        self.scores: list[tuple[float, float]] = []

    def sampled(self, tensors: Tensors) -> None:
        """Note the policy that samples the next rollout."""
        self.waiting[len(self.scores) + 1] = tensors

    def judged(self, score: float, error: float) -> None:
        """Note what the test model gave that rollout."""
        self.scores.append((score, 0.0 if math.isnan(error) else error))
        self.best = self._better(len(self.scores) - _HALF)
        self.waiting = {n: tensors for n, tensors in self.waiting.items() if n > len(self.scores) - _HALF}

    def chosen(self) -> Kept:
        """The best of all, the last ones by the rollouts that there are."""
        best = self.best
        for step in [n for n in self.waiting if n <= len(self.scores)]:
            best = self._better(step, best)
        assert best is not None, "a rollout was judged"
        return best

    def save(self, folder: Path) -> None:
        """Write what a checkpoint keeps."""
        kept = self.waiting | ({self.best.step: self.best.tensors} if self.best else {})
        flat = {
            f"{step}:{name}": tensor for step, tensors in kept.items() for name, tensor in tensors.items()
        }
        write_atomically(folder / _WEIGHTS, save(flat))
        best = [self.best.step, self.best.bound] if self.best else None
        write_json(folder / _STATE, {"best": best, "waiting": [*self.waiting], "scores": self.scores})

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint; FileNotFoundError where it has none."""
        kept: dict[int, Tensors] = {}
        for name, tensor in load_file(folder / _WEIGHTS).items():
            step, _, own = name.partition(":")
            kept.setdefault(int(step), {})[own] = tensor
        state = read_json(folder / _STATE)
        self.scores = [(score, error) for score, error in state["scores"]]
        self.waiting = {step: kept[step] for step in state["waiting"]}
        self.best = None
        if state["best"]:
            step, bound = state["best"]
            self.best = Kept(step, bound, kept[step])

    def _better(self, step: int, best: Kept | None = None) -> Kept | None:
        best = best or self.best
        if step < 1:
            return best
        around = self.scores[max(0, step - 1 - _HALF) : step + _HALF]
        mean = sum(score for score, _ in around) / len(around)
        bound = mean - Z95 * math.sqrt(sum(error * error for _, error in around)) / len(around)
        return Kept(step, bound, self.waiting[step]) if best is None or bound > best.bound else best
