"""Token rows folded into trees, so that what rows have in common is computed once.

A tree holds the tokens of several rows; rows that begin alike share nodes. A token may look at its ancestors
only, so its hidden state is the one it would have in a row of its own. Nodes stand in preorder: the
descendants of a node are the ones between it and its ``end``.

Shape suffixes: ``_R`` tree, ``_W`` node of a tree, ``_N`` node of any tree, ``_S`` place that is read,
``_D`` hidden unit, ``_V`` vocabulary entry, ``_C`` place of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tree:
    """Rows with their common beginnings folded together."""

    tokens: list[int] = field(default_factory=list)
    """Token of every node."""
    depths: list[int] = field(default_factory=list)
    """Number of a node's ancestors in the tree."""
    ends: list[int] = field(default_factory=list)
    """Index behind a node's last descendant."""
    paths: dict[int, list[int]] = field(default_factory=dict)
    """Number of a row -> the nodes of its tokens."""


def fold(rows: Sequence[Sequence[int]], capacity: int) -> list[Tree]:
    """Fold rows into trees of at most ``capacity`` nodes; a longer row has a tree of its own.

    Rows are taken in lexicographic order, in which the row before has the longest common beginning of all.
    """
    trees: list[Tree] = []
    path: list[int] = []
    before: Sequence[int] = ()
    for number in sorted(range(len(rows)), key=lambda i: list(rows[i])):
        row = rows[number]
        same = _common(before, row)
        if not trees or len(trees[-1].tokens) + len(row) - same > capacity:
            if trees:
                _close(trees[-1], path)
            trees.append(Tree())
            path, same = [], 0
        tree = trees[-1]
        _close(tree, path[same:])
        path = [*path[:same], *range(len(tree.tokens), len(tree.tokens) + len(row) - same)]
        tree.tokens += row[same:]
        tree.depths += range(same, len(row))
        tree.ends += [0] * (len(row) - same)
        tree.paths[number] = path
        before = row
    if trees:
        _close(trees[-1], path)
    return trees


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with: that is what the first and the last in lexicographic order share."""
    if not rows:
        return []
    first, last = min(map(list, rows)), max(map(list, rows))
    return list(first[: _common(first, last)])


def _common(x: Sequence[int], y: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))


def _close(tree: Tree, nodes: Sequence[int]) -> None:
    for node in nodes:
        tree.ends[node] = len(tree.tokens)


def lay_out(
    trees: Sequence[Tree], cached: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Trees as one batch behind ``cached`` positions that every token may look at.

    Returns ids_RW, positions_RW and an additive mask [R, 1, W, cached + W] in ``dtype``, 0 = may look, else
    the lowest number. A node looks at what is cached, at its ancestors and at itself; padding too, so that no
    row of the mask is all closed.
    """
    width = max(len(tree.tokens) for tree in trees)
    ids_RW = torch.zeros(len(trees), width, dtype=torch.long)
    positions_RW = torch.zeros_like(ids_RW)
    ends_RW = torch.arange(1, width + 1).repeat(len(trees), 1)
    for r, tree in enumerate(trees):
        n = len(tree.tokens)
        ids_RW[r, :n] = torch.tensor(tree.tokens)
        positions_RW[r, :n] = torch.tensor(tree.depths) + cached
        ends_RW[r, :n] = torch.tensor(tree.ends)
    node_W = torch.arange(width, device=device)
    query_W1, key_1W, ends_R1W = node_W[:, None], node_W[None], ends_RW.to(device)[:, None]
    may_RWW = (key_1W <= query_W1) & (query_W1 < ends_R1W)
    mask = torch.zeros(len(trees), 1, width, cached + width, dtype=dtype, device=device)
    mask[:, 0, :, cached:].masked_fill_(~may_RWW, torch.finfo(dtype).min)
    return ids_RW.to(device), positions_RW.to(device), mask


def target_log_probs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], node_S: Tensor, target_S: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of target tokens after nodes, and whether each is the most probable one.

    hidden_ND: state of every node. node_S: the node before each target; several places may read one node,
    which meets the vocabulary head once. head: maps states [C, D] to logits [C, V], ``chunk`` nodes at a
    time. Returns float32 logp_S = log softmax(logits)[target] and bool best_S (of equal logits the first
    counts).
    """
    unique_U, at_S = torch.unique(node_S, return_inverse=True)
    logp_S = torch.zeros(len(node_S), device=hidden_ND.device)
    best_S = torch.zeros(len(node_S), dtype=torch.bool, device=hidden_ND.device)
    for start in range(0, len(unique_U), chunk):
        logits_CV = head(hidden_ND[unique_U[start : start + chunk]]).float()
        mine_S = (at_S >= start) & (at_S < start + chunk)
        row_C, target_C = at_S[mine_S] - start, target_S[mine_S]
        logp_S[mine_S] = logits_CV[row_C, target_C] - logits_CV.logsumexp(-1)[row_C]
        best_S[mine_S] = logits_CV.argmax(-1)[row_C] == target_C
    return logp_S, best_S
