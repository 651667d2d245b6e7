"""trl's ``PPOTrainer`` on this project's loop: the same arguments, a LoRA policy and value on one base.

Shape suffixes: ``_B`` response row, ``_T`` token, ``_D`` hidden unit.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from policy.ppo.rollout import Responses, RewardFn, close
from policy.ppo.setup import new_backbone
from policy.ppo.trainer import PpoTrainer
from policy.trl_compat.config import PPOConfig
from rlhf.data.comparisons import Message, Prompt
from rlhf.errors import UserError
from rlhf.generation.sampling import sample, uniforms
from rlhf.models.base import best_device
from rlhf.models.masks import last_true_index
from rlhf.models.merging import with_adapters
from rlhf.recipe.schema import Lora
from rlhf.runs.artifacts import write_jsonl
from rlhf.runs.processes import print_once, processes
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.gradient_checkpointing import checkpoint_layers
from rlhf.training.trackers import TRACKERS

Rows = Iterable[Mapping[str, Any]]
"""A data set of token ids, {"input_ids": [...]}, as trl's trainer takes it."""
_RANK = 64  # of the adapters where no peft_config is given, and the model would be trained in full


class GivenTokens(Dialogue):
    """A dialogue whose prompts come as token ids: each prompt is the text that they decode to.

    What is padding is known by masks alone, so any token pads; the tokenizer keeps the one that it has, which
    in many scripts is EOS, or has no row in the model.

    Args:
        tokenizer: of the policy.
        end_of_turn: token that ends a response.
        options: as of :class:`Dialogue`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, end_of_turn: str, **options: Any) -> None:
        own = tokenizer.pad_token
        pad = next(t for t in tokenizer.convert_ids_to_tokens([0, 1]) if t != end_of_turn)
        super().__init__(tokenizer, template="plain", pad_token=pad, end_of_turn=end_of_turn, **options)
        tokenizer.pad_token = own
        self._given: dict[Prompt, list[int]] = {}

    def take(self, rows: Rows, name: str) -> list[Prompt]:
        """Prompts of a data set, in its order; padding is left out.

        Raises:
            UserError: a row has no token ids.
        """
        prompts: list[Prompt] = []
        for number, row in enumerate(rows):
            if "input_ids" not in row:
                raise UserError(
                    f"PPOTrainer: {name}, row {number + 1}: no column input_ids ({', '.join(row)}); tokenize "
                    "the prompts first, as for trl"
                )
            ids = [int(i) for i in row["input_ids"]]
            if mask := row.get("attention_mask"):
                ids = [i for i, real in zip(ids, mask, strict=True) if real]
            elif (pad := self.tokenizer.pad_token_id) != self.eos_id:
                ids = list(itertools.dropwhile(lambda i: i == pad, ids))
            prompt: Prompt = (Message("user", str(self.tokenizer.decode(ids))),)
            self._given.setdefault(prompt, ids)
            self.max_prompt_tokens = max(self.max_prompt_tokens, len(ids))
            prompts.append(prompt)
        if not prompts:
            raise UserError(f"PPOTrainer: {name} has no rows")
        return prompts

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids that a prompt was given as."""
        return list(self._given[tuple(messages)])


