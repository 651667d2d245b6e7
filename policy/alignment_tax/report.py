"""The tax table as a page that reads without help."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from policy.alignment_tax.table import LEVEL, verdicts
from rlhf.markdown import number, plain, table

Task = dict[str, Any]
Cell = Callable[[Task, str], str]
"""A task and a variant's name -> text."""


def as_markdown(tax: dict[str, Any]) -> str:
    """The page: how to read it, who took part, what each did, what changed, and which changes are certain.

    Args:
        tax: as written to ``tax.json``.
    """
    reference = tax["reference"]
    names = [variant["name"] for variant in tax["variants"]]
    others = [name for name in names if name != reference]
    parts = [
        f"# What alignment cost: {tax['name']}, seed {tax['seed']}\n",
        _how_to_read(tax),
        "![gains by task](tax.png)\n" if tax.get("plot") else "",
        "## Findings\n",
        _findings(tax, others),
        "## Variants\n",
        table(["variant", "what it is"], [[variant["name"], variant["what"]] for variant in tax["variants"]]),
        "## Results\n",
        _by_task(tax, names, _result, _about),
        _reward_model(tax.get("reward_model_hhh")),
        f"## Difference to {reference}: + is better, - is worse\n",
        _by_task(tax, others, _difference),
        f"## Item by item against {reference}: better / equal / worse (p of the sign test)\n",
        _by_task(tax, others, _counts),
        _groups(tax, names),
        _metrics(tax, names),
        "## Notes\n",
        _notes(tax),
        f"Measured in {tax['cost']['seconds'] / 60:.1f} min, {tax['cost']['peak_bytes'] / 1e9:.2f} GB at the "
        f"peak, with {', '.join(f'{name} {version}' for name, version in tax['versions'].items())}.\n",
    ]
    return "\n".join(part for part in parts if part)


def _form(figures: Iterable[float | None]) -> str:
    """Digits that suit the size of the numbers of a line."""
    largest = max((abs(x) for x in figures if x is not None), default=0.0)
    return ".3f" if largest < 10 else ".2f" if largest < 1000 else ".1f"


def _task_form(task: Task) -> str:
    return _form(found["mean"] for found in task["variants"].values())


def _how_to_read(tax: dict[str, Any]) -> str:
    reference = tax["reference"]
    intervals = sum(len(task["differences"]) for task in tax["tasks"])
    text = (
        "A variant is one model, or one model behind a prompt. Every variant did the same items of every "
        "task, drawn by the seed. Results come with 95% intervals. A difference is a variant less "
        f"`{reference}`, item by item (paired), its sign turned where a lower value is better: "
        f"**+ is always better than `{reference}`, - is always worse**. In bold: the interval leaves 0 out "
        "and, where items are right or wrong, the sign test of items won against items lost gives p < "
        f"{LEVEL:g}; bold with a minus is a tax. The other differences are not significant with so few "
        "items, which does not mean that there are none."
    )
    if intervals:
        text += (
            f" The page has {intervals} such intervals: if nothing had changed at all, about "
            f"{0.05 * intervals:.1f} of them would leave 0 out by luck."
        )
    return text + "\n"


def _findings(tax: dict[str, Any], others: list[str]) -> str:
    labels = {"better": "better", "worse": "worse", "open": "no significant difference"}
    lines = []
    for name in others:
        found = verdicts(tax["tasks"], name)
        parts = [f"{label} on {', '.join(found[key])}" for key, label in labels.items() if found[key]]
        lines.append(f"- `{name}` against `{tax['reference']}`: {'; '.join(parts) or 'nothing to compare'}.")
    return "\n".join([*lines, ""]) if lines else f"- only `{tax['reference']}`: nothing to compare.\n"


def _by_task(
    tax: dict[str, Any], names: list[str], cell: Cell, about: Callable[[Task], dict[str, str]] | None = None
) -> str:
    """A line for every task, with the cells of the variants."""
    columns = [about(task) if about else {} for task in tax["tasks"]]
    rows = [
        [task["task"], *column.values(), *(cell(task, name) for name in names)]
        for task, column in zip(tax["tasks"], columns, strict=True)
    ]
    return table(["task", *(columns[0] if columns else {}), *names], rows)


