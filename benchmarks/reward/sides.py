"""One child of the benchmark of the reward stage: prepare the rows, or train one side and measure it.

``python -m benchmarks.reward.sides tiny|prepare|ours|theirs TASK RESULT``; both files are JSON. Both sides
read the same token ids, which ``prepare`` has written.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import reward.training.trainer
from benchmarks.harness import Figures, peak_bytes, serve, weights_dtype
from benchmarks.synthetic_hh import hh_shaped
from reward.model.batch import Example, encode
from reward.model.model import new_reward_model
from rlhf.data.comparisons import Comparison
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError, exit_on_user_error
from rlhf.models.lora import lora_config
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import read_json
from rlhf.tokenization.dialogue import Dialogue, PromptTooLongError, load_tokenizer
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import seed_everything

OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0}
SCHEDULE, WARMUP = "cosine", 0.05  # the latter as a share of the steps


@dataclass(frozen=True)
class Task:
    """What both sides do alike."""

    base: str
    """Folder of the base model."""
    rows: str
    """File of the encoded comparisons."""
    layers: str
    """``all`` or ``top_<k>``: which layers have an adapter."""
    batch_size: int
    """Comparisons an optimizer step."""
    epochs: int = 1
    max_tokens: int = 256
    """Longest sequence: prompt, response and closing EOS."""
    tokens_per_micro_batch: int = 4096
    """Of ours, as in a recipe."""
    their_pairs_at_once: int | None = None
    """Pairs of a forward pass of theirs; None = those of a step, which is trl's default."""
    dtype: str = "float32"
    """Of the base: a type of torch's, or of theirs ``autocast``: float32 weights, products in bfloat16."""
    seed: int = 0


def recipe_of(task: Task) -> Recipe:
    """The recipe that does a task with our own stage."""
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "seed": task.seed,
            "model": {"path": task.base, "dtype": weights_dtype(task.dtype)},
            "lora": {"rank": 8, "alpha": 16, "layers": task.layers},
            "dialogue": {"template": "chat"},
            "data": {"comparisons": "none"},
            "reward": {
                **OPTIMIZER,
                "schedule": SCHEDULE,
                "warmup_ratio": WARMUP,
                "epochs": task.epochs,
                "batch_size": task.batch_size,
                "tokens_per_micro_batch": task.tokens_per_micro_batch,
                "checkpoint_every": 1_000_000,
            },
        }
    )


def dialogue_of(base: str, max_tokens: int) -> Dialogue:
    """The token contract of both sides: the chat template, EOS behind every response."""
    return Dialogue(
        load_tokenizer(base), template="chat", max_prompt_tokens=max_tokens, max_response_tokens=max_tokens
    )


# ------------------------------------------------------------------ rows


def prepare(
    base: str, files: list[str], responses: int, number: int, max_tokens: int, seed: int, scale: float = 1.0
) -> list[Example]:
    """Encode comparisons with the wanted number of responses, none of whose sequences is too long.

    Args:
        base: folder of the model, for its tokenizer.
        files: of comparisons; none = made of the seed.
        responses: the best so many of every comparison, without a tie.
        number: of comparisons.
        max_tokens: longest sequence.
        seed: of the order, or of the made comparisons.
        scale: of the lengths of made comparisons.

    Raises:
        UserError: the files hold too few of them.
    """
    dialogue = dialogue_of(base, max_tokens)
    comparisons: Iterable[Comparison] = hh_shaped(seed, responses, scale)
    if files:
        comparisons, _ = read_comparisons(files, on_bad_rows="skip")
        random.Random(seed).shuffle(comparisons)
    rows: list[Example] = []
    for some in filter(None, (_best(comparison, responses) for comparison in comparisons)):
        try:
            (row,) = encode([some], dialogue, first=len(rows)) or ({"responses": ()},)
        except PromptTooLongError:
            continue
        kept = len(row["responses"]) == responses  # none is equal to another one after the cut
        if kept and len(row["prompt"]) + max(map(len, row["responses"])) <= max_tokens:
            rows.append(row)
        if len(rows) == number:
            return rows
    raise UserError(
        f"{', '.join(Path(f).name for f in files)}: {len(rows)} comparisons with {responses} "
        f"untied responses of at most {max_tokens} tokens, {number} are wanted: ask for fewer"
    )