class PPOTrainer:
    """trl 1.12's ``PPOTrainer``: what it was given trains by :class:`policy.ppo.trainer.PpoTrainer`.

    The policy is a LoRA adapter on ``model``, by ``peft_config`` or of rank 64 on all linear maps; the value
    is another on the same base with a head that starts at zero, and ``value_model`` is not used. The
    reference is ``model`` as it was given, so ``ref_model`` must be None or equal to it.

    Args:
        args: the hyperparameters.
        processing_class: the policy's tokenizer.
        model: a causal language model.
        ref_model: None, or a copy of ``model``.
        reward_model: a sequence classifier with one label over the same token ids, read on the last token.
        train_dataset: rows with ``input_ids``.
        value_model: taken for the sake of old scripts.
        data_collator: None, or a ``DataCollatorWithPadding``; rows are padded by the sampler.
        eval_dataset: rows for :meth:`generate_completions`.
        optimizers: (None, None).
        callbacks: None.
        peft_config: a ``LoraConfig``.

    Raises:
        UserError: an argument has no counterpart here, or does not fit the others; where to go instead.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: PreTrainedModel,
        train_dataset: Rows,
        value_model: PreTrainedModel | None = None,
        data_collator: Any = None,
        eval_dataset: Rows | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        _check(model, ref_model, data_collator, optimizers, callbacks)
        self.args, self.processing_class, self.peft_config = args, processing_class, peft_config
        self.dialogue = GivenTokens(
            processing_class,
            max_prompt_tokens=1,
            max_response_tokens=args.response_length,
            end_of_turn=_end_of_turn(args, processing_class),
        )
        prompts = self.dialogue.take(train_dataset, "train_dataset")
        self.eval_prompts = [] if eval_dataset is None else self.dialogue.take(eval_dataset, "eval_dataset")
        section = args.section(len(prompts), processes())
        lora = _lora(peft_config)
        if peft_config is None:
            print_once(
                f"PPOTrainer: no peft_config, so the policy is an adapter of rank {lora.rank}, which wants a "
                f"learning rate 10 to 100 times that of full training ({args.learning_rate:g} now)"
            )
        if value_model is not None:
            print_once(
                "PPOTrainer: the value is an adapter and a head on the policy's base; value_model is unused"
            )
        if args.bf16 or args.fp16:
            model = model.to(torch.bfloat16 if args.bf16 else torch.float16)  # type: ignore[arg-type]
        if args.gradient_checkpointing:
            checkpoint_layers(model.get_decoder())
        torch.manual_seed(args.seed)
        self.model = model.requires_grad_(False).eval()
        self.trainer = PpoTrainer(
            backbone=new_backbone(self.model, lora, section),
            dialogue=self.dialogue,
            prompts=prompts,
            reward_fn=reads_tokens(reward_model.to(best_device()).eval()),  # type: ignore[arg-type]
            section=section,
            folder=str(args.output_dir),
            seed=args.seed,
            trackers=[name for name in args.report_to or () if name in TRACKERS],
        )

    def train(self) -> None:
        """Run all steps; a run that was stopped goes on from the newest checkpoint in ``output_dir``."""
        self.trainer.train()
        self.trainer.save()

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the policy with its tokenizer, ``output_dir`` by default.

        With ``peft_config`` that is the adapter; without, a whole model with the adapter merged into a copy.
        """
        if not self.trainer.is_main:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        adapter = self.trainer.folder / "policy"
        if not adapter.is_dir():
            raise UserError("PPOTrainer: nothing is trained; call train() before save_model()")
        policy: Any = self.trainer.backbone.model
        if self.peft_config is not None:
            for file in adapter.iterdir():
                (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / file.name).write_bytes(file.read_bytes())
            return
        merged = with_adapters(copy.deepcopy(policy).unload(), [(adapter, 1.0)])
        merged.save_pretrained(str(folder))
        self.processing_class.save_pretrained(str(folder))

    @torch.no_grad()
    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer ``eval_dataset``, print the first answers, and write all to ``completions.jsonl``.

        Args:
            sampling: answer the first batch alone, as in trl.

        Returns:
            Rows {"query", "model response", "score"}.
        """
        size, rows = self.args.per_device_eval_batch_size, []
        for first in range(0, len(self.eval_prompts), size):
            batch = self.eval_prompts[first : first + size]
            rows += self._completed(batch, range(first, first + len(batch)))
            if sampling:
                break
        if self.trainer.is_main:
            write_jsonl(self.trainer.folder / "completions.jsonl", rows)
            for row in rows[:5]:
                print(f"{row['score']:8.3f}  {row['query'][-60:]!r} -> {row['model response'][:100]!r}")
        return rows

    def _completed(self, batch: Sequence[Prompt], rows: Sequence[int]) -> list[dict[str, Any]]:
        dialogue, backbone = self.dialogue, self.trainer.backbone
        sampled = sample(
            backbone,
            "policy",
            [dialogue.encode_prompt(prompt) for prompt in batch],
            uniforms(self.args.seed, "evaluate", 0, rows, dialogue.max_response_tokens),
            eos_id=dialogue.end_ids,
            pad_id=dialogue.pad_id,
            temperature=0.01,  # as in trl
        )
        start = sampled.prompt_ids_BP.shape[1]
        ids_BT, mask_BT, _ = close(sampled, start, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id)
        texts = [dialogue.decode(ids) for ids in sampled.response_ids_BR.tolist()]
        scores = self.trainer.reward_fn(Responses(list(batch), texts, ids_BT, mask_BT, None, start)).tolist()
        queries = [prompt[0].content for prompt in batch]
        return [
            {"query": query, "model response": text, "score": score}
            for query, text, score in zip(queries, texts, scores, strict=True)
        ]


def reads_tokens(model: Any) -> RewardFn:
    """A sequence classifier's score on the last token of prompt and response, as trl reads it.

    The token ids go in as the policy wrote them; a response that was cut at the length limit is not closed.
    """
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(
            f"PPOTrainer: reward_model is a {type(model).__name__} without a head `score`; give an "
            "AutoModelForSequenceClassification with num_labels=1"
        )
    decoder: Callable[..., Any] = getattr(model, model.base_model_prefix)

    def score(responses: Responses) -> Tensor:
        ids_BT, mask_BT = responses.ids_BT[:, :-1], responses.mask_BT[:, :-1]  # without what closes a cut one
        hidden_BTD = decoder(
            input_ids=ids_BT.masked_fill(~mask_BT, 0),
            attention_mask=mask_BT.long(),
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(ids_BT), device=ids_BT.device)
        found: Tensor = model.score(hidden_BTD[rows, last_true_index(mask_BT)])
        return found.float().squeeze(-1)

    return score


def _check(
    model: Any,
    ref_model: Any,
    data_collator: Any,
    optimizers: tuple[Any, Any],
    callbacks: Sequence[Any] | None,
) -> None:
    """Refuse what would be ignored."""
    faults = {
        "optimizers": "AdamW with the learning rate and schedule of the arguments" if any(optimizers) else "",
        "callbacks": "metrics.jsonl in output_dir has every step" if callbacks else "",
        "data_collator": "" if data_collator is None or isinstance(data_collator, DataCollatorWithPadding)
        else "rows are padded by the sampler",
    }  # fmt: skip
    for name, remedy in faults.items():
        if remedy:
            raise UserError(f"PPOTrainer: {name} has no counterpart here: {remedy}; leave it out")
    if hasattr(model, "peft_config"):
        raise UserError(
            "PPOTrainer: model has an adapter already: merge it (merge_and_unload), and pass peft_config"
        )
    if ref_model is model:
        raise UserError("PPOTrainer: model and ref_model are one object; give None, or a copy")
    if ref_model is not None:
        own, other = model.state_dict(), ref_model.state_dict()
        same = own.keys() == other.keys() and all(
            torch.equal(own[name].cpu(), tensor.cpu()) for name, tensor in other.items()
        )
        if not same:
            raise UserError(
                "PPOTrainer: ref_model differs from model, and the reference here is the model that training "
                "starts from; give ref_model=None"
            )


def _end_of_turn(args: PPOConfig, tokenizer: Any) -> str:
    """The token that ends a response."""
    if args.stop_token is None and args.stop_token_id is not None:
        return str(tokenizer.convert_ids_to_tokens(args.stop_token_id))
    if args.stop_token is None:
        print_once(
            "PPOTrainer: a response ends at EOS; trl without a stop_token sampled on to response_length"
        )
    return str(tokenizer.eos_token)


def _lora(config: Any) -> Lora:
    """The adapters' shape by a ``LoraConfig``.

    Raises:
        UserError: it asks for more than low-rank updates of linear maps.
    """
    if config is None:
        return Lora(rank=_RANK, alpha=2 * _RANK)
    beyond = {
        name: getattr(config, name, None)
        for name in ("modules_to_save", "use_dora", "layers_to_transform", "rank_pattern", "alpha_pattern",
                     "target_parameters", "exclude_modules", "trainable_token_indices", "layer_replication")
    }  # fmt: skip
    given = [name for name, value in beyond.items() if value]
    if type(config).__name__ != "LoraConfig" or given or getattr(config, "bias", "none") != "none":
        what = ", ".join(given) or f"{type(config).__name__} with bias {getattr(config, 'bias', None)}"
        raise UserError(
            f"PPOTrainer: peft_config: {what} has no counterpart here; give r, lora_alpha, target_modules"
        )
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return Lora(rank=config.r, alpha=alpha)
    return Lora(rank=config.r, alpha=alpha, targets=sorted(targets))
