"""The questions that `make inside` answers, as figures.

One: which components carry what PPO changed, in the log-prob of the responses that the policy gives, and in
the reward. Two: which components of the reward model compute the difference of the scores of two responses,
and whether it reads length, position and single words.

Shape suffixes: ``_B`` row of a batch, ``_N`` row, ``_T`` token, ``_R`` response token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.inside.effects import Change, examine, runs_of
from policy.inside.minimal_pairs import FILLER, KINDS, OWN, Kind, Pair, own_pairs, pairs_of
from policy.inside.subject import Batch, Subject, of_role
from policy.ppo.rollout import Responses, RewardFn, close
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError
from rlhf.generation import sampling
from rlhf.models.backbone import Backbone
from rlhf.models.masks import left_pad, right_pad
from rlhf.recipe.load import Recipe
from rlhf.stats.intervals import mean_interval, wilson, win_rate
from rlhf.tokenization.dialogue import Dialogue, PromptTooLongError
from rlhf.tokenization.template import RefusedTurnsError
from rlhf.training.progress import progress

_PADDINGS = 2  # sentences of filler behind a response, at most


class Written(NamedTuple):
    """Responses of one role, a row a prompt."""

    batches: list[Batch]
    scores_N: Tensor
    """Rewards; empty where there is no reward model."""


@dataclasses.dataclass
class Inspection:
    """A run's models in memory."""

    recipe: Recipe
    backbone: Backbone
    dialogue: Dialogue
    prompts: Sequence[Prompt]
    reward_fn: RewardFn | None
    """What PPO maximized, as far as it is reward models of this project."""

    @torch.no_grad()
    def write(self, role: str) -> Written:
        """Sample a response to each prompt and score it; random numbers depend on the row alone."""
        batches, scores, dialogue = [], [], self.dialogue
        size = self.recipe.inside.micro_batch_size
        for first in range(0, len(self.prompts), size):
            prompts = self.prompts[first : first + size]
            rows = range(first, first + len(prompts))
            sampled = sampling.sample(
                self.backbone,
                role,
                [dialogue.encode_prompt(prompt) for prompt in prompts],
                sampling.uniforms(self.recipe.seed, "inside", 0, rows, dialogue.max_response_tokens),
                eos_id=dialogue.end_ids,
                pad_id=dialogue.pad_id,
                temperature=self.recipe.ppo.temperature,
            )
            start = sampled.prompt_ids_BP.shape[1]
            ids_BT, mask_BT, actions_BR = close(
                sampled, start, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id
            )
            batches.append(Batch(ids_BT, mask_BT, start, actions_BR))
            if self.reward_fn is not None:
                texts = [dialogue.decode(ids) for ids in sampled.response_ids_BR.tolist()]
                responses = Responses(list(prompts), texts, ids_BT, mask_BT, None, start)
                scores.append(self.reward_fn(responses).float())
        return Written(batches, torch.cat(scores) if scores else torch.zeros(0))

    def change(self, name: str, after: str, before: str) -> dict[str, Any]:
        """Question one about two roles, of which ``after`` was trained from ``before``.

        The log-prob: of the responses that ``after`` gives, patched into ``before`` and back. The reward: to
        first order around the middle of both, E[r] changes by the mean over a response of each to a prompt of
        (r - mean r) (log-prob after - before), twice that for one pair of samples, so that the row of
        ``after`` counts (r_after - r_before) / 2 and the other the opposite.

        Raises:
            UserError: both roles are the same.
        """
        new, old = of_role(self.backbone, after), of_role(self.backbone, before)
        written = self.write(after)
        own = [(batch, batch) for batch in written.batches]
        number = len(self.prompts)
        ones, groups = torch.ones(number) / number, [*range(number)]
        gain_N = torch.cat(
            [new.measure_plainly(batch) - old.measure_plainly(batch) for batch in written.batches]
        )
        found = {
            "gain": mean_interval(gain_N.cpu().numpy()).as_dict(),
            "into": self._examine(Change(old, new, own, ones, groups, f"{name}: log-prob")),
            "back": self._examine(Change(new, old, own, ones, groups, f"{name}: back"), whole=False),
        }
        if self.reward_fn is None:
            return {**found, "reward": {"skipped": "PPO was given no reward model of this project"}}
        others = self.write(before)
        half_N = (written.scores_N - others.scores_N).cpu() / 2 / number
        both = [(batch, batch) for batch in (*written.batches, *others.batches)]
        weights, groups = torch.cat([half_N, -half_N]), groups * 2
        try:
            found["reward"] = self._examine(Change(old, new, both, weights, groups, f"{name}: reward"))
        except UserError as error:
            found["reward"] = {"skipped": str(error).removeprefix("inside: ")}
        rise = mean_interval((written.scores_N - others.scores_N).cpu().numpy())
        return {**found, "rise": rise.as_dict()}

    def own_pairs(self, role: str) -> list[Pair]:
        """The pairs of ``inside.pairs``, checked, also that their scores by a role with a head differ.

        Raises:
            UserError: a pair is not one, or its scores do not differ.
        """
        files, dialogue = self.recipe.inside.pairs, self.dialogue
        if not files:
            return []
        pairs = own_pairs(
            files,
            dialogue.encode_answer,
            lambda token: repr(dialogue.decode([token])),
            dialogue.max_response_tokens,
            self._refusal,
        )
        if role in self.backbone.heads:
            bad_N, good_N = _scores(of_role(self.backbone, role), self.batches(pairs))
            if (equal := np.flatnonzero(np.abs(good_N - bad_N) < 1e-6)).size:
                pair = pairs[equal[0]]
                raise UserError(
                    f"inside.pairs: {pair.good[:40]!r} and {pair.bad[:40]!r} have the same score, so there "
                    "is no difference whose parts could be found; remove the pair"
                )
        return pairs

    def _refusal(self, prompt: Prompt) -> str | None:
        """Why the model cannot be asked behind a prompt, or None."""
        try:
            self.dialogue.encode_prompt(prompt)
        except (PromptTooLongError, RefusedTurnsError) as error:
            return str(error)
        return None

    def reads(
        self, role: str, own: Sequence[Pair], keep: Callable[[str, Callable[[], Any]], Any]
    ) -> dict[str, Any]:
        """Question two about a role with a head.

        Args:
            role: that is asked.
            own: pairs of the recipe's own (:meth:`own_pairs`).
            keep: gives what is there of a kind, or computes it.
        """
        subject, kinds = of_role(self.backbone, role), {}
        for kind in KINDS:
            pairs, uneven = self.pairs(kind)
            compute = functools.partial(self._kind, subject, kind.name, pairs)
            kinds[kind.name] = keep(f"reads-{kind.name}", compute) | {"asks": kind.asks, "uneven": uneven}
        if own:
            found = keep("reads-own", functools.partial(self._kind, subject, OWN, own))
            kinds[OWN] = found | {"asks": "as you ordered them", "uneven": 0}
        return {"kinds": kinds, "length": self._length(subject)}

    def _kind(self, subject: Subject, name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Scores of the pairs of a kind, and what computes their difference."""
        if not pairs:
            return {"pairs": 0, "skipped": "no pair has equally many tokens, and few enough"}
        batches = self.batches(pairs)
        bad_N, good_N = _scores(subject, batches)
        difference, first = mean_interval(good_N - bad_N), win_rate(bad_N, good_N).mean
        found: dict[str, Any] = {
            "pairs": len(pairs),
            "difference": difference.as_dict(),
            "expected": wilson(first, len(pairs), len(pairs)).as_dict(),
            "example": [pairs[0].good, pairs[0].bad],
        }
        if difference.low <= 0 <= difference.high:
            return found | {"skipped": "the mean difference is not distinguishable from 0, and has no shares"}
        weights = torch.ones(len(pairs)) / len(pairs)
        try:
            change = Change(subject, subject, batches, weights, range(len(pairs)), f"{name} pairs")
            found["parts"] = self._examine(change)
        except UserError as error:
            found["skipped"] = str(error).removeprefix("inside: ")
        return found

    def _length(self, subject: Subject) -> dict[str, Any]:
        """What a neutral sentence behind a response does to its score, by how many there are; numbers of them
        are left out with which a response would be longer than the policy's may be."""
        texts = [(self.prompts[n % len(self.prompts)], good) for n, (good, _) in enumerate(KINDS[0].texts())]
        encode, longest, scores = self.dialogue.encode_answer, self.dialogue.max_response_tokens, []
        for number in range(_PADDINGS + 1):
            padded = [Pair(prompt, f"{text}{f' {FILLER}' * number}", "") for prompt, text in texts]
            if max(len(encode(pair.good)) for pair in padded) > longest:
                break
            scores.append(subject.measure_plainly(self._laid_out(padded, "good")).cpu().numpy())
        added = [mean_interval(score - scores[0]).as_dict() for score in scores[1:]]
        left_out = list(range(len(added) + 1, _PADDINGS + 1))
        return {"filler": FILLER, "tokens": len(encode(f" {FILLER}")), "added": added, "left_out": left_out}

    def pairs(self, kind: Kind) -> tuple[list[Pair], int]:
        """The pairs of a kind, and how many were left out (:func:`pairs_of`)."""
        encode, longest = self.dialogue.encode_answer, self.dialogue.max_response_tokens
        return pairs_of(kind, self.prompts, encode, self.recipe.inside.prompts, longest)

    def batches(self, pairs: Sequence[Pair]) -> list[tuple[Batch, Batch]]:
        """The second and the first of the pairs, as many as are read at once."""
        size = self.recipe.inside.micro_batch_size
        parts = [pairs[first : first + size] for first in range(0, len(pairs), size)]
        return [(self._laid_out(part, "bad"), self._laid_out(part, "good")) for part in parts]

    def _laid_out(self, pairs: Sequence[Pair], side: str) -> Batch:
        """Rows of prompts and one of their responses with its closing."""
        dialogue, encode = self.dialogue, self.dialogue.encode_answer
        prompts, masks = left_pad([dialogue.encode_prompt(pair.prompt) for pair in pairs], dialogue.pad_id)
        ids, own = right_pad([dialogue.close([], encode(getattr(p, side))) for p in pairs], dialogue.pad_id)
        device, start = self.backbone.device, prompts.shape[1]
        ids_BT, mask_BT = torch.cat([prompts, ids], 1), torch.cat([masks, own], 1)
        return Batch(ids_BT.to(device), mask_BT.to(device), start)

    def _examine(self, change: Change, *, whole: bool = True) -> dict[str, Any]:
        options = self.recipe.inside
        with progress(
            f"inside: {change.what}", total=runs_of(change, options, whole=whole), leave=True
        ) as bar:
            tick: Callable[[], object] = bar.update
            return examine(change, options, self.recipe.seed, whole=whole, tick=tick)


def _scores(subject: Subject, batches: Sequence[tuple[Batch, Batch]]) -> list[Any]:
    """Scores of the second and of the first of all pairs, each [N]."""
    sides = zip(*batches, strict=True)
    return [torch.cat([subject.measure_plainly(batch) for batch in side]).cpu().numpy() for side in sides]
