"""gpu-check.md: a row a part, and the figures behind it."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Figures
from rlhf.markdown import table

_SIDES = ("side", "seconds a step", "sampled tokens/s", "trained tokens/s", "response tokens a step",
          "GPU memory, GB", "process, GB")  # fmt: skip
_MARK = {"passed": "passed", "failed": "**FAILED**", "skipped": "skipped"}


def plain(value: Any) -> str:
    """A figure in three digits, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def line(figures: Figures) -> str:
    """The figures of a part in one line."""
    words = []
    for name, value in figures.items():
        if value is None or isinstance(value, (dict, list)):
            continue
        if name.endswith("_bytes"):
            words.append(f"{name.removesuffix('_bytes')} {value / 1e9:.2f} GB")
        elif name == "flops_per_s":
            words.append(f"{value / 1e12:.2f} TFLOP/s")
        else:
            words.append(f"{name.replace('_', ' ')} {plain(value)}")
    return ", ".join(words)


def beside(parts: list[Figures]) -> list[str]:
    """A table of the sides that were timed beside each other, where there are any."""
    rows = [
        [f"{part['name']}: {side}", plain(found["s_per_step"]), plain(found["sampled_per_s"]),
         plain(found["trained_per_s"]), plain(found["response_tokens"]),
         *("" if found[key] is None else f"{found[key] / 1e9:.2f}" for key in ("gpu_bytes", "peak_bytes"))]
        for part in parts for side, found in part.get("figures", {}).get("sides", {}).items()
    ]  # fmt: skip
    return [table(_SIDES, rows)] if rows else []


def page(content: Figures) -> str:
    """The check as one Markdown page, from gpu-check.json."""
    rows = [
        [part["name"], part["what"], _MARK[part["state"]], part.get("why") or line(part.get("figures", {})),
         f"{part['seconds']:.0f}"]
        for part in content["parts"]
    ]  # fmt: skip
    counts = {state: sum(p["state"] == state for p in content["parts"]) for state in _MARK}
    cards = content["device"].get("cards") or []
    where = ", ".join(f"{c['name']} ({c['memory_gb']} GB)" for c in cards)
    where = where or f"no GPU, {content['device'].get('cpu', 'an unknown processor')}"
    versions = content["device"].get("versions", {})
    parts = [
        "# GPU check",
        f"`{content['command']}`, {content['date']}, {content['seconds'] / 60:.1f} min, on {where}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        ", ".join(f"{number} {state}" for state, number in counts.items()) + ".",
        table(["part", "what", "", "figures or reason", "seconds"], rows),
        *beside(content["parts"]),
        "Tiny random models but where a shape is named; losses are compared relative to the largest of them.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
