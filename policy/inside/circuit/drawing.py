"""A circuit as an SVG: layers from the bottom to the top, edges as wide as their share of the change."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from html import escape

_COLUMN, _ROW, _STEP, _MARGIN = 84, 56, 12, 48
_FOR, _AGAINST = "#2563eb", "#dc2626"  # blue: towards the first of a pair; red: against
_PARTS = ("KV", "H", "MLP")


def as_svg(edges: Sequence[tuple[str, str, float]], title: str, grouped: int) -> str:
    """The picture of these edges.

    Args:
        edges: writer, reader and share of the change.
        title: stands above it.
        grouped: query heads that read one key and value, to which gray lines lead from it.
    """
    drawn = [(writer, _node(reader), reader, share) for writer, reader, share in edges]
    nodes = {name for writer, node, *_ in drawn for name in (writer, node)}
    levels = [list(row) for _, row in itertools.groupby(sorted(nodes, key=_place), lambda n: _place(n)[0])]
    before = max((len(row) for row in levels), default=1)
    width, height = max(420, 2 * _MARGIN + (before + 2) * _COLUMN), 2 * _MARGIN + len(levels) * _ROW
    at = {
        node: (
            width - _MARGIN - _COLUMN * (1.5 + _left(row, node)),
            height - _MARGIN - _ROW * level - _up(node),
        )
        for level, row in enumerate(levels)
        for node in row
    }
    largest = max((abs(share) for *_, share in drawn), default=1) or 1
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{width / 2}" y="18" text-anchor="middle">{escape(title)}</text>',
    ]
    for key in (node for node in at if ".KV" in node):
        layer, group = key.split(".KV")
        heads = (f"{layer}.H{int(group) * grouped + n}" for n in range(grouped))
        lines += [_line(at[key], at[head], "#aaa", 1, f"{key} of {head}") for head in heads if head in at]
    for writer, node, reader, share in drawn:
        color, thick = (_FOR if share > 0 else _AGAINST), 0.5 + 5.5 * abs(share) / largest
        lines.append(_line(at[writer], at[node], color, thick, f"{writer} -> {reader}: {100 * share:+.1f}%"))
    for node, (x, y) in at.items():
        lines.append(
            f'<rect x="{x - 34:.1f}" y="{y - 10:.1f}" width="68" height="20" rx="5" fill="#f3f4f6" '
            f'stroke="#444"/><text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(node)}</text>'
        )
    return "\n".join([*lines, "</svg>\n"])


def _left(row: Sequence[str], node: str) -> int:
    """Columns from the right: MLPs have the last, heads and keys and values the ones before."""
    others = [name for name in row if not name.endswith("MLP")]
    return 1 + others[::-1].index(node) if _place(node)[1] in (0, 1) and "." in node else 0


def _up(node: str) -> int:
    """Of a layer's parts, those that come later stand higher."""
    return _STEP * _place(node)[1] if "." in node else 0


def _node(reader: str) -> str:
    """The component whose input a reader is."""
    return re.sub(r"\.[KV](?=\d)", ".KV", reader.replace(".Q", ".H"))


def _place(node: str) -> tuple[float, int, int]:
    """Layer, part of the layer, and number of a node."""
    found = re.fullmatch(r"L(\d+)\.(KV|H|MLP)(\d*)", node)
    if found is None:
        return (-1.0 if node == "embeddings" else float("inf"), 0, 0)
    return float(found[1]), _PARTS.index(found[2]), int(found[3] or 0)


def _line(start: tuple[float, float], end: tuple[float, float], color: str, width: float, label: str) -> str:
    (x, y), (x2, y2) = start, end
    middle, out = (
        (y + y2) / 2,
        min(_COLUMN, 0.2 * (y - y2)) if x == x2 else 0,
    )  # so that edges of a column stand apart
    ends = f"{x + out:.1f} {middle:.1f} {x2 + out:.1f} {middle:.1f} {x2:.1f} {y2 + 10:.1f}"
    path = f"M{x:.1f} {y - 10:.1f}C{ends}"
    return (
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:.2f}" stroke-opacity="0.7">'
        f"<title>{escape(label)}</title></path>"
    )
