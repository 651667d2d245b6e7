"""The page of the gold comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.gold.figures import GAIN
from benchmarks.gold.plan import GENERATIONS, PEERS
from benchmarks.harness import Figures
from benchmarks.report import heading
from rlhf.markdown import table

LABELS = {
    "ours": "ours",
    "ppo": "PPOTrainer, trl 1.12.0",
    "rloo": "RLOOTrainer",
    "grpo": "GRPOTrainer",
}
MEANS = {
    "gold": "gold, equal samples",
    "kl": "KL, nats",
    "gold_per_nat": "gold gained a nat of KL",
    "gold_at_time": "gold, equal wall time",
    "seconds": "training, s",
}
NOTES = [
    "The same on all sides: base, LoRA shape and layers, prompts, reward model, number of responses, "
    "optimizer steps and passes, length, temperature, learning rate of the policy and its schedule, epsilon "
    "of AdamW, price of KL, type of the base's weights (adapters and heads are float32), seed. The order of "
    "the prompts and the random numbers of sampling in training are each side's own.",
    f"Ours and PPOTrainer sample one response to a prompt, RLOO and GRPO {GENERATIONS}, whose mean is their "
    "baseline: as many responses, to a fourth of the prompts.",
    "KL is in the reward of ours and PPOTrainer token by token, in that of RLOO summed over the response, "
    "and in the loss of GRPO (k3). Loss, scaling of rewards and all else that the recipe has no word for are "
    "trl's defaults.",
    "PPOTrainer clips no norm of gradients, the others do, and has one learning rate for policy and value: "
    "the policy's. Its value is the merged reward model with an adapter of the same shape.",
    "The reward model reads its score on EOS, so a response that was cut at the limit is scored with EOS "
    "behind it on all sides, and none is masked. RLOO and GRPO give it the response as text, ours and "
    "PPOTrainer as tokens. PPOTrainer reads it merged into the base in float32, and as an adapter else.",
    "All policies answer the held-out prompts by one sampler with the same random numbers; KL(policy || "
    "reference) is measured on these answers by the same code.",
    "Seconds are those of training: without loading, writing adapters and judging, beside whatever else ran "
    "on the machine. Equal wall time is the time of the side that ended first, seed by seed; a side counts "
    "as it was at its last mark until then, and before its first one as the reference.",
    "Intervals are 95%: over seeds by Student's t; by prompt over all prompts of all seeds, which takes the "
    "seeds for given and says nothing about others. A difference is decided where both leave out 0; seeds "
    "are few.",
]


def _number(found: Figures | None, digits: int = 3) -> str:
    if found is None or found["mean"] is None:
        return ""
    text = f"{found['mean']:.{digits}f}"
    ends = found["ci95"]
    return text if ends is None else f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _digits(measure: str) -> int:
    return {"kl": 2, "seconds": 0}.get(measure, 3)


def _reached(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.0f} s"


def notes_of(sides: Sequence[str]) -> list[str]:
    """The notes of a page with these sides: without those on peers that are not there."""
    changed = [
        "Sides that are named by options are ours with these options; the options named are not the same on "
        "all sides."
    ]
    variants = any(side not in LABELS for side in sides)
    return [*(changed if variants else []), *(NOTES if _has_peers(sides) else [NOTES[0], *NOTES[-3:]])]


def _has_peers(sides: Iterable[str]) -> bool:
    return not {*PEERS}.isdisjoint(sides)


def markdown(report: Figures) -> str:
    """The report as a page."""
    work, sides = report["work"], report["sides"]
    trl, other = (", against trl", "theirs") if _has_peers(sides) else ("", "the other")
    rows = [
        [LABELS.get(name, name), *(_number(side[m], _digits(m)) for m in MEANS),
         ", ".join(map(_reached, side["seconds_to_gain"]["by_seed"]))]
        for name, side in sides.items()
    ]  # fmt: skip
    differences = [
        [
            LABELS.get(peer, peer),
            MEANS[m],
            *(_number(found[unit], _digits(m)) for unit in ("by_seed", "by_prompt")),
            found["verdict"],
        ]
        for peer, measures in report["differences"].items()
        for m, found in measures.items()
    ]
    seeds = report["seeds"]
    return "\n".join(
        [
            *heading(f"Gold reward at equal samples and at equal wall time{trl}", report),
            f"{work['responses']} responses on each side ({work['steps']} steps of {work['batch']}), base in "
            f"{report['dtype']}, seeds {', '.join(map(str, seeds))}; {report['prompts']} held-out prompts, "
            f"judged by {report['judge']}. The reference has {_number(report['reference'])}.\n",
            "Means over seeds:\n",
            table(("policy", *MEANS.values(), f"to +{GAIN} gold, by seed"), rows),
            f"Ours less {other}, the same prompts:\n",
            table((other, "figure", "by seed", "by prompt", "ours is"), differences),
            *(f"- {note}" for note in report["notes"]),
            "",
        ]
    )
