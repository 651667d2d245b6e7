"""Draw docs/results/sentiment.png from the first table of docs/results.md: `python docs/results/plot.py`."""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROW = re.compile(r"\| `make rlhf.*?` \|.*?\|.*?\| (\S+) \| (\S+) \| (\S+) \[(\S+), (\S+)\]")

page = (HERE.parent / "results.md").read_text(encoding="utf-8")
rows = [tuple(map(float, row)) for row in ROW.findall(page)[:3]]
before, after, gain, low, high = zip(*rows, strict=True)
figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
places = range(len(rows))
reach = [[g - a for g, a in zip(gain, low, strict=True)], [b - g for g, b in zip(gain, high, strict=True)]]
axes.bar([x - 0.2 for x in places], before, 0.38, color="#b8bec7", label="before PPO")
axes.bar([x + 0.2 for x in places], after, 0.38, color="#2a6fbb", label="after PPO")
axes.errorbar(
    [x + 0.2 for x in places], after, reach, fmt="none", color="black", capsize=4, label="95% of the gain"
)
axes.set_xticks(places, [f"seed {x}" for x in places])
axes.set(ylabel="gold score (VADER)", ylim=(0, 1))
axes.legend(frameon=False, ncols=3, loc="upper left", fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(HERE / "sentiment.png", dpi=120, metadata={"Software": None})
