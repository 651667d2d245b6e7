"""Updates that are not finite: skipped on every process, counted, their batch kept; too many end the run."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from policy.ppo.rollout import Rollout
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_atomically
from rlhf.training.runtime import Runtime


class BadUpdates:
    """Counts what could not be used.

    Args:
        folder: of the stage; batches go to ``bad_batches`` in it.
        runtime: the processes.
        limit: how many a run bears.
    """

    def __init__(self, folder: Path, runtime: Runtime, limit: int) -> None:
        self.folder = folder / "bad_batches"
        self.runtime, self.limit = runtime, limit
        self.count = 0

    def spoils(self, loss: Tensor, step: int, rollout: Rollout) -> bool:
        """Whether a loss is not finite on any process; then all gradients are dropped and it is counted."""
        if not self.runtime.any_process(not bool(loss.detach().isfinite())):
            return False
        self.runtime.discard_gradients()
        self.note(step, rollout, "a loss")
        return True

    def note(self, step: int, rollout: Rollout, what: str) -> None:
        """Count an update that was skipped and write its batch down.

        Raises:
            UserError: there have been too many.
        """
        self.count += 1
        file = self.folder / f"step-{step + 1:07d}-rank-{self.runtime.rank}.safetensors"
        tensors = {k: v.contiguous() for k, v in rollout._asdict().items() if isinstance(v, Tensor)}
        write_atomically(file, save(tensors))
        if self.count > self.limit:
            raise UserError(
                f"ppo: {what} was not finite {self.count} times (ppo.max_bad_updates is {self.limit}): "
                f"lower ppo.learning_rate; the batches are in {self.folder}"
            )
