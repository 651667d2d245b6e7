"""What context distillation trains: an adapter on the frozen base, or all weights; and what it reads.

Shape suffixes: ``_B`` row, ``_T`` token of a row, ``_D`` hidden unit, ``_N`` place where a token is
predicted.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from policy.distillation.data import Passage
from policy.distillation.loss import TopKLogProbs
from policy.distillation.teacher_cache import TeacherCache
from rlhf.models.backbone import REFERENCE, WEIGHTS_SHARDED, Backbone, layers_of
from rlhf.models.base import load_base
from rlhf.models.log_probs import check_head, logits_head
from rlhf.models.masks import positions_from_mask, right_pad
from rlhf.models.token_batches import token_batches
from rlhf.models.trunk_cache import TrunkCache, keeps_trunk, trunk_bytes
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import write_atomically
from rlhf.training.progress import progress

ADAPTER, MODEL = "policy", "model"  # folders of the results
_TRUNK_TOKENS = 4096  # tokens of a batch whose trunk is computed; the same for every recipe
_WEIGHTS = "model.safetensors"


class Batch(NamedTuple):
    """Passages that are read together, and the teacher's log-probs about them."""

    rows: list[int]
    """Their numbers."""
    ids_BT: Tensor
    mask_BT: Tensor
    """True = a real token."""
    before_BT: Tensor
    """True = a token whose successor is predicted; N of them."""
    teacher: TopKLogProbs
    targets_N: Tensor
    """The successors."""
    teacher_log_probs_N: Tensor
    """Of the successors."""
    row_N: Tensor
    """Index into ``rows``."""
    response_N: Tensor
    """True = a token of an answer, or any one of a text."""


def collate(
    rows: Sequence[int], passages: Sequence[Passage], cache: TeacherCache, device: torch.device
) -> Batch:
    """The batch of these rows of ``passages``."""
    some = [passages[row] for row in rows]
    ids_BT, mask_BT = right_pad([p.student_ids for p in some], 0)
    before_BT = torch.zeros_like(mask_BT)
    for index, p in enumerate(some):
        end = len(p.student_ids) - 1
        before_BT[index, end - p.places : end] = True
    found = np.concatenate([cache.records(row, p)[p.first :] for row, p in zip(rows, some, strict=True)])
    row_N = np.repeat(np.arange(len(some)), [p.places for p in some])
    response_N = np.concatenate([np.arange(p.first, len(p.ids)) >= p.response_start for p in some])
    index_NK, top_k_NK, rest_N, token_N, log_prob_N = (
        torch.from_numpy(np.array(found[name], dtype=kind)).to(device)
        for name, kind in (
            ("index", np.int64),
            ("log_prob", None),
            ("log_rest", None),
            ("token", np.int64),
            ("log_prob_of_token", None),
        )
    )
    return Batch(
        list(rows),
        ids_BT.to(device),
        mask_BT.to(device),
        before_BT.to(device),
        TopKLogProbs(index_NK, top_k_NK, rest_N),
        token_N,
        log_prob_N,
        torch.from_numpy(row_N).to(device),
        torch.from_numpy(response_N).to(device),
    )


