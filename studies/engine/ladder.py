"""The sizes of the ladder's models, and what their work costs. No torch here.

Askell et al. 2021 (arXiv 2112.00861) keep width / layers = 128, so that the weight matrices of L layers are
12 * (128 L)^2 * L = 196,608 L^3 numbers; their smallest model, 13M, is L = 4.
"""

from __future__ import annotations

WIDTH_PER_LAYER = 128
HEAD_WIDTH = 64
WEIGHTS_OF_ONE_LAYER = 12 * WIDTH_PER_LAYER**2  # 196,608
TRAINING_TOKENS_A_SECOND = {1: 30_000, 2: 5_700, 3: 2_000}  # one thread of an AMD EPYC, AVX-512, float32
FORWARD_SPEEDUP = 3.0


def matrix_weights(layers: int) -> int:
    """N = 196,608 L^3: the weights in the matrices of the layers, by formula."""
    return WEIGHTS_OF_ONE_LAYER * layers**3


def seconds(layers: int, trained: float, read: float, overhead: float) -> float:
    """Expected seconds of a unit on an idle core: tokens trained on, and only read; L > 3 as L = 3."""
    speed = TRAINING_TOKENS_A_SECOND[min(layers, max(TRAINING_TOKENS_A_SECOND))]
    return overhead + trained / speed + read / (FORWARD_SPEEDUP * speed)
