"""A peer's release in a folder of its own, beside the packages that both sides share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import UserError

FOLDER = Path(".stamps")


def peer_folder(package: str, version: str, root: Path = FOLDER) -> Path:
    """The folder of a release, installed without its dependencies if it is not there yet.

    Args:
        package: its name.
        version: its exact version.
        root: where such folders are kept.

    Returns:
        Its absolute path, to stand first on the ``PYTHONPATH`` of the peer's process alone.

    Raises:
        UserError: it cannot be installed, as without a network.
    """
    folder = root.absolute() / f"{package}-{version}"
    if (folder / f"{package}-{version}.dist-info").is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", scratch]
        command = [sys.executable, "-m", "pip", *words, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(
                f"{package}=={version}, which this benchmark compares with, cannot be installed ({last}); "
                "run it once with a network, later runs need none"
            )
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch).rename(folder)
        Path(scratch).mkdir()  # what the context manager removes
    return folder


def with_peer(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """An environment in which a peer's folder comes before every installed package."""
    rest = os.environ.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(folder), *([rest] if rest else [])])}