class Student:
    """The model that learns.

    Args:
        recipe: the whole recipe.
        section: its ``distill`` section.
        start: folder of the adapter that it starts from; None = the base.
        say: gets a line that the user should read.

    Raises:
        UserError: the architecture is not one that can be used here, or the base cannot learn as a whole.
    """

    def __init__(
        self, recipe: Recipe, section: Distill, start: Path | None, say: Callable[[str], None] = print
    ) -> None:
        whole = section.method == "full"
        base: Any = load_base(recipe.model)
        self.backbone: Backbone | None = None
        self.origin = f"{recipe.model.path}, {'all weights' if whole else 'fresh adapter'}"
        if start or not whole:
            torch.manual_seed(recipe.seed)
            self.backbone = Backbone(base, recipe.lora, adapters=[ADAPTER], trainable=[ADAPTER])
            if start:
                count = self.backbone.load_adapter(ADAPTER, start)
                self.origin = f"{recipe.model.path}, {count} tensors of {start}"
        if whole and self.backbone:
            self.backbone.activate(ADAPTER)
            base, self.backbone = self.backbone.model.merge_and_unload(), None
        if self.backbone:
            if warning := self.backbone.check_architecture():
                say(f"warning: {warning}")
        else:
            base.requires_grad_(True)
            check_head(base)
        self._use(base)

    @classmethod
    def of(cls, backbone: Backbone) -> Student:
        """The adapter ``policy`` of a backbone that was made elsewhere."""
        student = cls.__new__(cls)
        student.backbone, student.origin = backbone, "a backbone"
        student._use(backbone.base)
        return student

    def _use(self, base: Any) -> None:
        self.base: Any = base
        self.head: Any = logits_head(base)
        """States to logits."""
        self.module: nn.Module = self.backbone or base
        self._adapted = True

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by its saved name."""
        if self.backbone:
            return self.backbone.parameters_of(ADAPTER)
        return dict(self.base.named_parameters())

    def before_sharding(self) -> None:
        """Get ready for weights of which each process will keep a part (ZeRO-3).

        The frozen head is needed whole at every pass; layers are gathered at every pass, trunk or not.
        """
        assert self.backbone, "refused before"
        self.head = copy.deepcopy(self.head).requires_grad_(False)
        self.backbone.drop_trunk(WEIGHTS_SHARDED)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Be the base inside, whatever was started from or learned."""
        assert self.backbone, "without an adapter the base is not kept"
        self._adapted = False
        try:
            yield
        finally:
            self._adapted = True

    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """Have the adapter folded in while its weights do not change."""
        adapted = self.backbone if self._adapted else None
        with adapted.folded(ADAPTER) if adapted else contextlib.nullcontext():
            yield

    def states(self, batch: Batch, trunk: TrunkCache | None = None) -> Tensor:
        """The last hidden states at the batch's places, [N, D]."""
        inputs: dict[str, Any] = {"input_ids": batch.ids_BT}
        part, cut_at = "all", 0
        if self.backbone:
            self.backbone.activate(ADAPTER if self._adapted else REFERENCE)
            if cut_at := self.backbone.frozen_layers:
                kept = trunk.states(batch.rows, batch.ids_BT) if trunk else None
                if kept is None:
                    kept = self.backbone.trunk(batch.ids_BT, batch.mask_BT)
                part, inputs = "top", {"inputs_embeds": kept}
        decoder: Any = self.base.get_decoder()
        with layers_of(decoder, part, cut_at):
            hidden_BTD = decoder(
                **inputs,
                attention_mask=batch.mask_BT.long(),
                position_ids=positions_from_mask(batch.mask_BT),
                use_cache=False,
            ).last_hidden_state
        return hidden_BTD[batch.before_BT]

    def save(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write what has been learned, to go on from.

        tensors: whole tensors by saved name, where the parameters are sharded.
        """
        if self.backbone:
            self.backbone.save_adapter(ADAPTER, folder, tensors)
        else:
            whole = {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()}
            write_atomically(folder / _WEIGHTS, save(whole, metadata={"format": "pt"}))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        if self.backbone:
            self.backbone.load_adapter(ADAPTER, folder)
            return
        saved = load_file(folder / _WEIGHTS)
        for name, parameter in self.parameters().items():
            parameter.copy_(saved[name])

    def export(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
        """Write the result in the format that everybody reads; returns where. ``tensors`` as in save."""
        if self.backbone:
            (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
            self.backbone.save_adapter(ADAPTER, folder / ADAPTER, tensors)
            return folder / ADAPTER
        self.base.save_pretrained(str(folder / MODEL))
        return folder / MODEL


def trunk_of(student: Student, passages: Sequence[Passage], section: Distill) -> TrunkCache | None:
    """Hidden states of all rows below the first layer that learns; None where there are none to keep.

    They are computed in batches that depend on the rows alone, so that a resumed run has the same ones.
    """
    backbone, rows = student.backbone, [p.student_ids for p in passages]
    widths = list(map(len, rows))
    needed = trunk_bytes(student.base, sum(widths))
    frozen, why = (backbone.frozen_layers, backbone.no_trunk) if backbone else (0, "distill.method is full")
    if not keeps_trunk(section, frozen, needed, no_trunk=why) or not backbone:
        return None
    trunk = TrunkCache()
    for some in progress("trunk", token_batches(widths, _TRUNK_TOKENS)):
        ids_BT, mask_BT = (t.to(backbone.device) for t in right_pad([rows[n] for n in some], 0))
        hidden_BTD = backbone.trunk(ids_BT, mask_BT)
        assert hidden_BTD is not None
        trunk.add(some, hidden_BTD, mask_BT)
    return trunk
