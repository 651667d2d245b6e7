"""Log-probabilities of tokens behind a fixed text: by trees where the model takes them, else by whole rows.

Shape suffixes: ``_B`` row, ``_T`` token, ``_R`` tree, ``_W`` node of a tree, ``_S`` place that is read,
``_D`` hidden unit, ``_V`` vocabulary entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.errors import out_of_memory
from rlhf.evals.prefix_tree import Tree, common_start, fold, lay_out, target_log_probs
from rlhf.generation.kv_cache import PrefixStates, prefix_cache
from rlhf.models.log_probs import chunk_of, logits_head
from rlhf.models.masks import attention_window, right_pad
from rlhf.models.token_batches import token_batches
from rlhf.training.progress import progress

_FILLED_UP_TO = 256  # nodes of a tree: with more of them attention is dearer, with fewer less is shared
_TAKES_A_MASK = ("sdpa", "eager")  # attention that takes an additive mask


class Job(NamedTuple):
    """What is to be scored, cut to what the model has to read."""

    inputs: list[int]
    """Tokens behind the fixed text that the model reads: context and continuation without its last token."""
    first: int
    """Place among the inputs that predicts the first token of the continuation; -1 = the fixed text's end."""
    targets: list[int]
    """The continuation."""


class Scorer:
    """Reads jobs with a model.

    Args:
        model: a causal language model.
        tokens_at_once: tokens that the model reads at a time, the fixed text not counted.
    """

    def __init__(self, model: PreTrainedModel, tokens_at_once: int) -> None:
        self.model = model
        self.tokens_at_once = tokens_at_once
        self.config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self._states: tuple[list[int], PrefixStates] = ([], [])  # of the last text that was kept
        self._trees: bool | None = None  # not known before the first call

    @torch.no_grad()
    def score(self, prefix: list[int], jobs: Sequence[Job]) -> tuple[list[float], list[bool]]:
        """Summed log-probability of every job's targets, and whether each of them is the most probable token.

        prefix: the fixed text before every job.
        """
        return self._score(prefix, jobs, trees=self.takes_trees())

    def _score(
        self, prefix: list[int], jobs: Sequence[Job], *, trees: bool
    ) -> tuple[list[float], list[bool]]:
        """trees: what all jobs begin with is read once, and its states stay for the next call; jobs that
        begin alike share a tree. Otherwise each is a whole row by itself."""
        if not jobs:
            return [], []
        kept: list[int] = []
        if trees:
            shared = [*prefix, *common_start([job.inputs[: job.first + 1] for job in jobs])]
            # the last shared token begins every tree: its state predicts, so it is not only looked at
            kept = shared[:-1]
        lead, skip = prefix[len(kept) :], max(0, len(kept) - len(prefix))
        rows = [[*lead, *job.inputs[skip:]] for job in jobs]
        capacity, at_once = 0, self.tokens_at_once // 4  # logits of all positions at once
        if trees:
            at_once = self.tokens_at_once
            capacity = max(*map(len, rows), min(at_once, max(_FILLED_UP_TO, len(kept) // 2)), 0)
        log_probs = torch.zeros(len(jobs), dtype=torch.float64)
        greedy = torch.ones(len(jobs), dtype=torch.bool)
        with progress("score", total=len(jobs)) as bar:
            folded = fold(rows, capacity)
            sizes = [len(tree.tokens) for tree in folded]
            for several in token_batches(sizes, at_once, longest_first=True):
                batch = [folded[n] for n in several]
                owner_S, node_S, target_S = _places(batch, jobs, len(lead) - skip)
                states_ND, head = self._behind(kept, batch) if trees else self._plain(batch)
                logp_S, best_S = target_log_probs(
                    states_ND,
                    head,
                    node_S.to(self.device),
                    target_S.to(self.device),
                    chunk=chunk_of(int(self.config.vocab_size)),
                )
                log_probs.index_add_(0, owner_S, logp_S.double().cpu())
                greedy[owner_S[~best_S.cpu()]] = False
                bar.update(sum(len(tree.paths) for tree in batch))
        return log_probs.tolist(), greedy.tolist()

    def _behind(self, kept: list[int], trees: Sequence[Tree]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """State of every node behind what is kept, and the head that makes logits of states."""
        states = self.states_of(kept)
        ids_RW, positions_RW, mask = lay_out(trees, len(kept), self.model.dtype, self.device)
        cache = prefix_cache(self.config, states) if states else None
        hidden_RWD = self.model.get_decoder()(
            input_ids=ids_RW,
            attention_mask=mask,
            position_ids=positions_RW,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden_RWD.flatten(0, 1), logits_head(self.model)

    def _plain(self, rows: Sequence[Tree]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits of every place by the model's own forward, and the head that leaves them as they are."""
        ids_BT, mask_BT = right_pad([row.tokens for row in rows], 0)
        logits_BTV = self.model(
            input_ids=ids_BT.to(self.device), attention_mask=mask_BT.long().to(self.device)
        ).logits
        return logits_BTV.flatten(0, 1), lambda logits: logits

    @torch.no_grad()
    def states_of(self, ids: list[int]) -> PrefixStates:
        """Keys and values of a text that begins a sequence; those of the last such text are kept."""
        if not ids:
            return []
        if ids != self._states[0]:
            cache: Any = DynamicCache(config=self.config)
            self.model.get_decoder()(
                input_ids=torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True
            )
            self._states = ids, [(layer.keys, layer.values) for layer in cache.layers]
        return self._states[1]

    @torch.no_grad()
    def takes_trees(self) -> bool:
        """Whether trees behind kept states give what plain rows give; tried once, on a few tokens and on a
        row that is longer than what any layer looks back at."""
        if self._trees is None:
            layers = DynamicCache(config=self.config).layers
            everywhere = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
            self._trees = everywhere and self.config._attn_implementation in _TAKES_A_MASK and self._probe()
            if not self._trees:
                print(
                    "evaluate: this architecture takes no trees; what rows share is read again",
                    flush=True,
                )
        return self._trees

    def _probe(self) -> bool:
        half = (attention_window(self.config) or 0) // 2  # text and row together fill the window
        ids = [(7 * i + 3) % int(self.config.vocab_size) for i in range(9 + 2 * half)]
        text, row = ids[: 3 + half], ids[3 + half :]
        jobs = [
            Job(row[:-2], 1, row[2:-1]),
            Job([*row[:2], *row[3:5]], 1, row[3:6]),
            Job(row[1:3], 0, row[2:4]),
        ]
        rows = torch.tensor(self._score(text, jobs, trees=False)[0])
        try:
            trees = torch.tensor(self._score(text, jobs, trees=True)[0])
        except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
            if out_of_memory(error):
                raise
            return False
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        return bool(((trees - rows).abs() <= tolerance * rows.abs().clamp(min=1)).all())


def _places(batch: Sequence[Tree], jobs: Sequence[Job], shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the targets of a batch are predicted: number of the job, node of the whole batch, token.

    shift: place in a row of a job's first input.
    """
    width = max(len(tree.tokens) for tree in batch)
    owner, node, target = [], [], []
    for r, tree in enumerate(batch):
        for number, path in tree.paths.items():
            job = jobs[number]
            start = job.first + shift
            owner += [number] * len(job.targets)
            node += [r * width + n for n in path[start : start + len(job.targets)]]
            target += job.targets
    return torch.tensor(owner), torch.tensor(node), torch.tensor(target)
