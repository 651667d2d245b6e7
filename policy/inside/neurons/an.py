"""Is there a neuron that says " an"? The question of Miller and Neo (2023), asked of any small model.

``python -m policy.inside.neurons.an MODEL`` asks it of a folder of a causal language model and prints what
it finds: whether " an" comes next, in which layer that is decided, which MLP and which neuron of it carry it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from policy.inside.neurons.vocabulary import direct_effect, readout_of
from policy.inside.patching import patched, record
from policy.inside.subject import Batch, Site, Subject, of_model
from rlhf.errors import UserError, exit_on_user_error
from rlhf.models.base import load_in_float32
from rlhf.models.masks import positions_from_mask
from rlhf.recipe.schema import Model
from rlhf.tokenization.dialogue import load_tokenizer

CLEAN = "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked"
CORRUPT = "I climbed up the pear tree and picked a pear. I climbed up the lemon tree and picked"


@torch.no_grad()
def study(
    model: Any,
    tokenizer: Any,
    clean: str = CLEAN,
    corrupt: str = CORRUPT,
    words: tuple[str, str] = (" an", " a"),
) -> dict[str, Any]:
    """Where a model decides for the first of two words behind ``clean``, and not behind ``corrupt``.

    Args:
        model: of a family that :func:`policy.inside.subject.of_model` reads.
        tokenizer: of the model.
        clean: a text behind which the first word is right.
        corrupt: one of equally many tokens behind which the second is.
        words: of one token each.

    Returns:
        The next tokens of each text; ``differences``, log-prob of the first word less the second behind each
        text; ``lens``, the same by layer of the clean run, its states read as the last; ``layers`` and
        ``neurons``, shares of the difference of differences that each MLP, and each neuron of the first of
        them, brings at the last position from the clean run into the corrupted one; ``direct``, what the
        first neuron adds directly to the logits of the first word less the second, clean less corrupted.

    Raises:
        UserError: the texts are not of equal length, a word is not one token, or both texts say the same.
    """
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (clean, corrupt, *words)]
    if len(rows[0]) != len(rows[1]) or any(len(row) != 1 for row in rows[2:]):
        raise UserError(
            f"the texts have {len(rows[0])} and {len(rows[1])} tokens, and the words {len(rows[2])} and "
            f"{len(rows[3])}: this tokenizer needs texts of equal length and words of one token"
        )
    first, second = rows[2][0], rows[3][0]
    device = next(model.parameters()).device
    here, there = (Batch(torch.tensor([row]).to(device), torch.ones(1, len(row)).bool().to(device))
                   for row in rows[:2])  # fmt: skip

    def last(batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long()}
        logits: Tensor = model(
            **inputs, position_ids=positions_from_mask(batch.mask_BT), use_cache=False
        ).logits
        return logits[:, -1].float()

    def difference(batch: Batch) -> Tensor:
        logits_BV = last(batch)
        return logits_BV[:, first] - logits_BV[:, second]

    subject = Subject(of_model(model).decoder, difference)
    readout = readout_of(subject.decoder, model.get_output_embeddings())
    right, wrong = record(subject, here), record(subject, there)
    whole = float(right.measured_B - wrong.measured_B)
    if abs(whole) < 1e-4:
        raise UserError(
            f"behind both texts {words[0]!r} is as probable against {words[1]!r}: nothing to explain"
        )
    end_BT = torch.zeros_like(here.mask_BT)
    end_BT[:, -1] = True

    def share(site: Site, units: Tensor | None) -> float:
        changed = patched(subject, there, right, {site: units}, end_BT, own=wrong)
        return float(changed - wrong.measured_B) / whole

    sites = [Site(layer, "neurons") for layer in range(subject.layers)]
    layers = [share(site, None) for site in sites]
    best = sites[max(range(len(sites)), key=lambda n: layers[n])]
    neurons = [share(best, torch.tensor([unit])) for unit in range(subject.units(best))]
    unit = max(range(len(neurons)), key=lambda n: neurons[n])
    effect_UV = direct_effect(subject, best, torch.arange(len(neurons)), readout)
    per_unit_U = effect_UV[:, first] - effect_UV[:, second]
    states_LD = torch.stack([right.kept[Site(layer, "state")][0, -1] for layer in range(subject.layers)])
    lens_LV = readout.of_states(states_LD)
    active = [float(run.kept[best][0, -1, unit]) for run in (right, wrong)]
    sizes = [
        float(readout.size_of(run.kept[Site(subject.layers - 1, "state")][0, -1])) for run in (right, wrong)
    ]
    return {
        "next": [_next(last(batch)[0], tokenizer) for batch in (here, there)],
        "differences": [float(right.measured_B), float(wrong.measured_B)],
        "lens": (lens_LV[:, first] - lens_LV[:, second]).tolist(),
        "layers": layers,
        "neurons": neurons,
        "best": [best.layer, unit],
        "activations": active,
        "direct": float(per_unit_U[unit]) * (active[0] / sizes[0] - active[1] / sizes[1]),
        "rank": int((per_unit_U > per_unit_U[unit]).sum()) + 1,
    }


def _next(logits_V: Tensor, tokenizer: Any) -> list[tuple[str, float]]:
    values, tokens = logits_V.softmax(-1).topk(3)
    return [(str(tokenizer.decode([t])), p) for t, p in zip(tokens.tolist(), values.tolist(), strict=True)]


def as_text(found: dict[str, Any]) -> str:
    """What was found, line by line.

    found: as :func:`study` gives it.
    """
    (layer, unit), layers, neurons = found["best"], found["layers"], found["neurons"]
    nexts = ["; ".join(f"{token!r} {100 * p:.1f}%" for token, p in one) for one in found["next"]]
    ranked = sorted(range(len(neurons)), key=lambda n: -neurons[n])
    best = sorted(range(len(layers)), key=lambda n: -layers[n])
    return "\n".join([
        f"next, clean: {nexts[0]}; corrupted: {nexts[1]}",
        "log-prob difference: clean {:+.2f}, corrupted {:+.2f} nats".format(*found["differences"]),
        "by layer, read as the last: " + " ".join(f"{x:+.1f}" for x in found["lens"]),
        "MLPs that carry it: " + ", ".join(f"L{n} {100 * layers[n]:.1f}%" for n in best[:5]),
        f"neurons of L{layer}: " + ", ".join(f"N{n} {100 * neurons[n]:.1f}%" for n in ranked[:5]),
        f"L{layer}.N{unit}: activation {found['activations'][0]:+.2f}, corrupted "
        f"{found['activations'][1]:+.2f}; adds {found['direct']:+.3f} directly to the logits' difference; "
        f"its direct effect a unit is number {found['rank']} of {len(neurons)} of its layer",
    ])  # fmt: skip


def main() -> None:
    """Ask it of the model in the folder that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("which model? python -m policy.inside.neurons.an FOLDER")
    tokenizer = load_tokenizer(sys.argv[1])
    print(as_text(study(load_in_float32(Model(path=sys.argv[1])), tokenizer)))


if __name__ == "__main__":
    exit_on_user_error(main)
