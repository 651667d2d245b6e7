"""The processes of a stage that only measures: each does its share, and the first one goes on with all of it.

The work is dealt in the pieces in which one process would do it (a batch, a chunk, a model), so that the
figures are the same bits, whatever the number of processes.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from rlhf.recipe.schema import Distributed
from rlhf.runs.processes import RENDEZVOUS, processes, rank

T = TypeVar("T")


def join(section: Distributed) -> None:
    """Join the processes of the launcher; nothing to do for one alone."""
    if processes() == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:  # they share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes()))
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=section.timeout_minutes))


def own(pieces: Sequence[T]) -> Sequence[T]:
    """This process's pieces of the work."""
    return pieces[rank() :: processes()]


def together(done: Sequence[T]) -> list[T]:
    """What all processes made of their :func:`own` pieces, in the order of the pieces. All must call it."""
    if processes() == 1:
        return list(done)
    parts: list[list[T]] = [[] for _ in range(processes())]
    dist.all_gather_object(parts, list(done))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def leave() -> None:
    """End all processes but the first, which goes on as the only one. All must call it.

    Raises:
        SystemExit: with status 0, on the others.
    """
    if processes() == 1:
        return
    dist.barrier()  # what they wrote is on the disk
    dist.destroy_process_group()
    if rank() > 0:
        raise SystemExit(0)
    for name in (*RENDEZVOUS, "LOCAL_RANK"):
        os.environ.pop(name, None)
