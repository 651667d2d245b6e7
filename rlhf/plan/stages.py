"""What each stage of a recipe holds at its largest moments: from recipe, the base's shape and the lengths.

A stage is a few moments (sampling, scoring, training), each :class:`rlhf.plan.memory.Parts`; its need is the
largest of them. On a GPU the parts are those of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlhf.evals.registry import TASKS
from rlhf.evals.tasks.stock import longest_text
from rlhf.plan import memory
from rlhf.plan.lengths import Lengths
from rlhf.plan.memory import Parts, Setting
from rlhf.plan.shapes import Shape
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining
from rlhf.recipe.schema import Distill, Dpo, Sft

AT_ONCE = 4096  # tokens of a scoring batch (reward/model/forward.py, policy/sft/loss.py)
_ROW = 512  # tokens of a row with several responses (reward/model/batch.py)
# Bytes of interpreter and libraries on a CPU: after the imports and the first passes, without the weights.
FIXED = {"trainer": 0.66e9, "plain": 0.54e9}
_GENERATED = 8  # cached tokens while the tax table's texts are written, a scored one (rlhf/evals/model.py)
_TEXTS = 100  # that a task of the tax table has written without a limit, at most (rlhf/evals/registry.py)
_CONTEXT = 512  # tokens that a text of lm-eval's is taken to begin from: only the tokenizer would know
_ALL = 1000  # texts of a task of lm-eval without a limit, which has all of its rows written
_TREE = 256  # nodes of a tree of items (rlhf/evals/scoring.py)
FEATURES = 10  # layers that a probe looks at (reward/training/features.py)


class Moment(NamedTuple):
    """One moment of a stage."""

    stage: str
    name: str
    parts: Parts


class Plan(NamedTuple):
    """All moments of a recipe on a machine."""

    moments: list[Moment]
    host: float
    """Bytes of the machine's own memory, a process, while a base is loaded before it goes to a GPU."""

    def largest(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=_need)

    def by_stage(self) -> list[Moment]:
        """The largest moment of each stage, in their order."""
        largest: dict[str, Moment] = {}
        for moment in self.moments:
            largest[moment.stage] = max(largest.get(moment.stage, moment), moment, key=_need)
        return list(largest.values())


def setting_of(recipe: Recipe, *, gpu: bool, world: int) -> Setting:
    """How a recipe's weights lie on so many processes."""
    model, distributed = recipe.model, recipe.distributed
    return Setting(
        dtype=model.dtype,
        quantization=model.quantization,
        gpu=gpu,
        world=world,
        zero=distributed.zero_stage if world > 1 else 0,
        checkpointing=model.gradient_checkpointing,
        offload_optimizer=world > 1 and distributed.offload_optimizer != "none",
        offload_param=world > 1 and distributed.offload_param != "none",
        compiled=model.compile,
    )


def plan(
    recipe: Recipe, shape: Shape, lengths: Lengths, *, gpu: bool, world: int, converted: float = 0.0
) -> Plan:
    """Every moment of every stage that a recipe has.

    converted: bytes of the base's files where they hold another type than the recipe's, which are all in
    memory while they are read.
    """
    stages = Stages(recipe, shape, lengths, setting_of(recipe, gpu=gpu, world=world), converted)
    alone = Stages(recipe, shape, lengths, setting_of(recipe, gpu=gpu, world=1))
    moments = [*alone.collect(), *stages.trainings(), *stages.ppo(), *alone.card()]
    moments += [*alone.evaluate(), *alone.tax()]
    host = 0.0
    if gpu and recipe.model.quantization == "none":
        host = memory.weights(shape, stages.setting._replace(zero=0))[0]
    return Plan(moments, host)


