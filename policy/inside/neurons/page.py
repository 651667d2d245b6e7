"""The page's sections on neurons and on the lens, in plain words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.markdown import number, percent, plain, points, table

Figures = dict[str, Any]
_WHAT = (
    "`change`: mean |activation after - before| over the policy's response tokens, which both models read, "
    "in standard deviations of the neuron's activation before; its activation is what the MLP's output map "
    "reads. `active at`: tokens of its strongest activations, in one direction. `promotes`, `suppresses`: "
    "direct effect of such an activation on the logits, past all later layers, in either model. "
    "Relatedness: mean cosine similarity of the top tokens' embeddings, over all pairs; `above random`: "
    "share of random neurons whose top tokens are less related.\n"
)
_LENS = (
    "The mean over texts and positions of the state after less before, read through the last norm and the "
    "unembedding (Activation Difference Lens, Minder 2025). `gained`: what the policy's responses gained in "
    "log-prob, in nats each. `strength`: norm of the mean difference, in median norms of a state before. "
    "`share`: of the first 20 tokens of a layer, those among the 5% of the vocabulary that the training made "
    "more probable by the largest factors in responses, the policy's and those of the model before; "
    "`subject`: the same by the tokens that this run's training raised; `opposite`: the share of the "
    "difference with its sign turned; `state`: of the mean "
    "state before; `random`: of random directions. Means over the layers that differ; intervals (95%) are "
    "over groups of texts, of `random` over directions.\n"
)


def neurons_section(found: Figures) -> list[str]:
    """Lines about the neurons that moved most.

    found: as ``find_neurons`` gives them.
    """
    title = "## Which neurons PPO moved most\n"
    if "skipped" in found:
        return [title, f"Not looked into: {found['skipped']}.\n"]
    moved, patched, related, top = found["moved"], found["patched"], found["related"], found["top"]
    said, plain_texts = found["texts"]
    texts = f"{said} prompts with responses" + (
        f" and {plain_texts} plain texts of {found['source']}" if plain_texts else ""
    )
    rows = [[row["name"], f"{row['change']:.2f}", _words(row["tokens"]),
             number(row["relatedness"], ".3f"), f"{100 * row['rank']:.0f}%"] for row in top]  # fmt: skip
    sides = ("promoted_after", "promoted_before", "suppressed_after", "suppressed_before")
    effects = [[row["name"], *(_words([token for token, _ in row[side]]) for side in sides)] for row in top]
    contexts = [
        [row["name"], _quoted(one["text"]), f"{one['after']:+.2f}", f"{one['before']:+.2f}"]
        for row in top
        for one in row["contexts"]
    ]
    return [
        title,
        f"On {found['tokens']} response tokens the first {len(top)} of {found['neurons']:,} neurons hold "
        f"{100 * moved['first']:.2f}% of the whole change of activations, as many random ones "
        f"{_percents(moved['random'])}. Patched into the model before, they carry "
        f"{percent(patched['first'])} of what the log-prob of the responses gained, random ones "
        f"{_percents(patched['random'])}. Their top tokens, in {texts}, have a relatedness of "
        f"{plain(related['first'], '.3f')}, those of "
        f"{related['random']['n']} random neurons {plain(related['random'], '.3f')}: "
        f"{_told(related['first'], related['random'])}.\n",
        _WHAT,
        table(["neuron", "change", "active at", "relatedness", "above random"], rows),
        table(["neuron", "promotes, after", "before", "suppresses, after", "before"], effects),
        table(["neuron", "most active at the end of", "after", "before"], contexts),
        *[f"- {row['name']}: {row['description']}" for row in top],
        "",
    ]


def lens_section(found: Figures) -> list[str]:
    """Lines about the mean difference of states on plain texts.

    found: as ``find_lens`` gives them.
    """
    title = "## What PPO left in other texts\n"
    if "skipped" in found:
        return [title, f"Not looked into: {found['skipped']}.\n"]
    own = " They are the prompts of the run, so that this is no unrelated text." if found["own"] else ""
    lines = [title, f"Read are the first tokens of {found['texts']} texts, {found['source']}.{own}\n", _LENS]
    told = {name: one for name, one in found["policies"].items() if "share" in one}
    keys = ("gained", "strength", "share", "subject", "opposite", "state", "random")
    rows = [
        [name, *(plain(one[k], ".2f") if k == "gained" else percent(one[k]) for k in keys)]
        for name, one in told.items()
    ]
    if rows:
        lines.append(table(["policy", *keys], rows))
    for name, one in found["policies"].items():
        lines.append(f"### Lens of {name}\n")
        if name not in told:
            lines.append("No change: the states do not differ.\n")
            continue
        lines.append(
            f"Share less that of the opposite "
            f"{points(one['less_opposite'])}, less that of the state before {points(one['less_state'])}."
            + _beside(one.get("less_policy"))
            + "\n"
        )
        layers = [[str(row["layer"]), f"{100 * row['strength']:.1f}%", f"{100 * row['share']:.0f}%",
                   _words(row["tokens"])] for row in one["layers"]]  # fmt: skip
        lines.append(table(["layer", "strength", "share", "first tokens"], layers))
    return lines


def _beside(less: Figures | None) -> str:
    if not less:
        return ""
    return f" Less this run's policy: strength {points(less['strength'])}, subject {points(less['subject'])}."


def _told(first: Figures, other: Figures) -> str:
    """Whether two intervals are apart."""
    if not first["ci95"] or not other["ci95"]:
        return "too few to compare"
    if first["ci95"][0] > other["ci95"][1]:
        return "their words belong together more than those of random neurons"
    if first["ci95"][1] < other["ci95"][0]:
        return "their words belong together less than those of random neurons"
    return "not distinguishable"


def _percents(shares: Sequence[float]) -> str:
    if not shares:
        return "none"
    return f"{100 * statistics.fmean(shares):.2f}% ({100 * min(shares):.2f}% to {100 * max(shares):.2f}%)"


def _words(tokens: Sequence[str]) -> str:
    return " ".join(map(_quoted, tokens))


def _quoted(text: str) -> str:
    """A token as code, whose spaces and line breaks can be seen; other unprintable characters are escapes."""
    seen = text.replace("`", chr(39)).replace(chr(10), chr(9166))
    return f"`{''.join(c if c.isprintable() else repr(c)[1:-1] for c in seen)}`"