def _best(comparison: Comparison, number: int) -> Comparison | None:
    """The best responses of a comparison in their order, None where it has not as many without a tie."""
    ranked = sorted(zip(comparison.ranks, comparison.responses, strict=True))
    if len(ranked) < number or len(set(comparison.ranks)) < len(ranked) or (number == 2 < len(ranked)):
        return None
    texts = tuple(text for _, text in ranked[:number])
    return Comparison(comparison.prompt, texts, tuple(range(number)), comparison.source)


def pairs_of(rows: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """All pairs of every comparison in the columns that ``trl.RewardTrainer`` takes as tokenized already.

    The others give where a pair comes from; the trainer leaves them alone.
    """
    for row in rows:
        whole = [[*row["prompt"], *response] for response in row["responses"]]
        for better, worse in itertools.combinations(range(len(whole)), 2):
            yield {
                "chosen_ids": whole[better],
                "rejected_ids": whole[worse],
                "comparison": row["index"],
                "numbers": [better, worse],
                "prompt_tokens": len(row["prompt"]),
            }


def response_tokens_of(rows: Iterable[Example]) -> int:
    """Tokens of all responses of comparisons, their closings included."""
    return sum(len(response) for row in rows for response in row["responses"])


def response_tokens_in(pairs: Iterable[dict[str, Any]]) -> int:
    """The same of the comparisons that pairs are made of, each response counted once."""
    found: dict[tuple[int, int], int] = {}
    for pair in pairs:
        for number, ids in zip(pair["numbers"], (pair["chosen_ids"], pair["rejected_ids"]), strict=True):
            found[pair["comparison"], number] = len(ids) - pair["prompt_tokens"]
    return sum(found.values())


# ------------------------------------------------------------------ measuring


class Reading(NamedTuple):
    """Clocks and work at one moment."""

    wall: float
    """Seconds."""
    cpu: float
    """Processor seconds of all threads."""
    positions: float
    """Token positions, padding included, that have gone forward through the whole decoder."""

    def since(self, before: Reading) -> Reading:
        """What has passed since an earlier reading."""
        return Reading(*(a - b for a, b in zip(self, before, strict=True)))


class Watch:
    """Readings after every optimizer step, taken by hooks that are the same for both sides.

    Args:
        model: a sequence classifier with adapters, loaded.
    """

    def __init__(self, model: Any) -> None:
        layers = model.base_model.model.base_model.layers
        self._positions = 0
        self._layers = len(layers)
        for layer in layers:
            layer.register_forward_pre_hook(self._count)
        self._hook = register_optimizer_step_post_hook(lambda *_: self.steps.append(self.read()))
        self.steps: list[Reading] = []
        self.trunk = Reading(0.0, 0.0, 0.0)
        """What went into states that were computed before the first step."""
        self.start = self.read()

    def _count(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._positions += inputs[0].shape[0] * inputs[0].shape[1]

    def read(self) -> Reading:
        """Now."""
        return Reading(time.perf_counter(), time.process_time(), self._positions / self._layers)

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts as work on the states before the first step."""

        def run(*args: Any, **options: Any) -> Any:
            before = self.read()
            found = work(*args, **options)
            self.trunk = self.read().since(before)
            return found

        return run

    def figures(self, comparisons: int, batch_size: int) -> Figures:
        """The measurement of a finished training.

        Steady is everything behind the first optimizer step, and as large a share of the trunk: states below
        the first adapted layer are training time even where they are computed before the first step.

        Args:
            comparisons: trained on, over all epochs.
            batch_size: comparisons of the first step, which steady leaves out.
        """
        self._hook.remove()
        whole = self.steps[-1].since(self.start).wall
        counted = comparisons - batch_size
        share = counted / comparisons
        steady = self.steps[-1].since(self.steps[0])
        cost = Reading(*(a + share * b for a, b in zip(steady, self.trunk, strict=True)))
        between = itertools.pairwise([self.start, *self.steps])
        return {
            "comparisons": comparisons,
            "comparisons_steady": counted,
            "steps": len(self.steps),
            "step_s": [b.wall - a.wall for a, b in between],
            "trunk_s": self.trunk.wall,
            "steady_s": cost.wall,
            "whole_s": whole,
            "comparisons_per_s": counted / cost.wall,
            "s_per_comparison": cost.wall / counted,
            "cpu_s_per_comparison": cost.cpu / counted,
            "whole_s_per_comparison": whole / comparisons,
            "positions_per_comparison": cost.positions / counted,
            "peak_bytes": peak_bytes(),
        }


def trainable(model: nn.Module) -> int:
    """Number of weights that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------ the two sides


def ours(task: Task, rows: list[Example], scratch: Path) -> Figures:
    """The training of the reward stage as ``make reward`` does it, from a fresh model to its last step."""
    recipe, dialogue = recipe_of(task), dialogue_of(task.base, task.max_tokens)
    model = new_reward_model(recipe, dialogue)
    learns = trainable(model)
    packed: list[Example] = []  # what has gone through the training, in its order
    watch, module = Watch(model), reward.training.trainer
    pack = module.pack

    def pack_and_note(examples: Sequence[Example], *args: Any, **options: Any) -> Any:
        packed.extend(examples)
        return pack(examples, *args, **options)

    with patch.multiple(module, build_trunk=watch.timed(module.build_trunk), pack=pack_and_note):
        plan = module.plan_forward(recipe, recipe.reward, model, rows, dialogue)
        module.train_preference_model(recipe, recipe.reward, dialogue, model, rows, plan, folder=scratch)
    return {
        **watch.figures(len(packed), task.batch_size),
        "prompts_shared": plan.share,
        "trunk_kept": plan.trunk is not None,
        "response_tokens": response_tokens_of(packed) // task.epochs,
        "trainable_parameters": learns,
        "losses": [line["reward/loss"] for line in read_metrics(scratch)],
    }


class _Watched(RewardTrainer):
    """Keeps the loss of every pass; everything else is the trainer's own."""

    def __init__(self, **options: Any) -> None:
        self.losses: list[Tensor] = []
        super().__init__(**options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.losses.append(loss.detach())
        return loss


def theirs(task: Task, rows: list[Example], scratch: Path) -> Figures:
    """``trl.RewardTrainer`` as it comes, on the pairs of the same comparisons."""
    dialogue = dialogue_of(task.base, task.max_tokens)
    seed_everything(task.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        task.base,
        num_labels=1,
        dtype=getattr(torch, weights_dtype(task.dtype)),
        pad_token_id=dialogue.pad_id,
    )
    adapter = lora_config(recipe_of(task).lora, base, task="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, adapter)
    learns = trainable(model)
    pairs = list(pairs_of(rows))
    each = len(pairs) // len(rows)  # pairs of a comparison
    at_once = task.their_pairs_at_once or task.batch_size * each
    parts, rest = divmod(task.batch_size * each, at_once)
    if rest:
        raise UserError(f"--their-pairs-at-once {at_once}: use a divisor of {task.batch_size * each}, a step")
    watch = Watch(model)
    trainer = _Watched(
        model=model,
        args=RewardConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=parts,
            num_train_epochs=task.epochs,
            **OPTIMIZER,
            lr_scheduler_type=SCHEDULE,
            warmup_steps=WARMUP,
            max_length=task.max_tokens,
            seed=task.seed,
            data_seed=task.seed,
            use_cpu=True,
            bf16=task.dtype == "autocast",
            gradient_checkpointing=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=dialogue.tokenizer,
    )
    trainer.train()
    taken: Any = trainer.train_dataset
    losses = torch.stack(trainer.losses).split(parts)
    return {
        **watch.figures(task.epochs * len(taken) // each, task.batch_size),
        "pairs_at_once": at_once,
        "response_tokens": response_tokens_in(taken),
        "trainable_parameters": learns,
        "losses": [float(step.mean()) for step in losses],
    }


def measured(side: Callable[[Task, list[Example], Path], Figures], task: Task) -> Figures:
    """One side in a scratch folder, with everything that its rows hold."""
    rows = read_json(Path(task.rows))["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        figures = side(task, rows, Path(scratch))
    found, expected = figures["response_tokens"], response_tokens_of(rows)
    if found != expected:
        raise RuntimeError(f"{found} response tokens went through the training, of {expected}")
    figures |= {"first_loss": figures["losses"][0], "final_loss": figures["losses"][-1]}
    return figures | {"threads": torch.get_num_threads(), "task": {**asdict(task), "rows": "", "base": ""}}


KINDS: dict[str, Callable[..., Figures]] = {
    "prepare": lambda **wanted: {"rows": prepare(**wanted)},
    "ours": lambda **values: measured(ours, Task(**values)),
    "theirs": lambda **values: measured(theirs, Task(**values)),
}

if __name__ == "__main__":
    exit_on_user_error(lambda: serve(KINDS))