class Stages:
    """The stages of one recipe in one setting."""

    def __init__(
        self, recipe: Recipe, shape: Shape, lengths: Lengths, setting: Setting, converted: float = 0.0
    ) -> None:
        self.recipe, self.shape, self.lengths, self.setting = recipe, shape, lengths, setting
        self.converted = converted
        top = recipe.lora.top_k
        self.adapted = shape.layers if top is None else min(top, shape.layers)
        self.adapter = memory.adapter_weights(shape, recipe.lora.rank, self.adapted)
        self.base, self.gathered = memory.weights(shape, setting)
        self.response = recipe.dialogue.max_response_tokens

    def collect(self) -> Iterator[Moment]:
        """The lab's samples."""
        section = self.recipe.collect
        if self.recipe.data.sampled:
            rows = section.prompts_per_batch * section.responses
            yield self._sampling("comparisons", rows, section.prompts_per_batch, adapters=1, folds=False)

    def trainings(self) -> Iterator[Moment]:
        """SFT, distillation, PMP, reward and DPO, as far as the recipe has them."""
        recipe = self.recipe
        for name in ("sft", "distill", "pmp", "reward", "dpo"):
            section = getattr(recipe, name)
            if isinstance(section, PreferenceTraining):
                yield from self._preference(name, section)
            elif isinstance(section, Distill):
                yield from self._distillation(section)
            elif section is not None:
                yield from self._rows(name, section)

    def ppo(self) -> Iterator[Moment]:
        """Rollouts and updates."""
        section, shape, setting = self.recipe.ppo, self.shape, self.setting
        rewards = len(section.named_models) + (self.recipe.reward.scorers if section.own_reward else 0)
        own = section.has_value and section.value == "adapter"
        learns = self.adapter * (1 + own)
        beside = rewards * memory.weights(shape, setting._replace(zero=0))[0] if section.retokenize else 0.0
        number = 1 + own + (section.start is not None) + (0 if section.retokenize else rewards)
        rows = -(-section.batch_size // setting.world)
        width = self.lengths.prompt + self.response + 1
        states = self._trunk(rows * width, section.trunk_gigabytes, kept=setting.zero < 3, on_gpu=True)
        gradients, optimizer = memory.learning(learns, setting, moments=memory.ADAMW[section.optimizer])
        together = min(section.rollout_batch_size, rows)
        prompts = -(-together // section.samples_per_prompt)
        sampling = self._sampling("ppo", together, prompts, adapters=number, folds=True)
        whole = memory.weights(shape, setting._replace(zero=0))[0]
        if setting.zero == 3:  # every process has all weights at hand while it samples
            sampling = _with(sampling, copies=whole - self.base)
        standing = {"optimizer": optimizer, "states": states}
        yield _with(sampling, weights=beside, **standing)
        micro = min(section.micro_batch_size, rows)
        tokens, positions = micro * width, micro * self.response
        common = Parts(
            fixed=self._fixed("plain"),
            weights=self.base + beside,
            copies=self.gathered + memory.folded_copies(shape, self.adapted, setting),
            adapters=4.0 * number * self.adapter,
            logits=memory.training_logits(shape, positions, setting),
            **standing,
        )
        yield Moment("ppo", "update", common._replace(gradients=gradients, activations=self._training(
            tokens, width)))  # fmt: skip
        if section.ptx_coef:  # all texts of a process in one pass (policy/ppo/batching.py)
            long = section.ptx_max_tokens + 1
            tokens = -(-section.ptx_batch_size // setting.world) * long
            yield Moment("ppo", "texts of PPO-ptx", common._replace(
                gradients=gradients, activations=self._training(tokens, long),
                logits=memory.training_logits(shape, tokens, setting)))  # fmt: skip

    def card(self) -> Iterator[Moment]:
        """A reward model as large as this run's over comparisons; its training where a curve asks for it."""
        recipe = self.recipe
        if recipe.card.model or recipe.ppo.own_reward:
            yield self._scoring("card", "scoring", models=1)
            if recipe.card.outliers:  # states of every layer
                states = float(AT_ONCE * self._scorer().layers * self.shape.hidden * self.setting.size)
                yield _with(self._scoring("card", "outliers", models=1), states=states)
            if recipe.card.curve and recipe.card.curve_of == "reward":
                yield from (m._replace(stage="card") for m in self._preference("reward", recipe.reward))

    def evaluate(self) -> Iterator[Moment]:
        """Responses of policy and reference to held-out prompts."""
        section = self.recipe.evaluate
        prompts = -(-section.batch_size // section.samples_per_prompt)
        rewards = self.recipe.reward.scorers
        yield self._sampling("evaluate", section.batch_size, prompts, adapters=1 + rewards, folds=True)

    def tax(self) -> Iterator[Moment]:
        """One variant at a time, behind the prompt where one has it: items read, texts written; the judge."""
        section, judged, before = self.recipe.tax, self.recipe.evaluate, self.lengths.context
        if section is None:
            return
        shape, setting = self.shape, self.setting
        merged = setting.dtype == "float32" and setting.quantization == "none"
        apart = 0 if merged else 1 + bool(section.interpolate)
        common = Parts(
            fixed=self._fixed("trainer"),
            weights=self.base,
            adapters=4.0 * apart * self.adapter,
            states=memory.kv_cache(shape, 1, before, setting),
        )
        tokens = section.tokens_per_batch
        width = min(tokens, max(_TREE, before // 2))
        seen = tokens // width * (before + width)  # of all rows together, with their copies of the prompt
        looks = memory.kv_cache(shape.first(1), 1, seen, setting) + setting.size * width * seen
        looks += memory.repeated_heads(shape, 1, seen, setting)
        yield Moment("tax", "reading items", common._replace(
            activations=memory.passing(shape, max(tokens, before), setting, folds=not apart) + looks,
            logits=memory.training_logits(shape, tokens, setting)))  # fmt: skip
        texts = [
            (task.limit or _TEXTS) * getattr(section, name).samples_per_prompt
            for name, task in section.tasks.items()
            if name in ("toxicity", "humaneval")
        ] + [judged.prompts * judged.samples_per_prompt] * section.score
        written = [(max(texts), self.lengths.prompt, self.response, "")] if texts else []
        for name, task in section.tasks.items():
            if name not in TASKS and (new := longest_text(name)):
                written.append((task.limit or _ALL, _CONTEXT, new, f" of {name}"))
        for count, prompt, new, whose in written:
            rows = max(1, min(count, _GENERATED * tokens // (before + prompt + new + 1)))
            moment = self._sampling(
                "tax", rows, rows, adapters=apart, folds=False, before=before, prompt=prompt, response=new
            )
            yield moment._replace(name=moment.name + whose)
        if section.reward_model_hhh or (section.score and judged.judge == "reward"):
            average = self.recipe.ppo.ensemble == "average"
            yield self._scoring("tax", "judging", models=1 if average else self.recipe.reward.members)

    # ---------------------------------------------------------------- moments

    def _scorer(self) -> Shape:
        layers = self.recipe.reward.layers
        return self.shape.first(layers if isinstance(layers, int) else self.shape.layers)._replace(tied=True)

    def _scoring(self, stage: str, name: str, *, models: int) -> Moment:
        """Texts read by reward models, each with a base of its own, without a vocabulary head."""
        base = memory.weights(self._scorer(), self.setting)[0]
        read = memory.passing(self.shape, AT_ONCE, self.setting, folds=False)
        held = {"weights": models * base, "adapters": 4.0 * models * self.adapter}
        return Moment(stage, name, Parts(self._fixed("trainer"), **held, activations=read))

    def _sampling(
        self,
        stage: str,
        rows: int,
        prompts: int,
        *,
        adapters: int,
        folds: bool,
        before: int = 0,
        prompt: int | None = None,
        response: int | None = None,
    ) -> Moment:
        """before: tokens of a text before every prompt. prompt, response: lengths in tokens, where they are
        not the recipe's own."""
        shape, setting = self.shape, self.setting
        prompt, response = prompt or self.lengths.prompt, response or self.response
        room = before + prompt + response + 1
        folded = memory.folded_copies(shape, self.adapted, setting) if folds else 0.0
        common = Parts(
            fixed=self._fixed("plain"),
            weights=self.base,
            copies=folded,
            adapters=4.0 * adapters * self.adapter,
            kv_cache=memory.kv_cache(shape, rows, room, setting),
            states=memory.kv_cache(shape, 1, before, setting),
        )
        reading = common._replace(activations=memory.passing(shape, min(prompts, rows) * prompt, setting))
        sampling = common._replace(
            copies=folded + memory.packed_copies(shape, setting),
            activations=memory.repeated_heads(shape, rows, room, setting),
            logits=memory.sampling_logits(shape, rows, setting),
        )
        if reading.total > sampling.total:
            return Moment(stage, "reading prompts", reading)
        return Moment(stage, "sampling", sampling)

    def _preference(self, stage: str, section: PreferenceTraining) -> Iterator[Moment]:
        """A preference model: the pass over all examples that trunk and probes take, and the training."""
        shape, setting = self.shape, self.setting
        layers = getattr(section, "layers", None)
        if isinstance(layers, int):
            shape = shape.first(layers)
        count = self.lengths.comparisons
        responses, long = self.lengths.responses, (section.max_response_tokens or self.response) + 1
        if stage == "pmp":
            responses, count = 2, getattr(section, "limit", count)
        elif section.limit is not None:  # type: ignore[attr-defined]
            count = min(count or section.limit, section.limit)  # type: ignore[attr-defined]
        prompt = self.lengths.prompt
        rows = responses
        if section.share_prompts:
            rows = min(rows, max(1, -(-responses * long // (max(_ROW, 4 * prompt) - prompt))))
        width = prompt + -(-responses // rows) * long
        own = -(-section.batch_size // setting.world)
        at_once = max(1, min(own, section.tokens_per_micro_batch // (rows * width)))
        tokens = at_once * rows * width
        adapted = self.adapted if self.recipe.lora.top_k is None else min(self.adapted, shape.layers)
        adapted = min(adapted, shape.layers)
        learns = memory.adapter_weights(shape, self.recipe.lora.rank, adapted) + shape.hidden
        base, gathered = memory.weights(shape, setting)
        kept = None if count is None else count * (prompt + responses * long)
        if stage == "reward" and self.lengths.tokens is not None:
            kept = self.lengths.tokens if kept is None else min(kept, self.lengths.tokens)
        states = self._trunk(kept, section.trunk_gigabytes, kept=setting.zero < 3, on_gpu=False)
        gradients, optimizer = memory.learning(learns, setting)
        common = Parts(self._fixed("trainer"), base, adapters=4.0 * learns, states=states)
        language = section.lm_coef > 0 or section.objective == "imitation"
        head = shape.vocabulary * shape.hidden * setting.size if language and not shape.tied else 0.0
        reading = memory.passing(shape, AT_ONCE, setting)
        features = 0.0
        if getattr(section, "probe", False) and not setting.gpu:
            features = 2.0 * min(2e9, 4.0 * FEATURES * (count or 0) * responses * shape.hidden)
            states_at_once = AT_ONCE * shape.hidden * setting.size
            reading += 2.0 * FEATURES * states_at_once * memory.heap(states_at_once, setting)
        reads = {"copies": gathered, "activations": reading, "states": states + features}
        yield Moment(stage, "probe and trunk", common._replace(**reads))
        copies = gathered + memory.folded_copies(shape, adapted, setting)
        acts = memory.activations(
            shape, self.recipe.lora.rank, adapted, tokens, setting, length=width, mask=rows < responses
        )
        if stage == "reward" and not setting.gpu:
            # what was saved is loaded beside what was trained, and the heap keeps what training took
            left = acts * memory.small(tokens * shape.intermediate * setting.size, setting)
            weights = 2 * base + self.converted * shape.layers / self.shape.layers
            again = {"weights": weights, "adapters": 8.0 * learns, "copies": copies, "activations": left}
            yield Moment(stage, "loading again", common._replace(**again))
        logits = memory.training_logits(shape, at_once * long, setting) if language else 0.0
        yield Moment(stage, "training", common._replace(
            weights=base + head, copies=copies, gradients=gradients, optimizer=optimizer, activations=acts,
            logits=logits))  # fmt: skip

    def _rows(self, stage: str, section: Sft | Dpo) -> Iterator[Moment]:
        """SFT on packed rows, and DPO on pairs."""
        width = self.lengths.prompt + self.response + 1
        own = -(-section.batch_size // self.setting.world)
        sequences = own * (2 if isinstance(section, Dpo) else 1)
        tokens = max(width, min(section.tokens_per_micro_batch // width, sequences) * width)
        responses = getattr(section, "loss_on", "response") == "response"
        positions = tokens * self.response // width if responses else tokens
        yield self._learning(stage, tokens, width, positions, "trainer")

    def _distillation(self, section: Distill) -> Iterator[Moment]:
        width = section.max_tokens
        own = -(-section.batch_size // self.setting.world)
        tokens = max(width, min(section.tokens_per_micro_batch // width, own) * width)
        moment = self._learning("distill", tokens, width, tokens, "plain")
        if section.method == "full":
            whole = self.shape.matrices() + self.shape.others()
            gradients, optimizer = memory.learning(whole, self.setting)
            moment = moment._replace(parts=moment.parts._replace(
                copies=self.gathered, adapters=0.0, gradients=gradients, optimizer=optimizer))  # fmt: skip
        states = self._trunk(
            section.sequences * width, section.trunk_gigabytes, kept=self.setting.zero < 3, on_gpu=False
        )
        yield _with(moment, states=states if section.method == "lora" else 0.0)

    def _learning(self, stage: str, tokens: int, width: int, positions: int, libraries: str) -> Moment:
        gradients, optimizer = memory.learning(self.adapter, self.setting)
        parts = Parts(
            fixed=self._fixed(libraries),
            weights=self.base,
            copies=self.gathered + memory.folded_copies(self.shape, self.adapted, self.setting),
            adapters=4.0 * self.adapter,
            gradients=gradients,
            optimizer=optimizer,
            activations=self._training(tokens, width),
            logits=memory.training_logits(self.shape, positions, self.setting),
        )
        return Moment(stage, "training", parts)

    def _training(self, tokens: int, width: int) -> float:
        rank = self.recipe.lora.rank
        return memory.activations(self.shape, rank, self.adapted, tokens, self.setting, length=width)

    def _trunk(self, tokens: int | None, gigabytes: float, *, kept: bool, on_gpu: bool) -> float:
        """Hidden states of the frozen layers; those of whole data sets are on the machine, not on a GPU."""
        if not kept or self.adapted == self.shape.layers or (self.setting.gpu and not on_gpu):
            return 0.0
        limit = gigabytes * 1e9
        if tokens is None:
            return limit  # their number is not known yet: as much as they may take
        needed = float(tokens * self.shape.hidden * self.setting.size)
        return needed if needed <= limit else 0.0

    def _fixed(self, libraries: str) -> float:
        return 0.0 if self.setting.gpu else FIXED[libraries]


def _need(moment: Moment) -> float:
    return moment.parts.total


def _with(moment: Moment, **more: float) -> Moment:
    """A moment with something added to its parts."""
    parts = moment.parts
    return moment._replace(parts=parts._replace(**{k: getattr(parts, k) + v for k, v in more.items()}))
