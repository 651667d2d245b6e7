"""The work of the reward stage: train, normalize, save, reload, judge on held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reward.loss import candidate_scores, normalization, pair_accuracy
from reward.model.average import save_average, saved_scores
from reward.model.batch import Example, encode_split, layout, only
from reward.model.ensemble import AVERAGE, MODEL, TEST_MODEL, member_folders
from reward.model.forward import check_packing, score_examples, scores_of
from reward.model.model import (
    RewardModelConfig,
    config_of,
    head_of,
    load_config,
    new_reward_model,
    save_reward_model,
    shapes_of,
    start_from,
    start_tensors,
    too_short,
)
from reward.training.features import POOLINGS, spread_layers
from reward.training.probe import Head, Probe, fit_probe, keep_scores
from reward.training.trainer import ForwardPlan, plan_forward, train_preference_model
from reward.training.validation import Validation, keep_out, part_for_test
from rlhf.data.comparisons import Comparison, Counts, drawn
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.markdown import plain
from rlhf.models.backbone import Backbone
from rlhf.models.base import best_device, load_base, vocabulary_head
from rlhf.models.masks import right_pad
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining
from rlhf.runs import initial_adapter as starts
from rlhf.runs.artifacts import MANIFEST, PROBE_SCORES, read_json
from rlhf.runs.processes import check_rows, processes
from rlhf.runs.stage import RUNS, StageRun
from rlhf.stats.intervals import Estimate, cluster_mean_interval
from rlhf.tokenization.dialogue import Dialogue, load_dialogue
from rlhf.training.runtime import clear_deepspeed, clear_zero3_init, gathered

_AS_IT_IS = {"gain": 1.0, "offset": 0.0}
_RELOAD_TOLERANCE = 1e-3  # between the trained and the reloaded model's scores, in units of their spread
_RELOAD_TOLERANCE_HALF = 0.1  # the same over a half-precision base


class Rows(NamedTuple):
    """Encoded comparisons."""

    train: list[Example]
    held_out: list[Example]
    validation: list[Example] = []  # noqa: RUF012
    """Kept out of the training part, to choose the step that is kept."""


def run(recipe: Recipe, stage: StageRun) -> dict[str, Any]:
    """Train the reward model of a recipe, or its ensemble; returns the figures for the manifest."""
    dialogue = load_dialogue(recipe, recipe.reward.max_response_tokens)
    if dialogue.max_response_tokens < (sampled := recipe.dialogue.max_response_tokens):
        stage.say(f"warning: {too_short(recipe.reward.length_key, dialogue.max_response_tokens, sampled)}")
    train = drawn(stored(stage, "train"), recipe.reward.limit, recipe.seed)
    held_out = stored(stage, "held_out")
    key = recipe.reward.length_key
    rows = Rows(*encode_split(train, held_out, dialogue, lambda line: stage.say(f"reward: {line}"), key))
    stage.say(f"reward: {len(rows.train)} comparisons to train on, {len(rows.held_out)} held out")
    lost = {"train": len(train) - len(rows.train), "held_out": len(held_out) - len(rows.held_out)}
    section, probe, layers = recipe.reward, None, recipe.reward.layers
    learned, apart = part_for_test(rows.train, section.test_share, recipe.seed)
    rows, test = _validated(recipe, stage, learned, rows.held_out), None
    check_rows("reward", len(rows.train))
    if apart:
        stage.say(f"reward: {len(apart)} of those to train on are for the test model alone")
        test = _validated(recipe, stage, apart, rows.held_out)
        check_rows("reward", len(test.train))
    if layers == "auto":
        probe = _probe(recipe, stage, rows, dialogue)
        layers = probe.layers
    fresh = new_reward_model(recipe, dialogue, layers=layers, pooling=section.pooling)
    if start := start_folder(recipe):
        start_tensors(fresh, start)  # a mistake is told before there is work that a mended recipe would lose
    plan = plan_forward(recipe, section, fresh, [e for part in (*rows, apart) for e in part], dialogue)
    if section.probe and probe is None:
        probe = _probe(recipe, stage, rows, dialogue, None if section.probe == "all" else (fresh, plan))
    if probe and stage.is_main:
        keep_scores(stage.folder / PROBE_SCORES, probe, rows.held_out, held_out, dialogue)
    del fresh
    members = [
        stage.remember(f"member-{n}", partial(_member, recipe, stage, dialogue, rows, plan, layers, probe, n))
        for n in range(section.members)
    ]
    results: dict[str, Any] = {name: value for name, value in members[0].items() if name != "scores"}
    if len(members) > 1:
        results["members"] = [m["held_out_accuracy"] for m in members]
        mean = torch.tensor([m["scores"] for m in members]).mean(0)
        results["ensemble_accuracy"] = accuracy(mean, rows.held_out).as_dict()
        if stage.is_main:
            save_average(member_folders(stage.folder), stage.folder / AVERAGE)
            scores = saved_scores(stage.folder / AVERAGE, rows.held_out, best_device(), share=plan.share)
            results["average_accuracy"] = accuracy(scores, rows.held_out).as_dict()
    if test:
        results["test_model"] = _test_model(recipe, stage, dialogue, test, plan, layers)
    if any(lost.values()):
        results["equal_after_cut"] = lost
    if stage.is_main:
        labels = read_json(stage.parent("comparisons") / MANIFEST)["results"]
        if labels.get("noise_ceiling"):
            results["noise_ceiling"] = labels["noise_ceiling"]
        stage.say(_summary(results, len(rows.held_out)))
    return results


def _test_model(
    recipe: Recipe, stage: StageRun, dialogue: Dialogue, rows: Rows, plan: ForwardPlan, layers: int | None
) -> dict[str, Any]:
    """The same with another seed on other comparisons; returns its figures."""
    section, probe = recipe.reward.model_copy(update={"layers": layers}), None
    recipe = recipe.model_copy(update={"seed": recipe.seed + section.members, "reward": section})
    if section.head_init == "probe":  # one of its own: the other has seen the other comparisons
        fresh = new_reward_model(recipe, dialogue, layers=layers, pooling=section.pooling)
        probe = _probe(recipe, stage, rows, dialogue, (fresh.to(best_device()).eval(), plan), TEST_MODEL)
        del fresh
    work = partial(_member, recipe, stage, dialogue, rows, plan, layers, probe, place=TEST_MODEL)
    made = dict(stage.remember(f"member-{TEST_MODEL}", work), comparisons=len(rows.train))
    made.pop("scores")
    return made


def _validated(recipe: Recipe, stage: StageRun, train: list[Example], held_out: list[Example]) -> Rows:
    """The rows of a model, some of the training ones kept out where the recipe says so."""
    learned, kept_out = keep_out(train, recipe.reward.validation, recipe.seed)
    if kept_out:
        stage.say(f"reward: {len(kept_out)} of those to train on are kept out to choose the step by")
    return Rows(learned, held_out, kept_out)


def stored(stage: StageRun, part: str) -> list[Comparison]:
    """Comparisons that the comparisons stage of the same run has written."""
    return read_native(stage.parent("comparisons") / f"{part}.jsonl", "stop", Counts())


def _member(
    recipe: Recipe,
    stage: StageRun,
    dialogue: Dialogue,
    rows: Rows,
    plan: ForwardPlan,
    layers: int | None,
    probe: Probe | None,
    member: int = 0,
    place: str | None = None,
) -> dict[str, Any]:
    """Train, normalize, save and judge one model.

    place: the folder of one that is no member, the test model.
    """
    section, work = recipe.reward, stage.folder / "parts" / place if place else stage.folder
    members = 1 if place else section.members
    clear_zero3_init()
    clear_deepspeed()
    fresh = new_reward_model(recipe, dialogue, recipe.seed + member, layers=layers, pooling=section.pooling)
    results: dict[str, Any] = {} if layers is None else {"layers": layers}
    if section.head_init == "zero":
        nn.init.zeros_(head_of(fresh).weight)
    if probe:
        results["probe_accuracy"] = probe.accuracy
        if probe.best:
            results["probe_best"] = probe.best
        if section.head_init == "probe":
            with torch.no_grad():
                head_of(fresh).weight.copy_(torch.tensor(probe.weights)[None])
    if start := start_folder(recipe):
        read = start_from(fresh, start)
        stage.say(f"reward: starts from {start} ({read} tensors)")
    validation = None
    if rows.validation:
        judged_in = stage.folder / "parts" / f"validation-{place or member}"
        say = partial(_say_of, stage, place or (f"member {member}" if members > 1 else ""))
        validation = Validation(rows.validation, judged_in, section.evaluations, say)
    model = train_preference_model(
        recipe, section, dialogue, fresh, rows.train, plan, folder=work,
        on_checkpoint=stage.note_clock, member=member, members=members, validation=validation,
    )  # fmt: skip
    if validation is not None:
        results["validation"] = validation.finish()
    results |= {"prompts_shared": plan.share, "trunk_cached": plan.trunk is not None}
    scored = section.objective != "imitation"
    results |= _normalize(recipe, model, rows.train, dialogue, plan) if scored else _AS_IT_IS
    both = {name: results[name] for name in ("gain", "offset")}
    config = config_of(recipe, dialogue, section, **both, layers=layers)
    judged = {"held_out": rows.held_out, "train": rows.train[: len(rows.held_out)]}
    for part, examples in judged.items():
        figures, scores = judge(recipe, section, model, examples, dialogue, plan)
        results |= {f"{part}_{name}": figure.as_dict() for name, figure in figures.items()}
        if part == "held_out":
            results["scores"] = (scores + config.offset).tolist()
    folder = stage.folder / (place or (MODEL if member == 0 else f"{MODEL}-{member}"))
    save(stage, model, folder, config, dialogue)
    few = [(e["prompt"], e["responses"][0]) for e in rows.held_out[:4]]
    expected = scores_of(model, few, dialogue.pad_id) + config.offset
    del model
    if stage.is_main:
        results["reload_gap"] = _check_reload(recipe, folder, few, expected, dialogue)
    if processes() > 1:
        dist.barrier()
    return results


def _say_of(stage: StageRun, who: str, line: str) -> None:
    stage.say(f"reward: {f'{who}: ' if who else ''}{line}")


def start_folder(recipe: Recipe) -> Path | None:
    """The preference model, or the adapter, that the reward model starts from, if there is one."""
    start = starts.start_folder(recipe, recipe.name, "reward")
    return RUNS / recipe.name / "pmp" / MODEL if start is None and recipe.pmp else start


def _probe(
    recipe: Recipe,
    stage: StageRun,
    rows: Rows,
    dialogue: Dialogue,
    trained: tuple[Any, ForwardPlan] | None = None,
    name: str = "probes",
) -> Probe:
    """The linear probes on the base below a fresh adapter, which changes nothing yet; fitted once a stage.

    trained: the model that will be trained, whose last layer and those above its trunk are probed; None = the
    whole base, in a pass of its own.
    """
    wanted, pooling = recipe.reward.layers, recipe.reward.pooling

    def fit() -> dict[str, Any]:
        model, plan = trained or _whole(recipe, rows, dialogue)
        shape = model.base_model.model.config.get_text_config()
        last, cut = int(shape.num_hidden_layers), plan.trunk.cut if plan.trunk else 0
        responses = sum(len(e["responses"]) for part in rows for e in part)
        layers = spread_layers(cut + 1, last, responses, int(shape.hidden_size))
        if isinstance(wanted, int):
            layers = sorted({*layers, wanted})
        head: Head | None = None
        if wanted is not None or pooling == "mean":
            head = wanted or last, POOLINGS[pooling == "mean"]
        where = "; reward.probe=all reads those of the frozen trunk too" if cut else ""
        stage.say(f"reward: probes of layers {', '.join(map(str, layers))}{where}")
        options: dict[str, Any] = {"share": plan.share, "trunk": plan.trunk, "layers": layers}
        return fit_probe(model, *rows[:2], dialogue.pad_id, **options, head=head)._asdict()

    probe = Probe(**stage.remember(name, fit, key=Probe._fields))  # an earlier version kept fewer
    if probe.best:
        stage.say(
            "reward: best probe by cross-validation on the training part: layer {layer}, {pooling}, "
            "accuracy {cv_accuracy:.3f}, held-out ".format(**probe.best)
            + plain(probe.best["accuracy"], ".3f")
        )
    if wanted == "auto":
        stage.say(f"reward: layers=auto: the first {probe.layers} layers")
    return probe


def _whole(recipe: Recipe, rows: Rows, dialogue: Dialogue) -> tuple[Any, ForwardPlan]:
    """All layers of the base, and how to go over the examples once."""
    model = new_reward_model(recipe, dialogue).to(best_device()).eval()
    some = [example for part in rows for example in part]
    share = recipe.reward.share_prompts and check_packing(model, some, dialogue.pad_id) is None
    return model, ForwardPlan(share, None)


@torch.no_grad()
def _normalize(
    recipe: Recipe, model: Any, rows: Sequence[Example], dialogue: Dialogue, plan: ForwardPlan
) -> dict[str, Any]:
    """Fold the gain into the head and find the offset: mean 0, variance 1 on reference responses.

    The reference responses are those of the training comparisons (Ziegler 2019 takes samples of the
    reference policy, which in the lab is the same thing).
    """
    places = [(n, k) for n, example in enumerate(rows) for k in range(len(example["responses"]))]
    number = min(len(places), recipe.reward.reference_responses)
    chosen: dict[int, list[int]] = {}
    for n, k in sorted(random.Random(recipe.seed).sample(places, number)):
        chosen.setdefault(n, []).append(k)
    some = [only(rows[n], kept) for n, kept in chosen.items()]
    scores, *_ = score_examples(model, some, dialogue.pad_id, share=plan.share, trunk=plan.trunk)
    try:
        gain, offset = normalization(scores)
    except ValueError as error:
        raise UserError(
            f"reward: {error}: the training failed; lower reward.learning_rate, or look at metrics.jsonl"
        ) from None
    with gathered([head_of(model).weight]):
        head_of(model).weight.mul_(gain)
    return {"gain": gain, "offset": offset, "reference_responses": number}


def judge(
    recipe: Recipe,
    section: PreferenceTraining,
    model: Any,
    examples: Sequence[Example],
    dialogue: Dialogue,
    plan: ForwardPlan,
) -> tuple[dict[str, Estimate], Tensor]:
    """Pair accuracy on comparisons and the scores behind it, flat, without the offset.

    Imitation has no score: its responses are ranked by mean log-probability (``accuracy``) and by summed
    (``accuracy_sum``) instead.
    """
    imitates = section.objective == "imitation"
    vocabulary = vocabulary_head(recipe, model.base_model.model) if imitates else None
    scores, *both = score_examples(
        model, examples, dialogue.pad_id, share=plan.share, trunk=plan.trunk, vocabulary=vocabulary
    )
    if not imitates:
        return {"accuracy": accuracy(scores, examples)}, scores
    sums, counts = both
    mean, total = candidate_scores(sums, counts, "mean"), candidate_scores(sums, counts, "sum")
    return {"accuracy": accuracy(mean, examples), "accuracy_sum": accuracy(total, examples)}, mean


def accuracy(scores: Tensor, examples: Sequence[Example]) -> Estimate:
    """Pair accuracy of flat scores, equal ones counting half, the interval clustered by comparison."""
    flat_BK, ranks_BK, mask_BK = layout(examples)
    correct_B, pairs_B = pair_accuracy(scores[flat_BK], ranks_BK, mask_BK)
    return cluster_mean_interval(correct_B.numpy(), pairs_B.numpy())


def save(stage: StageRun, model: Any, folder: Path, config: RewardModelConfig, dialogue: Dialogue) -> None:
    """Write a trained model, gathered from whatever shards it."""
    with gathered([p for p in model.parameters() if p.requires_grad]):
        if stage.is_main:
            save_reward_model(model, folder, config, dialogue)
    if processes() > 1:
        dist.barrier()


@torch.no_grad()
def _check_reload(
    recipe: Recipe,
    folder: Path,
    rows: list[tuple[list[int], list[int]]],
    expected: Tensor,
    dialogue: Dialogue,
) -> float:
    """Load what was saved the way PPO will, and compare scores: a lost head must be noticed here.

    Raises:
        RuntimeError: the scores differ.
    """
    clear_zero3_init()
    config = load_config(folder)
    names = ["reward"]
    shapes = shapes_of(names, [folder])
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=names, heads=names, **shapes)
    backbone.load_adapter("reward", folder)
    ids_NT, mask_NT = right_pad([[*prompt, *response] for prompt, response in rows], dialogue.pad_id)
    prompts_N = torch.tensor([[len(prompt)] for prompt, _ in rows])
    own_NT = mask_NT & (torch.arange(ids_NT.shape[1]) >= prompts_N)
    scores = backbone("reward", ids_NT, mask_NT, own_BT=own_NT) + config.offset
    gap = float((scores - expected).abs().max())
    exact = backbone.base.dtype == torch.float32
    if gap > (_RELOAD_TOLERANCE if exact else _RELOAD_TOLERANCE_HALF):
        raise RuntimeError(f"the saved reward model scores differently when loaded again (by {gap:.2g})")
    return gap


def _summary(results: dict[str, Any], comparisons: int) -> str:
    titles = {
        "held_out_accuracy_sum": "by summed log-probability",
        "ensemble_accuracy": "all members together",
        "average_accuracy": "the mean of their weights",
        "probe_accuracy": "linear probe on frozen features",
        "noise_ceiling": "noise ceiling of the labels",
    }
    accuracy = plain(results["held_out_accuracy"], ".3f")
    parts = [f"reward: held-out pair accuracy {accuracy} on {comparisons} comparisons"]
    parts += [f"{title} {plain(results[name], '.3f')}" for name, title in titles.items() if name in results]
    if test := results.get("test_model"):
        parts.append(
            f"test model {plain(test['held_out_accuracy'], '.3f')}, trained on {test['comparisons']}"
        )
    return "; ".join(parts)
