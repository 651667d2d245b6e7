"""The teacher: the base itself or another model of the same tokenizer, frozen, under the prompt.

Shape suffixes: ``_B`` row, ``_T`` token of a row, ``_P`` token of the prompt, ``_D`` hidden unit, ``_N``
place where a token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from policy.distillation.data import Passage
from rlhf.errors import UserError, first_line
from rlhf.generation.kv_cache import before_rows
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.models.log_probs import check_head, logits_head
from rlhf.models.masks import positions_from_mask, right_pad
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill, Model
from rlhf.runs.artifacts import sha256_of
from rlhf.tokenization.dialogue import Dialogue, load_tokenizer
from rlhf.tokenization.prompt_prefix import Context, window_of

_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class PromptedModel:
    """A frozen model under a prompt, which is read once: its keys and values serve all rows.

    Args:
        model: a causal language model, or a backbone, whose base it is.
        prefix_ids: token ids of the prompt; none is no prompt.
    """

    def __init__(self, model: PreTrainedModel | Backbone, prefix_ids: Sequence[int]) -> None:
        self._backbone = model if isinstance(model, Backbone) else None
        self.model: PreTrainedModel = model.base if isinstance(model, Backbone) else model
        self.head: Any = logits_head(self.model)
        self._decoder: Any = self.model.get_decoder()
        self._config = self.model.config.get_text_config()
        self._prefix = list(prefix_ids)
        self._read: tuple[Tensor, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def states(self, passages: Sequence[Passage]) -> Tensor:
        """The last hidden states from which the tokens of passages are predicted, in their order, [N, D].

        The first token of a passage has one where a prompt or a prefix is before it.
        """
        if self._backbone:
            self._backbone.activate(REFERENCE)
        ids_BT, mask_BT = (t.to(self.device) for t in right_pad([p.teacher_ids for p in passages], 0))
        positions_BT = positions_from_mask(mask_BT)
        rows, length = len(passages), len(self._prefix)
        if not self._prefix:
            hidden_BTD = self._decoder(
                input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_BT, use_cache=False
            ).last_hidden_state
        else:
            last_11D, prompt = self._prompt()
            hidden_BTD = self._decoder(
                input_ids=ids_BT,
                attention_mask=torch.cat([mask_BT.new_ones(rows, length), mask_BT], dim=1).long(),
                position_ids=positions_BT + length,
                past_key_values=before_rows(self._config, prompt, rows),
                use_cache=True,
            ).last_hidden_state
            hidden_BTD = torch.cat([last_11D.expand(rows, -1, -1), hidden_BTD], dim=1)
        wanted_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.bool, device=self.device)
        for row, passage in enumerate(passages):
            before = len(passage.teacher_prefix) + bool(length)  # states before the first token's own
            wanted_BT[row, max(0, before - 1) : before - 1 + len(passage.ids)] = True
        return hidden_BTD[wanted_BT]

    def first_of(self, passage: Passage) -> int:
        """Index of the passage's first token that this model predicts."""
        return 0 if self._prefix or len(passage.teacher_prefix) else 1

    def _prompt(self) -> tuple[Tensor, Any]:
        """The last state of the prompt [1, 1, D] and its cache; computed at the first call."""
        if self._read is None:
            cache: Any = DynamicCache(config=self._config)
            ids_1P = torch.tensor([self._prefix], device=self.device)
            hidden_1PD = self._decoder(
                input_ids=ids_1P, past_key_values=cache, use_cache=True
            ).last_hidden_state
            self._read = hidden_1PD[:, -1:], cache
        return self._read


class Teacher:
    """The teacher of a recipe and its prompt; its weights are loaded only when they are needed.

    Args:
        recipe: the whole recipe.
        section: its ``distill`` section.
        dialogue: the student's tokenizer.

    Raises:
        UserError: the teacher is not there, or has another tokenizer, or the prompt cannot be used.
    """

    def __init__(self, recipe: Recipe, section: Distill, dialogue: Dialogue) -> None:
        self._model: Model = recipe.model
        self._is_base = section.teacher is None
        self._open: PromptedModel | None = None
        if section.teacher is not None:
            self._model = recipe.model.model_copy(update={"path": section.teacher, "revision": None})
            check_tokenizer(self._model, recipe.model, dialogue)
        try:
            config = AutoConfig.from_pretrained(
                self._model.path,
                revision=self._model.revision,
                trust_remote_code=self._model.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            key = "model.path" if self._is_base else "distill.teacher"
            raise UserError(f"{key}: no model at {self._model.path} ({first_line(error)})") from None
        self._commit = getattr(config, "_commit_hash", None)
        self.origin = self._model.path
        self.window = window_of(config)
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.context = Context.read(recipe.hhh_prompt, dialogue, window=self.window)

    def weights(self) -> dict[str, Any]:
        """What tells one teacher's weights from another's: content hashes, or the hub's commit."""
        folder = Path(self.origin).expanduser()
        source: Any = f"{self.origin} at {self._commit or self._model.revision}"
        if folder.is_dir():
            files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
            source = {file.name: sha256_of(file) for file in files}
        return {"weights": source, "dtype": self._model.dtype, "quantization": self._model.quantization}

    def open(self, backbone: Backbone | None) -> PromptedModel:
        """The teacher under the prompt.

        backbone: the student's, whose base is the teacher where the recipe names no other; None = the student
        has no base of its own any more, since all its weights learn.

        Raises:
            UserError: the architecture is not one that can be used here.
        """
        if self._open is None:
            model: Any = backbone
            if not self._is_base or model is None:
                model = load_base(self._model)
                check_head(model)
                model = model.to(best_device())
            self._open = PromptedModel(model, self.context.prefix_ids)
        return self._open

    def release(self) -> None:
        """Give the memory back."""
        self._open = None


def check_tokenizer(teacher: Model, student: Model, dialogue: Dialogue) -> None:
    """Token ids mean the same to both only with one tokenizer. The template is the student's.

    Raises:
        UserError: the tokenizers differ.
    """
    limits = {"max_prompt_tokens": 1, "max_response_tokens": 1, "template": "plain"}
    limits["end_of_turn"] = str(dialogue.tokenizer.convert_ids_to_tokens(dialogue.end_id))
    pad = str(dialogue.tokenizer.convert_ids_to_tokens(dialogue.pad_id))
    theirs = load_tokenizer(teacher.path, trust_remote_code=teacher.trust_remote_code)
    try:
        other: str | None = Dialogue(theirs, pad_token=pad, **limits).fingerprint()  # type: ignore[arg-type]
    except UserError:  # no such padding token, or no EOS: not the same
        other = None
    if other != Dialogue(dialogue.tokenizer, pad_token=pad, **limits).fingerprint():  # type: ignore[arg-type]
        raise UserError(
            f"distill.teacher: {teacher.path} has another tokenizer than {student.path}, so its log-probs "
            "are about other tokens; name a teacher with the same tokenizer, or leave it out"
        )
