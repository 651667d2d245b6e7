"""A frozen model under a prompt: the prompt is read once, its keys and values serve all rows.

Shape suffixes: ``_B`` row, ``_T`` token of a row, ``_P`` token of the prompt, ``_D`` hidden unit, ``_N``
place where a token is predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policy.distillation.data import Passage
from policy.distillation.loss import teach
from policy.distillation.teacher_cache import TeacherCache
from rlhf.errors import UserError
from rlhf.models.log_probs import chunk_of
from rlhf.models.masks import positions_from_mask, right_pad
from rlhf.models.token_batches import token_batches


class _Shared(DynamicLayer):
    """A prompt's keys and values in one layer, [1, head, P, D], before those of any number of rows.

    Rows are read in one pass each and leave nothing behind, so the same layer serves the next ones.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
        """The prompt's states and the rows' own."""
        return tuple(
            torch.cat([own.expand(len(new), -1, -1, -1), new], dim=-2)  # type: ignore[union-attr]
            for own, new in ((self.keys, key_states), (self.values, value_states))
        )


class PromptedModel:
    """The teacher.

    Args:
        model: a frozen causal language model.
        prefix_ids: token ids of the prompt; none is no prompt.
        activate: called before every pass, where the model has other roles too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix_ids: Sequence[int],
        activate: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.activate = model, activate
        self.head: Any = model.get_output_embeddings()
        self._decoder: Any = model.get_decoder()
        self._prefix = list(prefix_ids)
        self._read: tuple[Tensor, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def states(self, passages: Sequence[Passage]) -> Tensor:
        """The last hidden states from which the tokens of passages are predicted, in their order, [N, D].

        The first token of a passage has one where a prompt or an opening is before it.
        """
        self.activate()
        rows = [[*p.opening.tolist(), *p.ids.tolist()] for p in passages]
        ids_BT, mask_BT = (t.to(self.device) for t in right_pad(rows, 0))
        positions_BT = positions_from_mask(mask_BT)
        if not self._prefix:
            hidden_BTD = self._decoder(
                input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_BT, use_cache=False
            ).last_hidden_state
        else:
            last_11D, cache = self._prompt()
            before_BP = mask_BT.new_ones(len(rows), len(self._prefix))
            hidden_BTD = self._decoder(
                input_ids=ids_BT,
                attention_mask=torch.cat([before_BP, mask_BT], dim=1).long(),
                position_ids=positions_BT + len(self._prefix),
                past_key_values=self._for_rows(cache, len(rows)),
                use_cache=True,
            ).last_hidden_state
            hidden_BTD = torch.cat([last_11D.expand(len(rows), -1, -1), hidden_BTD], dim=1)
        wanted_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.bool, device=self.device)
        for row, passage in enumerate(passages):
            before = len(passage.opening) + bool(self._prefix)  # states before that of the first token itself
            wanted_BT[row, max(0, before - 1) : before - 1 + len(passage.ids)] = True
        return hidden_BTD[wanted_BT]

    def first_of(self, passage: Passage) -> int:
        """Index of the passage's first token that this model predicts."""
        return 0 if self._prefix or len(passage.opening) else 1

    def _prompt(self) -> tuple[Tensor, Any]:
        """The last state of the prompt [1, 1, D] and its cache; computed at the first call."""
        if self._read is None:
            ids_1P = torch.tensor([self._prefix], device=self.device)
            cache: Any = DynamicCache(config=self.model.config.get_text_config())
            hidden_1PD = self._decoder(
                input_ids=ids_1P, past_key_values=cache, use_cache=True
            ).last_hidden_state
            if all(type(layer) is DynamicLayer for layer in cache.layers):
                cache.layers = [_Shared(layer) for layer in cache.layers]
            self._read = hidden_1PD[:, -1:], cache
        return self._read

    @staticmethod
    def _for_rows(cache: Any, rows: int) -> Any:
        if all(isinstance(layer, _Shared) for layer in cache.layers):
            return cache
        cache = copy.deepcopy(cache)  # of a kind that changes while it is used
        cache.batch_repeat_interleave(rows)
        return cache


def check_head(model: PreTrainedModel) -> None:
    """A model's logits must be its vocabulary head's, as everything here takes for granted.

    Raises:
        UserError: they are not, as with soft-capped or scaled logits.
    """
    head: Any = model.get_output_embeddings()
    decoder: Any = model.get_decoder()
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % int(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(head(hidden), logits, atol=1e-3):
        raise UserError(
            f"{model.config.name_or_path}: this architecture changes its logits after the vocabulary head, "
            "which the log-probs here do not know; use another model"
        )


def shard_records(
    teacher: PromptedModel, passages: Sequence[Passage], file: TeacherCache, budget: int, vocabulary: int
) -> NDArray[Any]:
    """The records of passages, one after the other; a token that nothing stands before has an empty one.

    Args:
        teacher: the model under the prompt.
        passages: those of one shard.
        file: whose records they will be.
        budget: tokens of the passages in memory at once.
        vocabulary: size of the student's vocabulary.
    """
    starts = np.cumsum([0, *(len(p.ids) for p in passages)])
    records = np.zeros(int(starts[-1]), dtype=file.type)
    records["token"] = np.concatenate([p.ids for p in passages])
    k = file.type["index"].shape[0]
    for batch in token_batches([len(p.opening) + len(p.ids) for p in passages], budget):
        some = [passages[n] for n in batch]
        hidden_ND = teacher.states(some)
        firsts = [teacher.first_of(p) for p in some]
        targets = np.concatenate([p.ids[first:] for p, first in zip(some, firsts, strict=True)])
        targets_N = torch.from_numpy(targets.astype(np.int64)).to(hidden_ND.device)
        words, taught_N = teach(
            hidden_ND, teacher.head, targets_N, k=k, chunk=chunk_of(vocabulary), vocabulary=vocabulary
        )
        found = {
            "index": words.indices_NK,
            "log_prob": words.top_k.log_probs_NK,
            "log_rest": words.top_k.log_rest_N,
            "log_prob_of_token": taught_N,
        }
        places = np.concatenate(
            [np.arange(starts[n] + first, starts[n + 1]) for n, first in zip(batch, firsts, strict=True)]
        )
        for name, tensor in found.items():
            records[name][places] = tensor.cpu().numpy()
    return records
