"""One machine of several: ``python -m rlhf.training.node``, which the launcher starts by ssh on each host.

A line of JSON on its standard input is a question, which it answers on its standard output, or a command that
it runs. The environment of the command comes the same way, so that no token stands in a list of processes. A
further letter (``s``), or the end of the input, as when the launcher or the connection is gone, asks the
command's processes to stop; ``k`` kills them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf.errors import exit_on_user_error
from rlhf.training.launch import free_port, launcher_of, run, visible_gpus

ALIKE = ("torch", "deepspeed", "transformers", "peft")


def answer(shared: str) -> dict[str, Any]:
    """What the launcher asks of a host.

    Args:
        shared: a file that the launcher has written, relative to the project's folder.

    Returns:
        ``token``: the file's content, None where it is not seen; ``devices``: names of the visible GPUs;
        ``gpus``: their number; ``port``: one that is free; ``versions``: of what all hosts must have alike.
    """
    gpus = visible_gpus(os.environ)
    file = Path(shared)
    token = file.read_text(encoding="utf-8") if file.is_file() else None
    versions = {"Python": platform.python_version(), **{name: version(name) for name in ALIKE}}
    return {
        "token": token, "devices": gpus, "gpus": len(gpus), "port": free_port(), "versions": versions,
    }  # fmt: skip


def main() -> None:
    """Answer, or run."""
    with open(0, "rb", buffering=0, closefd=False) as told:  # a buffer would take more than a line
        request = json.loads(told.readline())
    if "check" in request:
        print(json.dumps(answer(request["check"])), flush=True)
        return
    tools = os.path.dirname(sys.executable)
    environment = {**os.environ, **request["environment"]}
    environment["PATH"] = os.pathsep.join((tools, environment.get("PATH", os.defpath)))
    if not visible_gpus(os.environ):
        environment["DS_ACCELERATOR"] = "cpu"
    sys.exit(run(launcher_of(**request["run"]), environment, until=0))


if __name__ == "__main__":
    exit_on_user_error(main)
