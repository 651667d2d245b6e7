"""What must hold of the policies in `inside.others` before anything is asked. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.models.configuration import safetensors_header
from rlhf.runs.artifacts import WEIGHTS


def check_others(own: Path, others: Sequence[str]) -> None:
    """Compare policies with the run's own and with each other.

    own: folder of the run's policy. others: folders with adapters, as the recipe names them.

    Raises:
        UserError: one has other tensors than the run's own, or the weights of another one.
    """
    shapes, digest = _tensors(own / WEIGHTS)
    seen = {digest: f"of this run's own policy ({own})"}
    for folder in others:
        theirs, digest = _tensors(Path(folder) / WEIGHTS)
        for name in sorted(shapes.keys() | theirs.keys()):
            if shapes.get(name) != theirs.get(name):
                there, here = (str(x[name]) if name in x else "not there" for x in (theirs, shapes))
                raise UserError(
                    f"inside.others: {folder} does not fit this run's policy ({name} is {there}, in this run "
                    f"{here}): it was made with other lora settings or another base"
                )
        if digest in seen:
            raise UserError(
                f"inside.others: {folder} has the weights {seen[digest]}, and nothing lies between equal "
                "ones: name each policy once, and not this run's own"
            )
        seen[digest] = f"of {folder}"


def _tensors(file: Path) -> tuple[dict[str, Any], str]:
    """Shapes of a safetensors file's tensors by name, and one digest of their names, types and contents."""
    try:
        tensors, start = safetensors_header(file)
        content, digest = memoryview(file.read_bytes())[start:], hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            begin, end = tensor["data_offsets"]
            digest.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            digest.update(content[begin:end])
        return {name: tensor["shape"] for name, tensor in tensors.items()}, digest.hexdigest()
    except (ValueError, LookupError, TypeError):
        raise UserError(f"inside.others: {file} is no safetensors file; copy the adapter anew") from None
