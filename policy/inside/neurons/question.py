"""The third question of `make inside`: which neurons PPO moved most, and what they answer to and promote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.inside.effects import chosen_of, share_of
from policy.inside.neurons.change import Moved, Peak, highest, moved, peaks, responses_of
from policy.inside.neurons.vocabulary import Readout, direct_effect, readout_of, relatedness
from policy.inside.patching import patched, record
from policy.inside.questions import Inspection
from policy.inside.subject import Batch, Site, Subject, of_role
from policy.ppo.batching import read_texts
from rlhf.errors import UserError
from rlhf.stats.intervals import mean_interval
from rlhf.training.progress import progress

RANDOM = 100  # neurons of which the top tokens are compared
TOKENS = 10  # of a neuron that are compared
SHOWN = 5  # tokens on the page
CONTEXTS = 2  # of a neuron on the page
BEFORE = 8  # tokens of context in front of one
LONGEST, TEXTS = 64, 256  # tokens of a piece of plain text, and pieces, at most
READ = 64  # of these pieces are searched for top tokens
WINDOW = 5  # first positions of a text that the lens reads

Neuron = tuple[Site, int]


class Texts(NamedTuple):
    """Plain texts of the recipe, as token ids; without any, the held-out prompts."""

    pieces: list[list[int]]
    source: str
    """For the page."""
    own: bool
    """Whether they are only the run's own prompts, which are not unrelated to the training."""


def texts_of(models: Inspection) -> Texts:
    """The plain texts of ``inside.texts``, else of ``ppo.ptx_texts``, else the held-out prompts.

    Raises:
        UserError: the texts are shorter than what the lens reads; or the model cannot be read as tokens.
    """
    recipe, dialogue = models.recipe, models.dialogue
    readout(models)
    for key, specs in (("inside.texts", recipe.inside.texts), ("ppo.ptx_texts", recipe.ppo.ptx_texts)):
        if specs:
            pieces = [x for x in read_texts(specs, dialogue, LONGEST, key=key) if len(x) >= WINDOW]
            if len(pieces) < 2:
                raise UserError(
                    f"{key}: {len(pieces)} texts of {WINDOW} tokens or more in {', '.join(specs)}, and the "
                    "lens reads so many: give two longer texts, or set inside.neurons=0"
                )
            chosen = np.unique(np.linspace(0, len(pieces) - 1, TEXTS).round().astype(int))
            return Texts([pieces[n] for n in chosen], key, own=False)
    prompts = [dialogue.encode_prompt(prompt) for prompt in models.prompts]
    return Texts(prompts, "the held-out prompts", own=True)


def readout(models: Inspection) -> Readout:
    """From the states of the run's base to its vocabulary."""
    return readout_of(models.backbone.decoder, models.backbone.base.get_output_embeddings())


