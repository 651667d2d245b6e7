"""A causal language model that scores and generates continuations, behind an optional fixed text.

The fixed text (the HHH prompt of a prompted model) is read once: its key-value states serve every item, and
so do those of whatever all items of a call begin with. Items that begin alike (the answers to one question)
are folded into trees (:mod:`rlhf.evals.prefix_tree`), so that each costs its own tokens only. An architecture
that does not take trees is read in plain padded rows, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.evals.scoring import Job, Scorer
from rlhf.generation.sampling import (
    ModelParts,
    SamplingParams,
    StopStrings,
    generate,
    truncate,
    uniforms,
)
from rlhf.models.token_batches import token_batches
from rlhf.tokenization.special_tokens import special_start
from rlhf.training.progress import progress

_GENERATED_AT_ONCE = 8  # cached tokens while generating, in units of tokens_at_once


class Scored(NamedTuple):
    """A continuation under the model."""

    log_prob: float
    """Sum of the log-probabilities of its tokens, nats."""
    tokens: int
    """Number of its tokens."""
    greedy: bool
    """Whether every token is the most probable one at its place."""


class LanguageModel:
    """A model with its tokenizer, ready for evaluation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer. What it puts before every text (BOS) begins the fixed text.
        prefix_ids: the fixed text that the model runs under, as tokens; none by default.
        tokens_at_once: tokens that the model reads at a time, the fixed text not counted.
        end_of_turn: token that ends a response besides EOS and those of the generation settings.

    Raises:
        UserError: the fixed text fills the model's window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix_ids: Sequence[int] = (),
        tokens_at_once: int = 2048,
        end_of_turn: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokens_at_once = tokens_at_once
        self._end_of_turn = end_of_turn
        start, prefix = special_start(tokenizer), [int(i) for i in prefix_ids]
        self.prefix_ids = prefix if prefix[: len(start)] == start else [*start, *prefix]
        self._scorer = Scorer(self.model, tokens_at_once)
        self.window: int | None = getattr(self._scorer.config, "max_position_embeddings", None)
        if self.window is not None and len(self.prefix_ids) >= self.window:
            raise UserError(
                f"the prompt has {len(self.prefix_ids)} tokens and the model's window {self.window}, which "
                "leaves nothing for an item: shorten the prompt, or use a model with a longer window"
            )

    # ---------------------------------------------------------------- text and tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what continues it, divided as lm-eval does.

        The two are tokenized as one text; the context keeps as many tokens as it has alone, and white space
        at its end belongs to the continuation.
        """
        if not context:
            return [], self.encode(continuation)
        before = self.encode(context.rstrip())
        return before, self.encode(context + continuation)[len(before) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    # ---------------------------------------------------------------- scoring

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        names: Sequence[str] | None = None,
        bare: bool = False,
    ) -> list[Scored]:
        """Log-probability of every continuation behind the fixed text and its context.

        pairs: (context ids, continuation ids). A context may be empty: where there is no fixed text either,
        BOS stands before the continuation, or EOS where the tokenizer has no BOS, as in lm-eval. names: of
        the pairs, for messages. bare: without the fixed text, behind contexts that are not empty.

        Raises:
            UserError: a pair is longer than the model's window, or its continuation is empty.
        """
        prefix = [] if bare else self.prefix_ids
        jobs = [self._job(pair, _name(names, i), len(prefix)) for i, pair in enumerate(pairs)]
        log_probs, greedy = self._scorer.score(prefix, jobs)
        return [
            Scored(log_prob, len(job.targets), best)
            for log_prob, job, best in zip(log_probs, jobs, greedy, strict=True)
        ]

    def _job(self, pair: tuple[Sequence[int], Sequence[int]], name: str, before: int) -> Job:
        context, continuation = list(pair[0]), list(pair[1])
        if not continuation:
            raise UserError(f"{name}: the text to be scored has no token of its own; mend or remove the item")
        if not context and not before:
            context = [self._first_token()]
        job = Job([*context, *continuation[:-1]], len(context) - 1, continuation)
        self._fits(before + len(job.inputs), before, name, "remove the item")
        return job

    def _fits(self, length: int, before: int, name: str, remedy: str) -> None:
        if self.window is not None and length > self.window:
            prompt = f" ({before} of them the prompt's)" if before else ""
            raise UserError(
                f"{name}: {length} tokens{prompt}, and the model's window has {self.window}; {remedy}, or "
                "use a model with a longer window"
            )

    def _first_token(self) -> int:
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither BOS nor EOS, so no text can be "
                "scored from its first token on; use another tokenizer"
            )
        return int(token)

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        contexts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """Continue every context behind the fixed text, up to EOS, a stop string or the limit.

        Args:
            contexts: token ids of each; equal ones are read once and continued differently, each row having
                random numbers of its own, drawn from (seed, number of the row).
            max_new_tokens: longest continuation, tokens.
            temperature: divides the logits; 0 = always the most probable token.
            top_p: sample from the most probable tokens of this mass.
            seed: of the random numbers.
            stop: strings that end a row; they are cut off with all that follows.
            names: of the contexts, for messages.

        Raises:
            UserError: a context and the longest continuation do not fit in the model's window.
        """
        before = len(self.prefix_ids)
        for i, context in enumerate(contexts):
            longest = before + len(context) + max_new_tokens
            self._fits(longest, before, _name(names, i), "allow fewer new tokens")
        trees = self._scorer.takes_trees()
        # the last token of the fixed text begins every row, because its state predicts
        kept = self.prefix_ids[:-1] if trees else []
        lead = self.prefix_ids[len(kept) :]
        rows = [[*lead, *context] or [self._first_token()] for context in contexts]
        stop_strings = StopStrings(tuple(stop), self.decode) if stop else None
        params = SamplingParams(temperature, self._ends(), top_p, stop_strings)
        parts = ModelParts.of(self.model, whole=not trees)
        states = self._scorer.states_of(kept)
        room = [len(kept) + len(row) + max_new_tokens for row in rows]
        texts = [""] * len(rows)
        with progress("generate", total=len(rows)) as bar:
            budget = _GENERATED_AT_ONCE * self.tokens_at_once
            for batch in token_batches(room, budget, longest_first=True, ties=rows):
                uniform_BR = uniforms(seed, "evaluate", 0, batch, max_new_tokens)
                sampled = generate(parts, [rows[i] for i in batch], uniform_BR, params, prefix=states)
                responses = zip(sampled.response_ids_BR.tolist(), sampled.lengths_B.tolist(), strict=True)
                for i, (ids, length) in zip(batch, responses, strict=True):
                    tokens = [token for token in ids[:length] if token not in params.eos_ids]
                    texts[i] = truncate(self.decode(tokens), stop)
                bar.update(len(batch))
        return texts

    def _ends(self) -> frozenset[int]:
        """Tokens that end a response: EOS, the end of a turn, and those of the generation settings."""
        settings: Any = getattr(self.model, "generation_config", None)
        more = getattr(settings, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, self._end_of_turn, *(more if isinstance(more, list) else [more])]
        return frozenset(int(i) for i in ids if i is not None)


def _name(names: Sequence[str] | None, index: int) -> str:
    return f"item {index + 1}" if names is None else names[index]
