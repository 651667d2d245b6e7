"""How fast this machine multiplies matrices, by type, and which types its device has units for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rlhf.errors import UserError
from rlhf.models.kernels.onednn import linear

_SECONDS = 0.25  # of a measurement
_FASTER = 1.5  # times, in this product, before bfloat16 is worth its rounding: the rest of a pass gains less
_LARGEST = 1 << 23  # numbers of the matrix that is measured


def check_dtype(dtype: str) -> None:
    """Refuse a type for which the GPU has no units, in which torch would stop in the middle or crawl.

    Raises:
        UserError: and what to use; or it is still to be chosen (:func:`rlhf.runs.dtype.settled`).
    """
    if dtype == "auto":
        raise UserError("model.dtype: auto is chosen by a stage when it starts; outside of one name a type")
    if dtype == "bfloat16" and not has_bfloat16():
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        raise UserError(
            f"model.dtype: bfloat16 needs a GPU of compute capability 8.0, and {name} has {major}.{minor}: "
            "use float16, float32 or auto"
        )


def has_bfloat16() -> bool:
    """Whether the device of this process multiplies bfloat16 matrices itself; a CPU always does somehow."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def fastest_dtype(width: int, inner: int) -> tuple[str, str]:
    """`bfloat16` where the device multiplies a layer's matrix clearly faster in it, else `float32`.

    Args:
        width: hidden units of the model.
        inner: hidden units of its feed-forward layers.

    Returns:
        The type, and in words the two figures that it was chosen by, after half a second.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not has_bfloat16():
        return "float32", f"{torch.cuda.get_device_name()} has no units for bfloat16"
    rows, inner = (2048 if device.type == "cuda" else 128), min(inner, max(1, _LARGEST // width))
    exact, half = (product_rate(kind, rows, width, inner, device) for kind in (torch.float32, torch.bfloat16))
    dtype = "bfloat16" if half >= _FASTER * exact else "float32"
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    product = f"{rows} x {width} by {width} x {inner}"
    return dtype, f"{half:.0f} GFLOP/s in bfloat16, {exact:.0f} in float32 ({product}, {where})"


def product_rate(dtype: torch.dtype, rows: int, width: int, inner: int, device: torch.device) -> float:
    """Rate of ``x W^T``, x [rows, width] and W [inner, width], by the kernels of a forward pass, GFLOP/s.

    The fastest of the products that fit into a quarter of a second, so that a busy moment does not count.
    """
    x, weight = (  # no random numbers: they belong to the stages
        torch.linspace(-1, 1, n * width, device=device).sin().view(n, width).to(dtype) for n in (rows, inner)
    )
    product: Callable[..., torch.Tensor] = linear if dtype == torch.float32 else F.linear
    best, begun = float("inf"), time.perf_counter()
    with torch.no_grad():
        product(x, weight)  # kernels are chosen or made at the first call
        while best == float("inf") or time.perf_counter() - begun < _SECONDS:
            _wait(device)
            start = time.perf_counter()
            product(x, weight)
            _wait(device)
            best = min(best, time.perf_counter() - start)
    return 2e-9 * rows * width * inner / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
