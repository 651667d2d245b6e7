"""The work of the distill stage: compute the teacher's log-probs once, train the student on it, measure,
save.

The teacher runs under the prompt, the student without; the loss is the mean over the tokens of a batch of
KL(teacher || student) (Askell 2021; Bai 2022, A.1). Several processes share all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from policy.distillation.data import Frame, passages
from policy.distillation.held_out import measured
from policy.distillation.prompted_model import PromptedModel
from policy.distillation.report import Measured, figures, lines
from policy.distillation.student import Student, trunk_of, width
from policy.distillation.teacher import Teacher, fill_cache, key_of
from policy.distillation.teacher_cache import TeacherCache
from policy.distillation.trainer import DistillTrainer, steps_of
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import full_disk_as_os_error, read_json, write_json
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context, window_of
from rlhf.training.runtime import Runtime, gathered
from rlhf.training.signals import StopRequest

_SHARE = 0.05  # of the pre-training learning rate (Bai 2022, A.1)


def fit(recipe: Recipe, section: Distill, run: StageRun) -> dict[str, Any]:
    """Distil the prompt of a recipe into the weights; returns the figures for the manifest.

    Raises:
        UserError: something does not fit together; nothing has been loaded or computed then.
        SystemExit: somebody sent SIGTERM; what was done is kept.
    """
    stop = StopRequest()
    with stop.listening():
        work = _Distillation(recipe, section, run, stop)
        spoken = work.compute_teacher_log_probs()
        before, at_start = work.before()
        trainer = work.train()
        with gathered(work.student.module.parameters(), changed=False):
            after = work.look()
        found = figures(before, after, work.halves, work.groups, start=at_start)
        work.save()
        for line in lines(found):
            run.say(f"distill: {line}")
        return work.facts() | spoken | {"held_out": found, "steps": trainer.steps, "learning_rate": work.rate}


class _Distillation:
    """All that takes part, put together in an order in which a mistake is told before anything is loaded."""

    def __init__(self, recipe: Recipe, section: Distill, run: StageRun, stop: StopRequest) -> None:
        self.recipe, self.section, self.run, self.stop = recipe, section, run, stop
        self.rate = section.learning_rate or _SHARE * recipe.model.pretraining_learning_rate
        self.runtime = Runtime(
            recipe.distributed, seed=recipe.seed, max_grad_norm=section.max_grad_norm, micro_batch_size=1
        )
        self.dialogue = load_dialogue(recipe)
        self.teacher = Teacher(recipe, section, self.dialogue)
        self.context = Context.read(recipe.hhh_prompt, self.dialogue, window=self.teacher.window)
        frame = Frame(self.context, Context.none(self.dialogue), self.dialogue, section.max_tokens)
        train, held_out, self.counts = passages(recipe, section, run, frame)
        steps_of(section, len(train))
        self.number, self.passages = len(train), [*train, *held_out]
        self.halves, self.groups = [p.half for p in held_out], [p.group for p in held_out]
        longest = max(len(p.opening) + len(p.ids) for p in self.passages)
        self.context.check_window(self.teacher.window, more=longest)
        self.start = start_folder(recipe, run, "distill")
        self.student = Student(recipe, section, self.start, run.say)
        _check_student(self.student, self.teacher, section, max(map(width, self.passages)))
        self.student.to(self.runtime.device)
        prompt = f"{self.context.name!r}, {len(self.context.prefix_ids)} tokens"
        run.say(f"teacher:   {self.teacher.origin} under {prompt}")
        run.say(f"student:   {self.student.origin}")
        folder = run.folder / "teacher"
        self.file = TeacherCache(
            Path(section.teacher_cache).expanduser() if section.teacher_cache else folder,
            key_of(recipe, section, self.teacher, self.context, self.dialogue, self.passages),
            [len(p.ids) for p in self.passages],
            k=section.top_k,
            vocabulary=self.student.vocabulary,
            shard=section.shard_sequences,
        )

    def compute_teacher_log_probs(self) -> dict[str, Any]:
        """Fill the teacher cache; returns its facts for the manifest."""
        spoken = fill_cache(
            self._teacher,
            self.file,
            self.passages,
            self.runtime,
            budget=self.section.tokens_per_micro_batch,
            vocabulary=self.student.vocabulary,
            between=lambda: self._leave_if_asked("the shards so far are kept"),
        )
        there = f"{self.file.shards - spoken} of {self.file.shards} were there"
        self.run.say(f"distill: the teacher's log-probs are in {self.file.folder} ({there})")
        if self.runtime.shards_weights:
            self.student.before_sharding()
        sharded = self.runtime.shards_weights
        self.trunk = None if sharded else trunk_of(self.student, self.passages, self.section)
        words = {"identity": self.file.identity, "shards": self.file.shards}
        return {"teacher": {"origin": self.teacher.origin, **words}}

    def before(self) -> tuple[Measured, Measured | None]:
        """What the base says without the prompt, and the student where it does not start as the base."""
        parts = self.run.folder / "parts"
        if self.start is None:
            return self._once(parts / "before.json", self.look), None
        return (
            self._once(parts / "before.json", self._look_at_base),
            self._once(parts / "start.json", self.look),
        )

    def train(self) -> DistillTrainer:
        """Take all steps that are left."""
        trainer = DistillTrainer(
            student=self.student,
            runtime=self.runtime,
            file=self.file,
            passages=self.passages,
            number=self.number,
            trunk=self.trunk,
            section=self.section,
            seed=self.recipe.seed,
            rate=self.rate,
            contract=self.dialogue.fingerprint(),
            folder=self.run.folder,
            on_checkpoint=self.run.note_clock,
        )
        trainer.train(
            lambda save: self._leave_if_asked(f"saved after step {trainer.done} of {trainer.steps}", save)
        )
        if trainer.done != trainer.steps:
            raise RuntimeError(f"distill: {trainer.done} of {trainer.steps} steps were done")
        return trainer

    def look(self, student: Student | None = None) -> Measured:
        """What a student, or this one as it is now, says of the held-out sequences."""
        some = student or self.student
        found = measured(
            some,
            self.runtime,
            lambda: self.teacher.open(some, self.context),
            self.file,
            self.passages,
            range(self.number, len(self.passages)),
            self.trunk,
            budget=self.section.tokens_per_micro_batch,
            full=self.section.full_kl_sequences,
        )
        self.teacher.release()
        return found

    def save(self) -> None:
        """Write the result with its tokenizer."""
        weights = self.runtime.gather_state() if self.runtime.shards_weights else None
        if self.run.is_main:
            with full_disk_as_os_error():
                result = self.student.export(self.run.folder, weights)
                self.dialogue.tokenizer.save_pretrained(str(result))

    def facts(self) -> dict[str, Any]:
        """What the manifest tells of the work beside its figures."""
        tokens = sum(len(p.ids) for p in self.passages[: self.number])
        prompt = {"name": self.context.name, "sha256": self.context.sha256}
        return {
            "train": {"sequences": self.number, "tokens": tokens},
            "prompt": prompt | {"tokens": len(self.context.prefix_ids)},
            "counts": self.counts,
            "processes": self.runtime.world,
        }

    def _teacher(self) -> PromptedModel:
        return self.teacher.open(self.student, self.context)

    def _look_at_base(self) -> Measured:
        if self.student.backbone is None:  # the adapter that it started from is one with its weights
            return self.look(Student(self.recipe, self.section, None).to(self.runtime.device))
        with self.student.as_base():
            return self.look()

    def _once(self, file: Path, look: Callable[[], Measured]) -> Measured:
        """What was measured before the training, and is kept over an interruption."""
        if not self.runtime.gather(file.is_file())[0]:
            found = look()
            if self.run.is_main:
                write_json(file, found._asdict())
            self.runtime.barrier()
        return Measured(**read_json(file))

    def _leave_if_asked(self, kept: str, save: Callable[[], None] = lambda: None) -> None:
        """End where somebody asked any process for it."""
        if self.runtime.any_process(self.stop.asked):
            save()
            self.run.say(f"distill: asked to stop (SIGTERM); {kept}, the same command goes on from there")
            raise SystemExit(0)


def _check_student(student: Student, teacher: Teacher, section: Distill, longest: int) -> None:
    """What can only be said when the model is there: its window, and its vocabulary."""
    window = window_of(student.base.config)
    if window is not None and longest > window:
        raise UserError(
            f"distill.max_tokens: the longest sequence has {longest} tokens with what is before it, and the "
            f"model reads {window}; lower it"
        )
    tokens = min(student.vocabulary, teacher.vocabulary)
    if section.top_k >= tokens:
        raise UserError(
            f"distill.top_k: {section.top_k} of a vocabulary of {tokens} leave no rest; use {tokens - 1} or "
            "fewer"
        )
