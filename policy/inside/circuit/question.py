"""The question of `make inside` along which edges the reward model computes its difference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from policy.inside.attribution import Rule
from policy.inside.circuit.faithfulness import find_circuit, runs_of
from policy.inside.circuit.wiring import Wiring
from policy.inside.minimal_pairs import KINDS
from policy.inside.questions import Inspection
from policy.inside.subject import of_role
from rlhf.errors import UserError
from rlhf.training.progress import progress

ASKED = ("sentiment", "order")  # kinds of pairs
RULES: dict[str, tuple[Rule, int]] = {"eap_ig": ("atp", 5), "relp": ("relp", 1)}  # and gradients


def circuits(
    models: Inspection, role: str, reads: dict[str, Any], keep: Callable[[str, Callable[[], Any]], Any]
) -> dict[str, Any]:
    """Circuits of the difference of scores, by kind of pairs; ``reads`` is what was found of these pairs,
    ``keep`` gives what is there of a kind, or computes it."""
    options, kinds = models.recipe.inside, dict[str, Any]()
    if "skipped" in reads:
        return {"skipped": reads["skipped"]}
    rule, steps = RULES[options.edges]

    def compute(name: str) -> dict[str, Any]:
        try:
            wiring = Wiring(of_role(models.backbone, role))
            pairs = models.batches(models.pairs(next(kind for kind in KINDS if kind.name == name))[0])
            with progress(
                f"inside: circuit of {name}", total=runs_of(pairs, wiring.edges), leave=True
            ) as bar:
                tick: Callable[[], object] = bar.update
                return find_circuit(wiring, pairs, rule=rule, steps=steps, seed=models.recipe.seed, tick=tick)
        except UserError as error:
            return {"skipped": str(error).removeprefix("inside: ")}

    for name in ASKED:
        kind = reads["kinds"][name]
        if "parts" in kind:
            kinds[name] = keep(f"circuit-{name}", functools.partial(compute, name))
        else:
            kinds[name] = {"skipped": kind["skipped"]}
    return {"estimate": options.edges, "kinds": kinds}
