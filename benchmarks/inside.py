"""How long looking inside a model takes: all heads and neurons, and all edges, by one estimate each.

    python -m benchmarks.inside models/smollm2-135m --pairs 32 --tokens 64

Pairs are random tokens of which a fourth are others in the second; the number is the log-prob of all but the
first. Prints a table: seconds, and the peak of the process's memory until then with the model in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.harness import machine, peak_bytes
from policy.inside.attribution import attribute
from policy.inside.circuit.edges import edge_scores
from policy.inside.circuit.wiring import Wiring
from policy.inside.patching import record
from policy.inside.subject import Batch, of_model
from rlhf.errors import CommandLine, UserError, exit_on_user_error
from rlhf.markdown import table
from rlhf.models.base import load_in_float32
from rlhf.recipe.schema import Model

STEPS = 5  # of EAP-IG


def pairs_of(vocabulary: int, pairs: int, tokens: int) -> tuple[Batch, Batch]:
    """Rows of random tokens, and the same rows with a fourth of the tokens replaced."""
    generator = torch.Generator().manual_seed(0)
    first_BT = torch.randint(vocabulary, (pairs, tokens), generator=generator)
    other_BT = torch.randint(vocabulary, (pairs, tokens), generator=generator)
    changed_BT = torch.rand(pairs, tokens, generator=generator) < 0.25
    second_BT = torch.where(changed_BT, other_BT, first_BT)
    mask_BT = torch.ones_like(changed_BT)
    return Batch(first_BT, mask_BT), Batch(second_BT, mask_BT)


def main() -> None:
    """Measure and print."""
    parser = CommandLine(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a hub's name")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="pairs at once")
    given = parser.parse_args()
    if min(given.pairs, given.batch) < 1 or given.tokens < 2:
        raise UserError("--pairs and --batch are at least 1, --tokens at least 2")
    subject = of_model(load_in_float32(Model(path=given.model)))
    first, second = pairs_of(subject.decoder.config.vocab_size, given.pairs, given.tokens)
    wiring = Wiring(subject)

    def nodes(source: Batch, target: Batch) -> object:
        return attribute(subject, target, record(subject, source), record(subject, target), rule="relp")

    def edges(source: Batch, target: Batch) -> object:
        return edge_scores(wiring, target, source, torch.ones(len(target.ids_BT)), rule="atp", steps=STEPS)

    number = sum(subject.units(site) for site in subject.writers)
    works: dict[str, tuple[int, Callable[[Batch, Batch], object]]] = {
        "heads and neurons, RelP": (number, nodes),
        f"edges, EAP-IG of {STEPS} steps": (wiring.edges, edges),
    }
    rows = []
    for name, (count, work) in works.items():
        started = time.monotonic()
        for start in range(0, given.pairs, given.batch):
            chosen = slice(start, start + given.batch)
            work(first.rows(chosen), second.rows(chosen))
        rows.append([name, f"{count:,}", f"{time.monotonic() - started:.1f}", f"{peak_bytes() / 1e9:.2f} GB"])
    host = machine(["transformers"])
    print(
        f"{given.pairs} pairs of {given.tokens} tokens, {torch.get_num_threads()} threads of {host['cpu']}\n"
    )
    print(table(["estimate of all", "number", "seconds", "peak memory"], rows))


if __name__ == "__main__":
    exit_on_user_error(main)
