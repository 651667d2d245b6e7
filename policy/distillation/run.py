"""The work of the distill stage: compute the teacher's log-probs once, train the student on them, evaluate,
save.

The teacher runs under the prompt, the student without; the loss is the mean over the tokens of a batch of
KL(teacher || student) (Askell 2021; Bai 2022, A.1). Several processes share all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy.distillation.data import Frame, Passage, passages
from policy.distillation.evaluation import HeldOut, Measured, figures, lines
from policy.distillation.student import Student, trunk_of
from policy.distillation.teacher import Teacher
from policy.distillation.teacher_cache import TeacherCache, key_of, shard_records
from policy.distillation.trainer import DistillTrainer, steps_of
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import library_errors_as_os_error
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.processes import check_rows
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context, window_of
from rlhf.training.runtime import Runtime, gathered
from rlhf.training.signals import StopRequest

_SHARE = 0.05  # of the pre-training learning rate (Bai 2022, A.1)


def fit(recipe: Recipe, section: Distill, run: StageRun) -> dict[str, Any]:
    """Distill the prompt of a recipe into the weights; returns the figures for the manifest.

    Raises:
        UserError: something does not fit together; nothing has been loaded or computed then.
        SystemExit: somebody sent SIGTERM; what was done is kept.
    """
    stop = StopRequest()
    with stop.listening():
        return _fit(recipe, section, run, stop)


def _fit(recipe: Recipe, section: Distill, run: StageRun, stop: StopRequest) -> dict[str, Any]:
    rate = section.learning_rate or _SHARE * recipe.model.pretraining_learning_rate
    runtime = Runtime(
        recipe.distributed, seed=recipe.seed, max_grad_norm=section.max_grad_norm, micro_batch_size=1
    )
    dialogue = load_dialogue(recipe)
    teacher = Teacher(recipe, section, dialogue)
    context = teacher.context
    frame = Frame(context, Context.none(dialogue), dialogue, section.max_tokens)
    train, held_out, counts = passages(recipe, section, run, frame)
    steps_of(section, len(train))
    check_rows("distill", len(train))
    rows = [*train, *held_out]
    context.check_window(teacher.window, more=max(len(p.teacher_ids) for p in rows))
    start = start_folder(recipe, run, "distill")
    student = Student(recipe, section, start, run.say)
    _check_student(student, teacher, section, max(len(p.student_ids) for p in rows))
    student.module.to(runtime.device)
    run.say(f"teacher:   {teacher.origin} under {context.name!r}, {len(context.prefix_ids)} tokens")
    run.say(f"student:   {student.origin}")
    cache = TeacherCache(
        Path(section.teacher_cache).expanduser() if section.teacher_cache else run.folder / "teacher",
        key_of(recipe, section, teacher, dialogue, rows),
        [len(p.ids) for p in rows],
        k=section.top_k,
        vocabulary=student.vocabulary,
        shard=section.shard_sequences,
    )
    _fill(cache, teacher, student, rows, runtime, section.tokens_per_micro_batch, run, stop)
    if runtime.shards_weights:
        student.before_sharding()
    trunk = trunk_of(student, rows, section)
    evaluation = HeldOut(
        cache=cache,
        passages=rows,
        rows=range(len(train), len(rows)),
        trunk=trunk,
        runtime=runtime,
        budget=section.tokens_per_micro_batch,
        full=section.full_kl_sequences,
    )
    at_start = None
    if start is not None:
        at_start = Measured(**run.remember("start", lambda: _measure(student, evaluation, teacher)))
    base = recipe if start is not None else None
    before = Measured(**run.remember("before", lambda: _measure(student, evaluation, teacher, base=base)))
    trainer = DistillTrainer(
        student=student,
        runtime=runtime,
        cache=cache,
        passages=rows,
        number=len(train),
        trunk=trunk,
        section=section,
        seed=recipe.seed,
        rate=rate,
        contract=dialogue.fingerprint(),
        folder=run.folder,
        on_checkpoint=run.note_clock,
        stop=stop,
    )
    trainer.train()
    with gathered(student.module.parameters(), changed=False):
        after = Measured(**_measure(student, evaluation, teacher))
    halves, groups = [p.half for p in held_out], [p.group for p in held_out]
    results = figures(before, after, halves, groups, at_start)
    weights = runtime.gather_state() if runtime.shards_weights else None
    if run.is_main:
        with library_errors_as_os_error(run.folder):
            dialogue.tokenizer.save_pretrained(str(student.export(run.folder, weights)))
    for line in lines(results):
        run.say(f"distill: {line}")
    return {
        "train": {"sequences": len(train), "tokens": sum(len(p.ids) for p in train)},
        "prompt": {"name": context.name, "sha256": context.sha256, "tokens": len(context.prefix_ids)},
        "counts": counts,
        "processes": runtime.world,
        "teacher": {"origin": teacher.origin, "identity": cache.identity, "shards": cache.shards},
        "held_out": results,
        "steps": trainer.steps,
        "learning_rate": rate,
    }


def _fill(
    cache: TeacherCache,
    teacher: Teacher,
    student: Student,
    passages: Sequence[Passage],
    runtime: Runtime,
    budget: int,
    run: StageRun,
    stop: StopRequest,
) -> None:
    """Compute the teacher's log-probs that are not in its cache yet.

    Several processes read a shard each, and the first one writes them all.

    budget: tokens of the passages in memory at once.

    Raises:
        SystemExit: SIGTERM was received; the shards so far are kept.
    """
    missing: list[int] = runtime.gather(cache.missing() if run.is_main else None)[0]
    for start in range(0, len(missing), runtime.world):
        if runtime.any_process(stop.asked):
            stop.leave("distill", "the shards so far are kept", is_main=run.is_main)
        several = missing[start : start + runtime.world]
        if start % (10 * runtime.world) == 0:
            run.say(f"distill: the teacher reads shard {several[0] + 1} of {cache.shards}")
        own = None
        if runtime.rank < len(several):
            some = [passages[row] for row in cache.sequences_of(several[runtime.rank])]
            own = shard_records(teacher.open(student.backbone), some, cache, budget)
        for number, records in zip(several, runtime.gather(own), strict=False):
            if run.is_main:
                cache.write(number, records)
    runtime.barrier()
    there = f"{cache.shards - len(missing)} of {cache.shards} were there"
    run.say(f"distill: the teacher's log-probs are in {cache.folder} ({there})")


def _measure(
    student: Student, held_out: HeldOut, teacher: Teacher, *, base: Recipe | None = None
) -> dict[str, Any]:
    """The student's :class:`Measured` as a dictionary.

    base: measure the base without the prompt instead, where the student does not start as it; the recipe.
    """
    with contextlib.ExitStack() as stack:
        if base and base.distill and student.backbone is None:  # its first adapter is one with its weights
            student = Student(base, base.distill, None)
            student.module.to(held_out.runtime.device)
        elif base:
            stack.enter_context(student.as_base())
        found = held_out.measure(student, teacher.open(student.backbone) if held_out.full else None)
    teacher.release()
    return found._asdict()


def _check_student(student: Student, teacher: Teacher, section: Distill, longest: int) -> None:
    """What can only be checked when the model is there: its window, and its vocabulary."""
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
