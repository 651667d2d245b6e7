"""The tax table as a page that reads without help."""

from __future__ import annotations

from typing import Any

from policy.alignment_tax.comparison import LEVEL, intervals, verdicts
from rlhf.markdown import number, plain, table

_DIRECTION = {True: "higher", False: "lower"}


def as_markdown(tax: dict[str, Any]) -> str:
    """The page: how to read it, who took part, what each did, what changed, and what can be told.

    Args:
        tax: as written to ``tax.json``.
    """
    parts = [
        f"# What alignment cost: {tax['name']}, seed {tax['seed']}\n",
        _how_to_read(tax),
        "![gains by task](tax.png)\n" if tax.get("plot") else "",
        "## What can be told\n",
        _findings(tax),
        "## Variants\n",
        table(["variant", "what it is"], [[variant["name"], variant["what"]] for variant in tax["variants"]]),
        "## Results\n",
        _results(tax),
        f"## Difference to {tax['reference']}: + is better, - is worse\n",
        _differences(tax),
        f"## Item by item against {tax['reference']}: better / equal / worse (p of the sign test)\n",
        _counts(tax),
        _groups(tax),
        _metrics(tax),
        "## Notes\n",
        _notes(tax),
        _costs(tax),
    ]
    return "\n".join(part for part in parts if part)


def _others(tax: dict[str, Any]) -> list[str]:
    return [variant["name"] for variant in tax["variants"] if variant["name"] != tax["reference"]]


def _form(*figures: float | None) -> str:
    """Digits that suit the size of the numbers of a line."""
    largest = max((abs(x) for x in figures if x is not None), default=0.0)
    return ".3f" if largest < 10 else ".2f" if largest < 1000 else ".1f"


def _task_form(task: dict[str, Any]) -> str:
    return _form(*(found["mean"] for found in task["variants"].values()))


def _how_to_read(tax: dict[str, Any]) -> str:
    reference, number_of = tax["reference"], intervals(tax["tasks"])
    text = (
        "A variant is one model, or one model behind a prompt. Every variant did the same items of every "
        "task, drawn by the seed. Results come with 95% intervals. A difference is a variant less "
        f"`{reference}`, item by item (paired), its sign turned where a lower value is better: "
        f"**+ is always better than `{reference}`, - is always worse**. In bold: the interval leaves 0 out "
        "and, where items are right or wrong, the sign test of items won against items lost gives p < "
        f"{LEVEL:g}; bold with a minus is a tax. The other differences cannot be told from nothing with so "
        "few items, which does not say that they are nothing."
    )
    if number_of:
        text += (
            f" The page has {number_of} such intervals: if nothing had changed at all, about "
            f"{0.05 * number_of:.1f} of them would leave 0 out by luck."
        )
    return text + "\n"


def _findings(tax: dict[str, Any]) -> str:
    lines = []
    for variant in _others(tax):
        found = verdicts(tax["tasks"], variant)
        said = [f"{word} on {', '.join(found[word])}" for word in ("better", "worse") if found[word]]
        if found["open"]:
            said.append(f"not told apart on {', '.join(found['open'])}")
        lines.append(
            f"- `{variant}` against `{tax['reference']}`: {'; '.join(said) or 'nothing to compare'}."
        )
    return "\n".join([*lines, ""]) if lines else f"- only `{tax['reference']}`: nothing to compare.\n"


def _results(tax: dict[str, Any]) -> str:
    names = [variant["name"] for variant in tax["variants"]]
    rows = []
    for task in tax["tasks"]:
        form = _task_form(task)
        cells = [plain(task["variants"][n], form) if n in task["variants"] else "" for n in names]
        rows.append([*_about(task, form), *cells])
    page = table(["task", "metric", "better", "items", "chance", *names], rows)
    scorer = tax.get("reward_model_hhh")
    if scorer:
        own = scorer["figures"]
        page += (
            f"\nThe run's own reward model, which is no variant, ranks {plain(own, '.3f')} of the "
            f"{scorer['items']} HHH items right (metric {scorer['metric']}).\n"
        )
    return page


def _about(task: dict[str, Any], form: str) -> list[str]:
    chance = "" if task["chance"] is None else number(task["chance"], form)
    better = _DIRECTION[task["higher_is_better"]]
    return [task["task"], task["metric"], better, str(task["items"]), chance]


