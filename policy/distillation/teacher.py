"""Who teaches: the base itself or another model of the same tokenizer, and what its log-probs depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from policy.distillation.data import Passage, content_hash
from policy.distillation.prompted_model import PromptedModel, check_head, shard_records
from policy.distillation.student import Student
from policy.distillation.teacher_cache import TeacherCache
from rlhf.errors import UserError
from rlhf.models.base import best_device, load_base
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill, Model
from rlhf.runs.artifacts import hash_of, sha256_of
from rlhf.tokenization.dialogue import Dialogue, load_tokenizer
from rlhf.tokenization.prompt_prefix import Context, window_of
from rlhf.training.runtime import Runtime

_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class Teacher:
    """The teacher, loaded only when it is needed.

    Args:
        recipe: the whole recipe.
        section: its ``distill`` section.
        dialogue: the student's tokenizer.

    Raises:
        UserError: the teacher is not there, or has another tokenizer.
    """

    def __init__(self, recipe: Recipe, section: Distill, dialogue: Dialogue) -> None:
        self._section = section
        self._model: Model = recipe.model
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
            key = "model.path" if section.teacher is None else "distill.teacher"
            raise UserError(f"{key}: no model at {self._model.path} ({str(error).splitlines()[0]})") from None
        self._commit = getattr(config, "_commit_hash", None)
        self.window = window_of(config)
        self.vocabulary = int(config.get_text_config().vocab_size)

    @property
    def origin(self) -> str:
        """Where the teacher's weights are from."""
        return self._model.path

    def weights(self) -> dict[str, Any]:
        """What tells one teacher's weights from another's: content hashes, or the hub's commit."""
        folder = Path(self._model.path).expanduser()
        if folder.is_dir():
            files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
            source: Any = {file.name: sha256_of(file) for file in files}
        else:
            source = f"{self._model.path} at {self._commit or self._model.revision}"
        return {"weights": source, "dtype": self._model.dtype, "quantization": self._model.quantization}

    def open(self, student: Student, context: Context) -> PromptedModel:
        """The teacher under the prompt; the student's own base where that teaches and is still there.

        Raises:
            UserError: the architecture is not one that can be used here.
        """
        if self._open is None:
            if self._section.teacher is None and student.backbone:
                self._open = PromptedModel(student.base, context.prefix_ids, student.as_teacher)
            else:
                model: Any = load_base(self._model)
                check_head(model)
                self._open = PromptedModel(model.to(best_device()), context.prefix_ids)
        return self._open

    def release(self) -> None:
        """Give the memory back."""
        self._open = None


def check_tokenizer(teacher: Model, student: Model, dialogue: Dialogue) -> None:
    """Words are ids: they mean the same to both only with one tokenizer. The template is the student's.

    Raises:
        UserError: the tokenizers differ.
    """
    limits = {"max_prompt_tokens": 1, "max_response_tokens": 1, "template": "plain"}
    pad = str(dialogue.tokenizer.convert_ids_to_tokens(dialogue.pad_id))
    options = {"trust_remote_code": teacher.trust_remote_code}
    theirs = load_tokenizer(teacher.path, **options)
    try:
        other: str | None = Dialogue(theirs, pad_token=pad, **limits).fingerprint()  # type: ignore[arg-type]
    except UserError:  # no such padding token, or no EOS: not the same
        other = None
    if other != Dialogue(dialogue.tokenizer, pad_token=pad, **limits).fingerprint():  # type: ignore[arg-type]
        raise UserError(
            f"distill.teacher: {teacher.path} has another tokenizer than {student.path}, so what it says is "
            "about other tokens; name a teacher with the same tokenizer, or leave it out"
        )


def key_of(
    recipe: Recipe,
    section: Distill,
    teacher: Teacher,
    context: Context,
    dialogue: Dialogue,
    passages: Sequence[Passage],
) -> dict[str, Any]:
    """All that the teacher's log-probs depend on."""
    return {
        "teacher": teacher.weights(),
        "tokenizer": dialogue.fingerprint(),
        "prompt": {"sha256": context.sha256, "ids": hash_of(context.prefix_ids)},
        "sequences": {"sha256": content_hash(passages), "number": len(passages)},
        "max_tokens": section.max_tokens,
        "top_k": section.top_k,
        "shard_sequences": section.shard_sequences,
        "seed": recipe.seed,
    }


def fill_cache(
    teacher: Callable[[], PromptedModel],
    file: TeacherCache,
    passages: Sequence[Passage],
    runtime: Runtime,
    *,
    budget: int,
    vocabulary: int,
    between: Callable[[], None],
) -> int:
    """Let the teacher say what is not in its file yet; returns how many shards that were.

    Several processes read a shard each, and the first one writes them all.

    Args:
        teacher: gives the model; not called where nothing is missing.
        file: where the log-probs are kept.
        passages: all sequences, in the file's order.
        runtime: the processes; all of them call this.
        budget: tokens of the passages in memory at once.
        vocabulary: size of the student's vocabulary.
        between: called before every round of shards; may end the processes.
    """
    main = runtime.rank == 0
    missing: list[int] = runtime.gather(file.missing() if main else None)[0]
    for start in range(0, len(missing), runtime.world):
        between()
        several = missing[start : start + runtime.world]
        if main and start % (10 * runtime.world) == 0:
            print(f"distill: the teacher reads shard {several[0] + 1} of {file.shards}", flush=True)
        own = None
        if runtime.rank < len(several):
            some = [passages[row] for row in file.sequences_of(several[runtime.rank])]
            own = shard_records(teacher(), some, file, budget, vocabulary)
        for number, records in zip(several, runtime.gather(own), strict=False):
            if main:
                file.write(number, records)
    runtime.barrier()
    return len(missing)
