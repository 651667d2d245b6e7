"""HumanEval: functions written from their signature and docstring, and tested by running them.

Chen et al. 2021, arXiv 2107.03374; data and scoring of github.com/openai/human-eval. The programs are a
model's own, so this runs only where it was asked for, and only in :mod:`rlhf.evals.sandbox.run`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.readers.rows import BadRow, Row
from rlhf.errors import UserError
from rlhf.evals.items import Place, missing, read_items, text_of
from rlhf.evals.outcome import Outcome
from rlhf.evals.sandbox import run as sandbox
from rlhf.evals.sandbox.verdict import Verdict
from rlhf.training.progress import progress

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

TASK = "humaneval"
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
FORMAT = "the text fields " + ", ".join(FIELDS)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends the body of a function (Chen et al. 2021, section 2.1)."""
WORKERS = 2  # programs at once


class Item(NamedTuple):
    """One problem."""

    id: str
    """Its ``task_id``, such as HumanEval/0."""
    prompt: str
    """Imports, helpers, signature and docstring."""
    entry_point: str
    """Name of the function to be written."""
    solution: str
    """A body that passes."""
    test: str
    """Defines ``check(candidate)``, which raises where the function is wrong."""


def read(files: Sequence[str], *, key: str = "tax.tasks.humaneval.files") -> list[Item]:
    """Problems in the format of HumanEval.jsonl.gz; other kinds of file with the same fields work too.

    Args:
        files: paths, globs or ``hub:NAME[:CONFIG][@SPLIT]``.
        key: the recipe's key that holds them, for messages.

    Raises:
        UserError: a file is missing or damaged; a row lacks a field, or has the name of another (file:line).
    """
    seen: set[str] = set()

    def parse(row: Row, _: Place) -> Item:
        for name in FIELDS:
            if not isinstance(row.get(name), str):
                raise missing(row, name, "text")
        item = Item(*(row[name] for name in FIELDS))
        text_of(row, "prompt")
        if text_of(row, "task_id") in seen:
            raise BadRow(f"task_id {item.id!r} is there already; name each once")
        if not item.entry_point.isidentifier():
            raise BadRow(f"entry_point {item.entry_point!r} is not the name of a function")
        if "def check(" not in item.test:
            raise BadRow("test defines no function check(candidate), so nothing would be tested")
        seen.add(item.id)
        return item

    return read_items(files, parse, key=key, expected=FORMAT)


def truncated(completion: str) -> str:
    """A completion up to the first of :data:`STOP`."""
    ends = [place for stop in STOP if (place := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]


def program(item: Item, completion: str) -> str:
    """What is run: prompt, completion, tests, and the call of the tests."""
    return f"{item.prompt}{completion}\n{item.test}\ncheck({item.entry_point})\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples passes, estimated without bias from c passes of n samples.

    1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i), and 1 where n - c < k. Chen et al.
    2021, equation 1 and its code.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} passes in {n} samples")
    if n - c < k:
        return 1.0
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= 1.0 - k / i
    return 1.0 - missed


def check(
    items: Sequence[Item],
    completions: Sequence[Sequence[str]],
    *,
    allow_code: bool = False,
) -> list[list[Verdict]]:
    """Run every completion against the tests of its problem, each in a sandbox of its own.

    Args:
        items: the problems.
        completions: those of each problem, cut at :data:`STOP` or not.
        allow_code: must be True.

    Returns:
        Verdicts in the shape of the completions. Equal programs are run once.

    Raises:
        UserError: ``allow_code`` is not True, or there is no isolation on this machine.
    """
    _refuse_unless(allow_code)
    programs = [
        [program(item, truncated(completion)) for completion in said]
        for item, said in zip(items, completions, strict=True)
    ]
    different = list(dict.fromkeys(text for texts in programs for text in texts))
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            running = pool.map(sandbox.run, different)
            bar = progress("run", running, total=len(different))
            verdicts = dict(zip(different, bar, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
    return [[verdicts[text] for text in texts] for texts in programs]


def _refuse_unless(allow_code: bool) -> None:
    if allow_code is not True:
        raise UserError(
            f"{TASK} runs code that a model has written, which is off unless asked for: set "
            "tax.allow_generated_code=true to let it run in a sandbox, or leave the task out"
        )
    sandbox.require()


def outcome(
    items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]], ks: Sequence[int] = (1,)
) -> Outcome:
    """The figures of verdicts: pass@k of every problem, for each k.

    Args:
        items: the problems.
        verdicts: those of each problem's samples.
        ks: values of k, each at most the number of samples; the first one stands for the task.
    """
    said = Counter(verdict.status for row in verdicts for verdict in row)
    rows = [
        {f"pass@{k}": pass_at_k(len(row), sum(verdict.passed for verdict in row), k) for k in ks}
        for row in verdicts
    ]
    note = f"{said.total()} programs, {len(verdicts[0])} a problem: " + ", ".join(
        f"{count} {status}" for status, count in sorted(said.items())
    )
    return Outcome.of(TASK, f"pass@{ks[0]}", items, rows, notes=[note])


def run(
    lm: LanguageModel,
    items: Sequence[Item],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    ks: Sequence[int] = (1,),
    max_new_tokens: int = 300,
    seed: int = 0,
    allow_code: bool = False,
) -> Outcome:
    """Let a model write the functions, run them, count.

    Args:
        lm: the model.
        items: the problems.
        samples: functions a problem (n; 200 in Chen et al. 2021).
        temperature: 0 = always the most probable token, and then all samples of a problem are equal; Chen et
            al. 2021 take the best for each k, 0.2 for pass@1 and 0.8 for pass@100.
        top_p: nucleus of the sampling (0.95 in Chen et al. 2021).
        ks: values of k, each at most ``samples``; the first one stands for the task.
        max_new_tokens: longest function body, tokens.
        seed: of the random numbers.
        allow_code: must be True, or nothing is written and run.

    Raises:
        UserError: ``allow_code`` is not True, there is no isolation on this machine, a k is larger than
            ``samples``, or a problem does not fit in the model's window.
    """
    _refuse_unless(allow_code)
    for k in ks:
        if not 1 <= k <= samples:
            raise UserError(
                f"{TASK}: pass@{k} cannot be had from {samples} samples a problem; take more samples"
            )
    drawn = samples if temperature > 0 else 1
    texts = lm.generate(
        [lm.encode(item.prompt) for item in items for _ in range(drawn)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=STOP,
        names=[item.id for item in items for _ in range(drawn)],
    )
    each = samples // drawn
    completions = [texts[first : first + drawn] * each for first in range(0, len(texts), drawn)]
    return outcome(items, check(items, completions, allow_code=allow_code), ks)
