"""The PPO benchmark as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.markdown import table

NOTES = [
    "The same on both sides: base, float32, CPU and threads; LoRA rank, alpha and target modules; the "
    "prompts as token ids, all of them in every step; sampling from the whole distribution at temperature"
    " 1, a response ends at EOS or at the limit; batch, epochs, one minibatch an epoch; KL in the reward;"
    " penalty for a missing EOS; learning rate and epsilon of AdamW; versions of torch, transformers and "
    "peft.",
    "The value. Ours: a second LoRA adapter and a head on the one base. Theirs (PPOTrainer's own way): a "
    "model of its own, of which all weights learn; with --their-value lora it learns by an adapter like "
    "ours.",
    "The reward model. Both compute one with a fresh head. Ours: an adapter on the one base. Theirs: a "
    "model of its own.",
    "Only ours: log-probs of the sampled tokens taken once more in the training pass, checks of every "
    "rollout, and clipping of the gradient norm (PPOTrainer does not clip).",
    "Seconds a step: wall time from the end of one step to the end of the next; the first step of a run "
    "is left out. Memory: peak resident memory (VmHWM) of the child process, loading included.",
    "Responses are sampled, so their lengths differ a little between runs; tokens a second counts prompt "
    "and response tokens without padding, and by_token is the speed ratio with that difference taken out.",
    "score: everything between sampling and the first update. update: all epochs, and the log.",
    "micro_batch: responses that go through an update at once; it does not change the gradients of ours. "
    "Theirs generates and scores the whole batch at once.",
    "Share of the peak: operations that the step's matrix products need (benchmarks/ppo/work.py: linear "
    "maps, adapters, vocabulary head on response positions, real tokens only) a second, over the best of "
    "several products of two square float32 matrices, by BLAS or oneDNN, with the same threads.",
    "The reward reached at equal samples is not compared here.",
]

_COST = ("", "ours", "theirs", "theirs / ours", "rounds", "target")
_PHASES = (
    "a step, median of the runs",
    "seconds",
    "generate",
    "score",
    "update",
    "tokens/s",
    "response tokens",
    "peak memory",
    "share of the matmul peak",
    "weights that learn",
)
_SCALING = ("ours, all layers adapted", "tokens a step", "seconds a step", "ms a token", "GFLOP/s needed")


def markdown(report: Mapping[str, Any], cases: Mapping[str, str]) -> str:
    """The page.

    Args:
        report: what the result file holds.
        cases: the words of every case.
    """
    host, settings, data = report["machine"], report["settings"], report["data"]
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    lengths = data["prompt_tokens"]
    page = [
        f"# {report['benchmark']}\n",
        f"`{report['command']}`, {report['date']}, rounds: {settings['rounds']}, on {host['cores']} cores of "
        f"{host['cpu']} ({host['memory_gb']} GB, {settings['threads']} threads, load {host['load_average']} "
        f"at the start); {versions}.\n",
        f"{settings['base']}: {settings['batch']} responses a step of at most {settings['response']} tokens "
        f"to prompts of {min(lengths)} to {max(lengths)} tokens (made of {data['source']}), "
        f"{settings['epochs']} epochs, {settings['micro_batch']} responses at once in our update.\n",
    ]
    if "ratios" in report:
        page += [
            f"Measured steps of a run: {settings['steps']}; {settings['their_micro_batch']} responses at "
            f"once in their update; their value model learns with {_value(settings['their_value'])}.\n",
            "Cost of theirs over cost of ours, medians of the runs; over 1 is to our favour.\n",
            table(_COST, [_ratio_line(report, name) for name in report["ratios"]]),
            table(
                _PHASES,
                [
                    _side_line(report, case, side, cases[case])
                    for case, sides in report["medians"].items()
                    for side in sides
                ],
            ),
        ]
    page.append(f"Matmul peak: {report['matmul_peak']['flops_per_s'] / 1e9:,.1f} GFLOP/s.\n")
    if report["scaling"]:
        page += [
            "How the cost of ours grows: linear where milliseconds a token stay the same; with half the "
            "layers they halve but for the vocabulary.\n",
            table(_SCALING, [_scaling_line(found) for found in report["scaling"]]),
        ]
    return "\n".join([*page, *(f"- {note}" for note in report["notes"]), ""])


def _value(how: str) -> str:
    return "all its weights" if how == "full" else "a LoRA adapter"


def _ratio_line(report: Mapping[str, Any], name: str) -> list[str]:
    found = report["ratios"][name]
    speed = found["figure"] == "s_per_step"

    def shown(side: str) -> str:
        cost = report["medians"][found[side]][side][found["figure"]]
        return f"{cost:.2f} s" if speed else f"{cost / 1e9:.2f} GB"

    target = found["target"]
    wanted = "" if target is None else f"{target:.1f}, {'reached' if found['reached'] else 'missed'}"
    return [
        f"{'speed' if speed else 'memory'}: {found['means']}",
        shown("ours"),
        shown("theirs"),
        f"{found['value']:.2f}",
        f"{found['low']:.2f} to {found['high']:.2f}",
        wanted,
    ]


def _side_line(report: Mapping[str, Any], case: str, side: str, words: str) -> list[str]:
    found = report["medians"][case][side]
    phases = [f"{found[name]:.2f}" if name in found else "" for name in ("generate_s", "score_s")]
    if not any(phases):
        phases = [f"{found['rollout_s']:.2f} with score", ""]
    return [
        f"{words}: {side}",
        f"{found['s_per_step']:.2f}",
        *phases,
        f"{found['update_s']:.2f}",
        f"{found['tokens_per_s']:.1f}",
        f"{found['mean_response_tokens']:.1f}",
        f"{found['peak_bytes'] / 1e9:.2f} GB",
        f"{report['matmul_share'][case][side]:.1%}",
        f"{found['trainable_parameters']:,.0f}",
    ]


def _scaling_line(found: Mapping[str, Any]) -> list[str]:
    return [
        found["words"],
        f"{found['prompt_tokens'] + found['response_tokens']:.0f}",
        f"{found['s_per_step']:.2f}",
        f"{1000 * found['s_per_token']:.2f}",
        f"{found['flops_per_s'] / 1e9:.1f}",
    ]
