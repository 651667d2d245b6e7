"""Put together: the plan of a recipe on the machine at hand, printed, and refused where it cannot fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from rlhf.errors import UserError
from rlhf.models.kernels.named import check_kernels
from rlhf.plan.lengths import Lengths, lengths_of
from rlhf.plan.machine import Machine, machine
from rlhf.plan.remedies import remedies, together
from rlhf.plan.report import cannot_fit, fits, help_page, page, verdict
from rlhf.plan.shapes import Known, shape_of
from rlhf.plan.stages import Moment, Plan, plan
from rlhf.recipe.load import Recipe
from rlhf.recipe.ppo import check_optimizer
from rlhf.runs.dtype import AUTO, settled
from rlhf.runs.stage import RUNS


class Planned(NamedTuple):
    """A plan and what it was made from."""

    plan: Plan
    machine: Machine
    known: Known
    lengths: Lengths

    @property
    def notes(self) -> list[str]:
        """Where the sizes come from."""
        lengths, shape = self.lengths, self.known.shape
        how = "longest found" if lengths.measured else "the recipe's limit"
        number = "an unknown number of" if lengths.comparisons is None else f"{lengths.comparisons}"
        return [
            f"Shape: {self.known.origin}; {shape.matrices() + shape.others():,} weights.",
            f"Prompts of {lengths.prompt} tokens ({how}); {number} comparisons of {lengths.responses} "
            "responses.",
        ]


def machine_for(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Machine:
    """What the environment says and what is here.

    Raises:
        UserError: the environment names no such machine, or it cannot run the kernels or the optimizer
            that are asked for.
    """
    here = machine(environment)
    model = as_it_will_run(recipe, gpu=here.gpu).model
    check_kernels(model, gpu=here.gpu, elsewhere=here.elsewhere)
    zero_stage = recipe.distributed.zero_stage if here.world > 1 else 0
    check_optimizer(recipe.ppo.optimizer, zero_stage=zero_stage, gpu=here.gpu)
    return here


def planned(recipe: Recipe, here: Machine) -> Planned:
    """The plan of a recipe on a machine.

    Raises:
        UserError: nothing is known of the base.
    """
    recipe = as_it_will_run(recipe, gpu=here.gpu)
    known, lengths = shape_of(recipe.model), lengths_of(recipe)
    made = plan(
        recipe, known.shape, lengths, gpu=here.gpu, world=here.world, converted=_converted(recipe, known)
    )
    return Planned(made, here, known, lengths)


def _converted(recipe: Recipe, known: Known) -> float:
    return float(known.stored) if known.stored_dtype not in ("", recipe.model.dtype) else 0.0


def as_it_will_run(recipe: Recipe, *, gpu: bool) -> Recipe:
    """The recipe with the type that ``auto`` has become; before a run has chosen, bfloat16 on a GPU, and on a
    CPU float32, which needs more."""
    recipe = settled(recipe, RUNS / recipe.name, measured=False)
    if recipe.model.dtype != AUTO:
        return recipe
    update = {"dtype": "bfloat16" if gpu else "float32"}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})


def show(recipe: Recipe) -> None:
    """Print the plan of a recipe.

    Raises:
        UserError: it does not fit, and what would help has been printed; or the machine has not the kernels.
    """
    found = planned(recipe, machine_for(recipe))
    print(page(found.plan, found.machine, found.notes), flush=True)
    largest = found.plan.largest()
    if not fits(largest, found.machine):
        print(_help(recipe, found), flush=True)
        raise UserError(f"plan: {verdict(largest, found.machine)}")


def before_a_run(recipe: Recipe) -> None:
    """Say in a line what a run will need of this machine, as ``plan`` of the recipe asks for.

    ``GPU`` and ``NODES`` are for `make plan`, which speaks of other machines: they are not looked at.

    Raises:
        UserError: the machine has not the kernels; with ``refuse``, where it cannot fit; or the
            optimizer does not go with so many processes.
    """
    if recipe.plan == "off":
        return
    here = machine_for(recipe, {k: v for k, v in os.environ.items() if k not in ("GPU", "NODES")})
    try:
        found = planned(recipe, here)
    except UserError as error:
        print(f"plan: {error}", flush=True)
        return
    largest = found.plan.largest()
    told = f"plan: {verdict(largest, here)}"
    if fits(largest, here):
        print(told, flush=True)
        return
    print(page(found.plan, here, found.notes), _help(recipe, found), sep="\n", flush=True)
    if recipe.plan == "refuse" and cannot_fit(largest, here):
        raise UserError(f"{told}; change one of the above, or set plan=warn to start all the same")


def _help(recipe: Recipe, found: Planned) -> str:
    here = found.machine
    recipe = as_it_will_run(recipe, gpu=here.gpu)

    def need(changed: Recipe) -> Moment:
        lengths = found.lengths
        if changed.dialogue.max_prompt_tokens < lengths.prompt:
            lengths = lengths._replace(prompt=changed.dialogue.max_prompt_tokens)
        converted = _converted(changed, found.known)
        made = plan(changed, found.known.shape, lengths, gpu=here.gpu, world=here.world, converted=converted)
        return made.largest()

    single = remedies(recipe, need, world=here.world)
    return help_page(single, together(recipe, need, world=here.world, limit=here.bytes), here)
