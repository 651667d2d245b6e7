"""The work of the distill stage: let the teacher speak once, train the student on it, measure, save.

The teacher runs under the prompt, the student without; the loss is the mean over the tokens of a batch of
KL(teacher || student) (Askell 2021; Bai 2022, A.1). One process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from policy.distillation.data import Frame, passages
from policy.distillation.report import Measured, figures, lines
from policy.distillation.student import Student, trunk_of, width
from policy.distillation.teacher import TeacherFile
from policy.distillation.teaching import Teaching, key_of, speak
from policy.distillation.train import DistillTrainer, measured, steps_of
from rlhf.artifacts import full_disk_as_os_error, read_json, write_json
from rlhf.context import Context, window_of
from rlhf.dialogue import load_dialogue
from rlhf.errors import UserError
from rlhf.recipe import Recipe
from rlhf.runtime import Runtime
from rlhf.schema import Distill
from rlhf.stage import StageRun
from rlhf.starts import start_folder
from rlhf.stopping import StopRequest

_SHARE = 0.05  # of the pre-training learning rate (Bai 2022, A.1)


def fit(recipe: Recipe, section: Distill, run: StageRun) -> dict[str, Any]:
    """Distil the prompt of a recipe into the weights; returns the figures for the manifest.

    Raises:
        UserError: something does not fit together; nothing has been loaded or computed then.
        SystemExit: somebody sent SIGTERM; what was done is kept.
    """
    stop = StopRequest()
    with stop.listening():
        return _fit(recipe, section, run, stop)


def _fit(recipe: Recipe, section: Distill, run: StageRun, stop: StopRequest) -> dict[str, Any]:
    runtime = Runtime(
        recipe.distributed, seed=recipe.seed, max_grad_norm=section.max_grad_norm, micro_batch_size=1
    )
    dialogue = load_dialogue(recipe)
    teaching = Teaching(recipe, section, dialogue)
    context = Context.read(recipe.hhh_prompt, dialogue, window=teaching.window)
    frame = Frame(context, Context.none(dialogue), dialogue, section.max_tokens)
    train, held_out, counts = passages(recipe, section, run, frame)
    steps_of(section, len(train))
    everything = [*train, *held_out]
    context.check_window(teaching.window, more=max(len(p.opening) + len(p.ids) for p in everything))

    start = start_folder(recipe, run, "distill")
    student = Student(recipe, section, start)
    _check_student(student, teaching, section, max(map(width, everything)))
    student.to(runtime.device)
    for part, origin in (
        ("teacher", f"{teaching.origin} under {context.name!r}, {len(context.prefix_ids)} tokens"),
        ("student", student.origin),
    ):
        print(f"{part + ':':<10} {origin}", flush=True)

    key = key_of(recipe, section, teaching, context, dialogue, everything)
    folder = Path(section.teacher_file).expanduser() if section.teacher_file else run.folder / "teacher"
    lengths = [len(p.ids) for p in everything]
    sizes = {"k": section.top_k, "vocabulary": student.vocabulary, "shard": section.shard_sequences}
    file = TeacherFile(folder, key, lengths, **sizes)
    spoken = speak(
        lambda: teaching.open(student, context),
        file,
        everything,
        budget=section.tokens_per_micro_batch,
        vocabulary=student.vocabulary,
        between=lambda: _leave_if(stop, "the shards so far are kept"),
    )
    reused = file.shards - spoken
    print(f"distill: the teacher's words are in {folder} ({reused} of {file.shards} were there)", flush=True)

    trunk = trunk_of(student, everything, section.trunk_gigabytes)
    rows = range(len(train), len(everything))

    def look(of: Student = student) -> Measured:
        found = measured(
            of,
            lambda: teaching.open(of, context),
            file,
            everything,
            rows,
            trunk,
            budget=section.tokens_per_micro_batch,
            full=section.full_kl_sequences,
        )
        teaching.release()
        return found

    def look_at_base() -> Measured:
        if student.backbone is None:  # the adapter that it started from is one with its weights
            return look(Student(recipe, section, None).to(runtime.device))
        with student.as_base():
            return look()

    parts = run.folder / "parts"
    before = _once(parts / "before.json", look_at_base if start else look)
    at_start = _once(parts / "start.json", look) if start else None
    rate = section.learning_rate or _SHARE * recipe.model.pretraining_learning_rate
    trainer = DistillTrainer(
        student=student,
        runtime=runtime,
        file=file,
        passages=everything,
        number=len(train),
        trunk=trunk,
        section=section,
        seed=recipe.seed,
        rate=rate,
        run=run,
        contract=dialogue.fingerprint(),
    )

    def leave(save: Callable[[], None]) -> None:
        if stop.asked:
            save()
            _leave_if(stop, f"saved after step {trainer.done} of {trainer.steps}")

    trainer.train(leave)
    if trainer.done != trainer.steps:
        raise RuntimeError(f"distill: {trainer.done} of {trainer.steps} steps were done")
    halves, groups = [p.half for p in held_out], [p.group for p in held_out]
    found = figures(before, look(), halves, groups, start=at_start)
    with full_disk_as_os_error():
        result = student.export(run.folder)
        dialogue.tokenizer.save_pretrained(str(result))
    for line in lines(found):
        print(f"distill: {line}", flush=True)
    return {
        "held_out": found,
        "train": {"sequences": len(train), "tokens": sum(lengths[: len(train)])},
        "steps": trainer.steps,
        "learning_rate": rate,
        "prompt": {"name": context.name, "sha256": context.sha256, "tokens": len(context.prefix_ids)},
        "teacher": {"origin": teaching.origin, "identity": file.identity, "shards": file.shards},
        "counts": counts,
    }


def _check_student(student: Student, teaching: Teaching, section: Distill, longest: int) -> None:
    """What can only be said when the model is there: its window, and its vocabulary."""
    window = window_of(student.base.config)
    if window is not None and longest > window:
        raise UserError(
            f"distill.max_tokens: the longest sequence has {longest} tokens with what is before it, and the "
            f"model reads {window}; lower it"
        )
    tokens = min(student.vocabulary, teaching.vocabulary)
    if section.top_k >= tokens:
        raise UserError(
            f"distill.top_k: {section.top_k} of a vocabulary of {tokens} leave no rest; use {tokens - 1} or "
            "fewer"
        )


def _once(file: Path, look: Callable[[], Measured]) -> Measured:
    """What was measured before the training, and is kept over an interruption."""
    if not file.is_file():
        write_json(file, look()._asdict())
    return Measured(**read_json(file))


def _leave_if(stop: StopRequest, kept: str) -> None:
    """End where somebody asked for it."""
    if stop.asked:
        print(f"distill: asked to stop (SIGTERM); {kept}, the same command goes on from there", flush=True)
        raise SystemExit(0)
