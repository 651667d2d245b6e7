"""What a program in the sandbox may use, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

STATUSES = ("passed", "failed", "timed out", "out of memory", "killed")


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: float = 3.0
    """Processor time of each process, in whole seconds, rounded up (3.0 in openai/human-eval)."""
    wall_seconds: float = 30.0
    """Time on the clock; long, so that a busy machine does not change a verdict."""
    memory_bytes: int = 512 << 20
    """Address space of each process."""
    file_bytes: int = 4 << 20
    """Largest file."""
    folder_bytes: int = 16 << 20
    """All files together."""
    processes: int = 1
    """Processes and threads at once, the program included."""
    open_files: int = 64
    """Open files of each process."""
    output_bytes: int = 1 << 20
    """What may be printed."""


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    status: str
    """One of :data:`STATUSES`; ``passed`` when the last line was reached."""
    detail: str = ""
    """Name of the exception or signal, or which limit it was."""
    output: str = field(default="", compare=False)
    """The first 4096 bytes of what it printed, and of the text of its exception."""
    cpu_seconds: float = field(default=0.0, compare=False)
    """Processor time of its first process."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end without an exception."""
        return self.status == "passed"
