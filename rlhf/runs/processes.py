"""Which process of how many this is: from the launcher's environment, completed or refused.

The DeepSpeed launcher, torchrun and Kubernetes' training operators set ``WORLD_SIZE``, ``RANK``,
``MASTER_ADDR`` and ``MASTER_PORT``; a step of Slurm (``srun``) sets names of its own. A few of them left over
from a cluster's job are refused: collective calls would wait for processes that nobody started.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import MutableMapping

from rlhf.errors import UserError

SHARED = ("sft", "distill", "pmp", "reward", "ppo", "dpo")  # the stages that several processes train
MEASURED = ("card", "evaluate", "evaluate_dpo", "tax")  # and those of which each measures a share
RENDEZVOUS = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_UNSET = f"env -u {' -u '.join((*RENDEZVOUS, 'LOCAL_RANK'))}"


def rank() -> int:
    """This process's number among those of the launcher; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@functools.cache
def print_once(line: str) -> None:
    """Print a line, on the first process and at its first call alone."""
    if rank() == 0:
        print(line, flush=True)


def processes() -> int:
    """Number of processes of the launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def adopt_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Complete the launcher's variables in place, so that all libraries count the same processes.

    Raises:
        UserError: some are set and others are missing, or one is no number.
    """
    _adopt_slurm(environment)
    found = {name: environment[name] for name in RENDEZVOUS if environment.get(name)}
    world = _number(environment, "WORLD_SIZE", 1)
    position = _number(environment, "RANK", 0)
    if world <= 1 and position == 0:
        return
    missing = [name for name in RENDEZVOUS if name not in found]
    if missing:
        given = " ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"the environment has {given} but not {' '.join(missing)}: set all of {' '.join(RENDEZVOUS)} "
            f"to join the processes of a cluster, or clear them for a run of its own: {_UNSET} make ..."
        )
    if position >= world:
        raise UserError(f"RANK={position} must be below WORLD_SIZE={world}")
    local = _number(environment, "LOCAL_WORLD_SIZE", 1)
    environment.setdefault("LOCAL_RANK", str(position % local))


def check_alone(stage: str) -> None:
    """Refuse several processes for a stage that has work for one.

    Raises:
        UserError: the launcher started more than one.
    """
    if processes() > 1 and stage not in (*SHARED, *MEASURED):
        raise UserError(
            f"{stage} runs in one process, and the environment has WORLD_SIZE={processes()}: "
            f"start it once, with {_UNSET} make {stage} ..."
        )


def check_rows(stage: str, rows: int) -> None:
    """Refuse more processes than a stage has rows to train on, which would all repeat the same few.

    Raises:
        UserError: names both numbers.
    """
    if rows < processes():
        raise UserError(
            f"{stage}: {processes()} processes and only {rows} rows to train on: use PROCS={max(1, rows)} "
            "or more data"
        )


def _number(environment: MutableMapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text[:40]!r} in the environment is no number; clear it: {_UNSET} make ...")
    return int(text) if text else default


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """The variables of ``srun`` with several tasks; a batch script or one task is no such step."""
    if "WORLD_SIZE" in environment or _number(environment, "SLURM_STEP_NUM_TASKS", 1) <= 1:
        return
    first = re.match(r"[^\[,]+(?:\[\d+)?", environment.get("SLURM_STEP_NODELIST", ""))
    host = environment.get("SLURM_LAUNCH_NODE_IPADDR") or (
        first[0].replace("[", "") if first else "127.0.0.1"
    )
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment.get("SLURM_PROCID", "0")
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_ADDR", host)
    # the same port in all tasks, another one for another job
    environment.setdefault("MASTER_PORT", str(20000 + _number(environment, "SLURM_JOB_ID", 0) % 10000))