def _differences(tax: dict[str, Any]) -> str:
    names = _others(tax)
    rows = [
        [task["task"], *(_gain(task["differences"].get(n), _task_form(task)) for n in names)]
        for task in tax["tasks"]
    ]
    return table(["task", *names], rows)


def _gain(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return ""
    text = plain({"mean": found["gain"], "ci95": found["gain_ci95"]}, f"+{form}")
    return text if found["verdict"] == "open" else f"**{text}**"


def _counts(tax: dict[str, Any]) -> str:
    names = _others(tax)
    rows = []
    for task in tax["tasks"]:
        found = [task["differences"].get(n) for n in names]
        cells = [
            "" if f is None else f"{f['wins']} / {f['ties']} / {f['losses']} (p {f['p_sign']:.2g})"
            for f in found
        ]
        rows.append([task["task"], *cells])
    return table(["task", *names], rows)


def _groups(tax: dict[str, Any]) -> str:
    """A line for every group of items, where a task has few enough of them."""
    names = [variant["name"] for variant in tax["variants"]]
    rows = []
    for task in tax["tasks"]:
        if not 1 < len(task["groups"]) <= tax["groups_shown"]:
            continue
        for group, items in task["groups"].items():
            cells = [_of_group(task, n, group) for n in names]
            rows.append([task["task"], group, str(items), *cells])
    if not rows:
        return ""
    head = ["task", "group", "items", *names]
    note = "Results of each group; in brackets the difference of its items, bold as above.\n"
    return "\n".join(["## By group of items\n", note, table(head, rows)])


def _of_group(task: dict[str, Any], variant: str, group: str) -> str:
    found = task["variants"].get(variant, {}).get("groups", {}).get(group)
    if found is None:
        return ""
    form = _task_form(task)
    change = task["differences"].get(variant, {}).get("groups", {}).get(group)
    text = number(found["mean"], form)
    if change is None or change["gain"] is None:
        return text
    gain = f"{change['gain']:+{form}}"
    return f"{text} ({gain if change['verdict'] == 'open' else f'**{gain}**'})"


def _metrics(tax: dict[str, Any]) -> str:
    """What else was measured: other metrics, and figures of a whole set that are no means of items."""
    names = [variant["name"] for variant in tax["variants"]]
    rows = []
    for task in tax["tasks"]:
        variants = task["variants"]
        kinds = {
            metric: {
                n: found["metrics"][metric]["mean"]
                for n, found in variants.items()
                if metric in found["metrics"]
            }
            for metric in _names(found["metrics"] for found in variants.values())
            if metric != task["metric"]
        }
        for figure in _names(found["aggregate"] for found in variants.values()):
            kinds[figure] = {n: found["aggregate"].get(figure) for n, found in variants.items()}
        for kind, means in kinds.items():
            form = _form(*means.values())
            rows.append([task["task"], kind, *(number(means[n], form) if n in means else "" for n in names)])
    if not rows:
        return ""
    return "\n".join(["## Other figures\n", table(["task", "figure", *names], rows)])


def _names(mappings: Any) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _notes(tax: dict[str, Any]) -> str:
    lines = [f"- {note}" for note in tax["notes"]]
    lines += [f"- {task['task']}: {note}" for task in tax["tasks"] for note in task["notes"]]
    for task in tax["tasks"]:
        for variant, found in task["differences"].items():
            if found["unpaired"]:
                lines.append(
                    f"- {task['task']}: {found['unpaired']} items were done by `{variant}` or by "
                    f"`{tax['reference']}` alone; the difference is over the {found['n']} that both did"
                )
    lines += [f"- files of {name}: {_files(files)}" for name, files in tax["files"].items()]
    return "\n".join([*lines, ""])


def _files(files: dict[str, str]) -> str:
    listed = [f"{name} ({content[:12]})" for name, content in files.items()]
    return ", ".join([*listed[:5], *([f"and {len(listed) - 5} more"] if len(listed) > 5 else [])])


def _costs(tax: dict[str, Any]) -> str:
    return (
        f"Measured in {tax['cost']['seconds'] / 60:.1f} min, {tax['cost']['peak_bytes'] / 1e9:.2f} GB at the "
        f"peak, with {', '.join(f'{name} {version}' for name, version in tax['versions'].items())}.\n"
    )
