"""The page's sections on soft prompts and on several policies, in plain words."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import number, percent, plain, table

Figures = dict[str, Any]
_BARRIER = (
    "`above the line`: the loss at (1 - a) times one and a times another, less the straight line through the "
    "losses of the two, mean over pairs; a barrier is its highest. Random: the same distances in a random "
    "direction, less the loss where it begins. Intervals (95%, Student's with one degree of freedom less "
    "than there are solutions) are over pairs, which share solutions.\n"
)


def prompts_section(found: Figures) -> list[str]:
    """Lines about soft prompts.

    found: as ``compare_prompts`` gives them.
    """
    trained = ", ".join(f"{x:.3f}" for x in found["ends"])
    return [
        "## Soft prompts\n",
        f"{len(found['ends'])} soft prompts of {found['length']} vectors, trained for {found['steps']} steps "
        f"on {found['taught']} of the policy's responses to prompts of its training, judged on "
        f"{found['rows']} to held-out ones. Loss: negative log-prob of a token, in nats: "
        f"{found['before']:.3f} of the model before, {found['after']:.3f} of the policy, "
        f"{found['untrained']:.3f} behind the prompts as they begin, {trained} behind the trained ones, "
        f"which recover {percent(found['recovered'])} of the difference.\n",
        *_compared(found, "+.4f"),
    ]


def policies_section(found: Figures) -> list[str]:
    """Lines about policies of several runs.

    found: as ``compare_policies`` gives them.
    """
    lines = [
        "## Between policies\n",
        "This run's policy and "
        + ", ".join(f"`{folder}`" for folder in found["others"])
        + ", their updates of the "
        f"weights in proportion; {found['rows']} held-out prompts.\n",
    ]
    titles = {
        "log_prob": "Negative log-prob of a token of the responses of all of them, in nats",
        "reward": "Score of sampled responses, with its sign turned",
    }
    for key, title in titles.items():
        if key in found:
            ends = ", ".join(f"{x:.3f}" for x in found[key]["ends"])
            lines += [
                f"### {title}\n",
                f"Of the policies themselves: {ends}.\n",
                *_compared(found[key], "+.4f"),
            ]
    return lines


def _compared(found: Figures, form: str) -> list[str]:
    rows = [[f"{a:g}", plain(figure, form)] for a, figure in found["along"]]
    less = found["less"]
    said = (
        f"Barrier inside {plain(found['inside'], form)}, outside {plain(found['outside'], form)}, random "
        f"{plain(found['random'], form)}; the middle of all is {number(found['centroid'], form)} from their "
        f"mean loss. Inside less outside {plain(less['outside'], form)}, less random "
        f"{plain(less['random'], form)}: that the hull is better than both is **{found['verdict']}**"
    )
    if found["verdict"] == "UNDECIDED":
        more = found["solutions_needed"]
        said += (
            f"; at this spread it would take {more if more < 100 else '100 or more'} solutions to tell"
            if more > len(found["ends"])
            else "; pairs of solutions do not differ in this, so that their spread says nothing"
        )
    return [table(["a", "above the line"], rows), f"{said}.\n", _BARRIER]
