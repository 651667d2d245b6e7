"""The memory that there is: a GPU's as it is told or found, else this machine's."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rlhf.errors import UserError
from rlhf.training.hosts import read_hosts

_CARD = 2**30 / 1e9  # a card sold as 24 GB has 24 GiB; CUDA's context and gaps take the difference
_UNITS = {"": 1.0, "M": 1e6, "MI": 2**20, "G": 1e9, "GI": 2**30, "T": 1e12, "TI": 2**40}


class Machine(NamedTuple):
    """What a run has."""

    gpu: bool
    bytes: float
    """Memory of a process: of its GPU, or its share of the machine's."""
    processes: int
    """On a machine."""
    nodes: int
    words: str
    """For the report."""
    elsewhere: bool = False
    """A GPU that ``GPU`` speaks of, whatever is here."""
    total: int | None = None
    """Processes of the run, where machines have unequal numbers: ``processes`` is the largest of them."""

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.total or self.processes * self.nodes


def machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """What ``GPU``, ``PROCS`` and ``NODES`` say, else what is here.

    ``GPU`` is the memory of one card, such as ``24GB`` (10^9 bytes; of a card's 24 GiB the rest is left for
    CUDA's context), or ``none`` for the CPU. ``PROCS`` is the number of processes on a machine. ``HOSTFILE``
    says both numbers; of unequal machines the one with most processes counts.

    Raises:
        UserError: one of them is no such value, or says again what the hostfile says.
    """
    given = environment.get("GPU", "").strip()
    cards = [] if given else gpu_bytes()
    if environment.get("HOSTFILE"):
        again = [name for name in ("PROCS", "NODES") if environment.get(name, "").strip()]
        if again:
            raise UserError(f"{again[0]}: the hosts and slots of HOSTFILE say it; leave {again[0]} out")
        slots = [host.slots for host in read_hosts(environment["HOSTFILE"])]
        nodes, processes, total = len(slots), max(slots), sum(slots)
    else:
        total = None
        nodes = _number(environment, "NODES") or 1
        processes = _number(environment, "PROCS") or len(cards) or 1
    each = f"{processes} process{'es' if processes > 1 else ''}"
    each += f" on each of {nodes} machines" if nodes > 1 else ""
    each += f" at most, {total} in all" if total and total != nodes * processes else ""
    if given and given.lower() not in ("none", "cpu"):
        return Machine(
            True, size_of(given, "GPU"), processes, nodes, f"a GPU of {given}, {each}", True, total
        )
    if cards:
        words = f"a GPU here of {min(cards) / 2**30:.0f} GiB, {each}"
        return Machine(True, min(cards) / _CARD, processes, nodes, words, total=total)
    here = ram()
    share = "" if processes == 1 else f", {here / processes / 1e9:.1f} GB a process"
    words = f"{here / 1e9:.1f} GB of memory, {each}{share}"
    return Machine(False, here / processes, processes, nodes, words, total=total)


def size_of(text: str, name: str) -> float:
    """Bytes of a size such as 24GB, 80GiB or 25769803776.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS.get(found[2].upper(), 0.0) if found else 0.0
    if size < 1e6:
        raise UserError(f"{name}={text[:40]}: write a size of memory, such as {name}=24GB")
    return size


def ram() -> float:
    """Bytes of this machine's memory, or of the limit of the control group that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return float(total)


def gpu_bytes() -> list[int]:
    """Bytes of each visible GPU, none where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\s*[^-\s]", visible):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    query += [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) << 20 for line in done.stdout.split() if line.isdigit()]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 4097):
        raise UserError(f"{name}={text[:40]} must be a number from 1 to 4096")
    return int(text)