def find_neurons(models: Inspection, texts: Texts, after: str, before: str) -> dict[str, Any]:
    """The neurons that ``after`` moved most on its own responses, and what their words are."""
    options, seed = models.recipe.inside, models.recipe.seed
    new, old = of_role(models.backbone, after), of_role(models.backbone, before)
    batches, size = models.write(after).batches, options.micro_batch_size
    said = [row for batch in (*batches, *models.write(before).batches) for row in rows_of(batch)]
    plain = [] if texts.own else texts.pieces[:: -(-len(texts.pieces) // READ)]
    read, shown = [*said, *plain], options.neurons * CONTEXTS
    passes = -(-len(read) // size) + -(-min(len(read), shown) // size)
    with progress("inside: neurons", total=2 * len(batches) + passes, leave=True) as bar:
        tick: Callable[[], object] = bar.update
        change = moved(new, old, batches, tick)
        ranked = ranked_of(change)
        if not ranked:
            return {"skipped": "no neuron's activation differs"}
        generator = np.random.default_rng(seed)
        number = min(options.neurons, max(1, len(ranked) // 2))  # as many random ones are left
        top, rest = ranked[:number], ranked[number:]
        sets = [_drawn(rest, len(top), generator) for _ in range(options.random_sets)]
        null = _drawn(rest, RANDOM, generator)
        shares = patched_shares(new, old, batches, [top, *sets], tick)
        words = Words(models, new, old, read, [unit for unit, _ in (*top, *null)], len(top), tick)
    total = sum(value for _, value in ranked)
    related = [mean_interval(known(part)) for part in (words.related[: len(top)], words.related[len(top) :])]
    return {
        "tokens": change.tokens,
        "texts": [len(said), len(plain)],
        "source": texts.source,
        "neurons": len(ranked),
        "moved": {
            "first": sum(value for _, value in top) / total,
            "random": [sum(value for _, value in drawn) / total for drawn in sets],
        },
        "patched": {"first": shares[0], "random": [share["mean"] for share in shares[1:]]},
        "related": {key: x.as_dict() for key, x in zip(("first", "random"), related, strict=True)},
        "top": [
            {"name": site.name(unit), "change": value, **words.of(n), "rank": words.rank(n)}
            for n, ((site, unit), value) in enumerate(top)
        ],
    }


def ranked_of(change: Moved) -> list[tuple[Neuron, float]]:
    """Neurons by how far they moved, the farthest first; those of layers where none moved are left out."""
    sites = [site for site, relative in change.relative.items() if bool(relative.any())]
    units = [(site, unit) for site in sites for unit in range(len(change.relative[site]))]
    if not units:
        return []
    values = torch.cat([change.relative[site] for site in sites])
    return [(units[n], float(values[n])) for n in values.argsort(descending=True, stable=True).tolist()]


class Words:
    """Top tokens and direct effects of some neurons, in two models.

    Args:
        models: for the vocabulary.
        new: the model whose activations choose the tokens.
        old: the model that stands beside it.
        texts: token ids.
        neurons: which.
        top: so many of them, from the first, are described; the others are what they are compared with.
        tick: called after each pass of either model.
    """

    def __init__(
        self,
        models: Inspection,
        new: Subject,
        old: Subject,
        texts: Sequence[Sequence[int]],
        neurons: Sequence[Neuron],
        top: int,
        tick: Callable[[], object],
    ) -> None:
        self._texts, self._neurons, self._top = texts, neurons, top
        self._subjects = {"after": new, "before": old}
        self._readout, self._tokenizer = readout(models), models.dialogue.tokenizer
        units, size, pad = chosen_of(neurons), models.recipe.inside.micro_batch_size, models.dialogue.pad_id
        self._column = {
            (site, unit): n for site, numbers in units.items() for n, unit in enumerate(numbers.tolist())
        }
        active = peaks(new, texts, units, size, pad, tick)
        self._peaks = [
            highest(texts, [values[:, self._column[unit]] for values in active[unit[0]]], TOKENS)
            for unit in neurons
        ]
        rows = sorted({peak.row for found in self._peaks[:top] for peak in found[:CONTEXTS]})
        there = peaks(old, [texts[row] for row in rows], chosen_of(neurons[:top]), size, pad, tick)
        self._before = {site: dict(zip(rows, values, strict=True)) for site, values in there.items()}
        embeddings: Any = models.backbone.base.get_input_embeddings()
        weight_VD = embeddings.weight.detach().float()
        self.related = [relatedness(weight_VD[self._tokens(found)]) for found in self._peaks]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def _tokens(self, found: Sequence[Peak]) -> list[int]:
        return [self._texts[peak.row][peak.column] for peak in found]

    def rank(self, n: int) -> float:
        """Share of the neurons that stand for comparison whose tokens are less related than those of one."""
        others = known(self.related[self._top :])
        return sum(value < self.related[n] for value in others) / max(1, len(others))

    def of(self, n: int) -> dict[str, Any]:
        """What is written of a neuron; effects are those of an activation in the direction of its peaks."""
        (site, unit), found = self._neurons[n], self._peaks[n]
        sign = -1.0 if found and found[0].activation < 0 else 1.0
        column = self._column[(site, unit)]  # those of the first neurons are the same in both
        effects = {}
        for key, subject in self._subjects.items():
            effect_V = sign * direct_effect(subject, site, torch.tensor([unit]), self._readout)[0]
            for what, side in (("promoted", effect_V), ("suppressed", -effect_V)):
                values, chosen = side.topk(min(SHOWN, len(side)))
                signed = (values if what == "promoted" else -values).tolist()
                effects[f"{what}_{key}"] = [
                    [self._decode([t]), v] for t, v in zip(chosen.tolist(), signed, strict=True)
                ]
        tokens = [self._decode([token]) for token in self._tokens(found)]
        return {
            "tokens": tokens,
            "contexts": [
                {
                    "text": self._decode(self._texts[p.row][max(0, p.column - BEFORE) : p.column + 1]),
                    "after": p.activation,
                    "before": float(self._before[site][p.row][p.column, column]),
                }
                for p in found[:CONTEXTS]
            ],
            "relatedness": None if math.isnan(self.related[n]) else self.related[n],
            **effects,
            "description": describe(tokens, *(effects[f"{w}_after"] for w in ("promoted", "suppressed"))),
        }


def known(values: Sequence[float]) -> list[float]:
    """Those that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def describe(tokens: Sequence[str], promoted: Sequence[Any], suppressed: Sequence[Any]) -> str:
    """A line about a neuron, made of its tokens alone."""
    parts = (
        ("active at", tokens[:SHOWN]),
        ("promotes", [token for token, _ in promoted[:3]]),
        ("suppresses", [token for token, _ in suppressed[:3]]),
    )
    return "; ".join(f"{verb} {', '.join(map(repr, words))}" for verb, words in parts if words)


def rows_of(batch: Batch) -> list[list[int]]:
    """Prompt and response tokens of each row, without padding and closing."""
    shown_BT = responses_of(batch)
    shown_BT[:, : batch.start] = batch.mask_BT[:, : batch.start]
    return [ids[mask].tolist() for ids, mask in zip(batch.ids_BT, shown_BT, strict=True)]


def _drawn(
    ranked: Sequence[tuple[Neuron, float]], number: int, generator: np.random.Generator
) -> list[tuple[Neuron, float]]:
    chosen = generator.choice(len(ranked), min(number, len(ranked)), replace=False)
    return [ranked[n] for n in chosen]


def patched_shares(
    new: Subject,
    old: Subject,
    batches: Sequence[Batch],
    sets: Sequence[Sequence[tuple[Neuron, float]]],
    tick: Callable[[], object],
) -> list[dict[str, Any]]:
    """Share of the change of the responses' log-prob that each set of neurons brings, patched into old."""
    wholes, effects = [], [list[Tensor]() for _ in sets]
    for batch in batches:
        source, own = record(new, batch), record(old, batch)
        wholes.append((source.measured_B - own.measured_B).cpu())
        for chosen, found in zip(sets, effects, strict=True):
            units = chosen_of([unit for unit, _ in chosen])
            found.append((patched(old, batch, source, units, own=own) - own.measured_B).cpu())
        tick()
    whole = torch.cat(wholes)
    return [share_of(torch.cat(found), whole, range(len(whole))) for found in effects]
