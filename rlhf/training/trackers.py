"""Experiment trackers beside ``metrics.jsonl``, through accelerate: tensorboard, wandb, trackio."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from rlhf import NAME
from rlhf.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = NAME  # under which wandb and trackio file the runs


def start_trackers(names: Sequence[str], folder: Path, done: int) -> list[GeneralTracker]:
    """The trackers of one stage, started.

    Args:
        names: ``tensorboard`` (written to the stage's folder), ``wandb`` or ``trackio``, whose own
            environment variables decide on their servers (``WANDB_MODE=offline``).
        folder: the stage's directory, ``runs/<name>/<stage>``; both names call the run.
        done: steps finished before; tensorboard drops later ones of an interrupted run.

    Raises:
        UserError: there is no such tracker, or it is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: {name!r} is none of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; run `pip install {name}`")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    label = f"{folder.absolute().parent.name}-{folder.name}"
    found: list[GeneralTracker] = []
    for name in names:
        if name == "tensorboard":
            found.append(TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=done + 1))
        elif name == "wandb":
            found.append(WandBTracker(PROJECT, name=label, dir=str(folder)))
        else:
            found.append(TrackioTracker(PROJECT, name=label))
    for tracker in found:
        tracker.start()
    return found