def _about(task: Task) -> dict[str, str]:
    return {
        "metric": task["metric"],
        "better": "higher" if task["higher_is_better"] else "lower",
        "items": str(task["items"]),
        "chance": "" if task["chance"] is None else number(task["chance"], _task_form(task)),
    }


def _result(task: Task, name: str) -> str:
    found = task["variants"].get(name)
    return plain(found, _task_form(task)) if found else ""


def _difference(task: Task, name: str) -> str:
    found = task["differences"].get(name)
    if found is None:
        return ""
    text = plain({"mean": found["gain"], "ci95": found["gain_ci95"]}, f"+{_task_form(task)}")
    return text if found["verdict"] == "open" else f"**{text}**"


def _counts(task: Task, name: str) -> str:
    found = task["differences"].get(name)
    if found is None:
        return ""
    return f"{found['wins']} / {found['ties']} / {found['losses']} (p {found['p_sign']:.2g})"


def _reward_model(scorer: dict[str, Any] | None) -> str:
    if not scorer:
        return ""
    return (
        f"The run's own reward model, which is no variant, ranks {plain(scorer['figures'], '.3f')} of the "
        f"{scorer['items']} HHH items right (metric {scorer['metric']}).\n"
    )


def _groups(tax: dict[str, Any], names: list[str]) -> str:
    """A line for every group of items, where a task has few enough of them."""
    rows = [
        [task["task"], group, str(items), *(_of_group(task, name, group) for name in names)]
        for task in tax["tasks"]
        if 1 < len(task["groups"]) <= tax["groups_shown"]
        for group, items in task["groups"].items()
    ]
    note = "Results of each group; in brackets the difference of its items, bold as above.\n"
    page = table(["task", "group", "items", *names], rows)
    return f"## By group of items\n\n{note}\n{page}" if rows else ""


def _of_group(task: Task, name: str, group: str) -> str:
    found = task["variants"].get(name, {}).get("groups", {}).get(group)
    if found is None:
        return ""
    form = _task_form(task)
    change = task["differences"].get(name, {}).get("groups", {}).get(group)
    text = number(found["mean"], form)
    if change is None or change["gain"] is None:
        return text
    gain = f"{change['gain']:+{form}}"
    return f"{text} ({gain if change['verdict'] == 'open' else f'**{gain}**'})"


def _metrics(tax: dict[str, Any], names: list[str]) -> str:
    """What else was measured: other metrics, and figures of a whole set that are no means of items."""
    rows = []
    for task in tax["tasks"]:
        kinds: dict[str, dict[str, float | None]] = {}
        variants = task["variants"].items()
        for name, found in variants:
            for metric, figure in found["metrics"].items():
                if metric != task["metric"]:
                    kinds.setdefault(metric, {})[name] = figure["mean"]
        for figure in dict.fromkeys(figure for _, found in variants for figure in found["aggregate"]):
            kinds[figure] = {name: found["aggregate"].get(figure) for name, found in variants}
        for kind, means in kinds.items():
            form = _form(means.values())
            rows.append([task["task"], kind, *(number(means[n], form) if n in means else "" for n in names)])
    return f"## Other figures\n\n{table(['task', 'figure', *names], rows)}" if rows else ""


def _notes(tax: dict[str, Any]) -> str:
    lines = [f"- {note}" for note in tax["notes"]]
    lines += [f"- {task['task']}: {note}" for task in tax["tasks"] for note in task["notes"]]
    lines += [
        f"- {task['task']}: {found['unpaired']} items were done by `{name}` or by `{tax['reference']}` "
        f"alone; the difference is over the {found['n']} that both did"
        for task in tax["tasks"]
        for name, found in task["differences"].items()
        if found["unpaired"]
    ]
    lines += [f"- files of {name}: {_files(files)}" for name, files in tax["files"].items()]
    return "\n".join([*lines, ""])


def _files(files: dict[str, str]) -> str:
    listed = [f"{name} ({content[:12]})" for name, content in files.items()]
    return ", ".join([*listed[:5], *([f"and {len(listed) - 5} more"] if len(listed) > 5 else [])])
