"""What a PPO run trains, and how that is kept: adapters, optimizer, moving average, checkpoint files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from policy.audit.best import BestPolicy
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import optimizer_state_of, write_atomically
from rlhf.training.runtime import Runtime
from rlhf.training.schedule import learning_rate_factor

Adapters = dict[str, dict[str, Tensor]]
"""Whole tensors by adapter and saved name."""
_EMA = "average.safetensors"


class ValueWarmup:
    """The first steps, in which only the value learns: ``value_warmup`` of them, or fewer where the value
    explains ``value_warmup_until`` of the returns' variance before (value pre-training, Yuan 2025, VC-PPO,
    arXiv 2503.01491, section 3.2). Its returns are the rewards themselves (lambda 1): those of another lambda
    hold the value's own guesses, which a value explains however wrong it is.

    Args:
        section: the recipe's ``ppo`` section.
        say: tells the user a line.
    """

    def __init__(self, section: Ppo, say: Callable[[str], None]) -> None:
        self.section, self.say = section, say
        self.steps = section.value_warmup
        """How many there are, as far as is known."""

    def runs(self, step: int) -> bool:
        """Whether only the value learns in a step, from 0."""
        return step < self.steps

    def note(self, step: int, explained: float) -> None:
        """Note what share of the returns' variance the value explained on the rollout of a step, from 0.

        Raises:
            UserError: the goal is missed for good, and the recipe wants an end there.
        """
        section, until = self.section, self.section.value_warmup_until
        if until is None or step >= self.steps:
            return
        if explained >= until:
            self.steps = step + 1
            self.say(
                f"ppo: the value explains {explained:.2f} of the returns' variance, {until:g} are asked for: "
                f"from step {step + 2} on the policy learns too"
            )
        elif step + 1 == self.steps:
            missed = (
                f"the value explains {explained:.2f} of the returns' variance after {self.steps} steps, not "
                f"the {until:g} of ppo.value_warmup_until"
            )
            if section.value_warmup_missed == "stop":
                raise UserError(
                    f"ppo: {missed}: raise value_warmup or value_learning_rate, or set "
                    "value_warmup_missed=go_on, in a run of another name"
                )
            self.say(f"warning: ppo: {missed}; the policy learns all the same")


class AdapterWeights:
    """The adapters of a backbone that learn, their one optimizer, and the policy's moving average.

    Args:
        backbone: holds an adapter or head for each of :attr:`adapters`.
        runtime: its ``model`` and optimizer are made here.
        section: the recipe's ``ppo`` section.
        checkpoint: where the weights are read from, before the optimizer is made.
    """

    def __init__(self, backbone: Backbone, runtime: Runtime, section: Ppo, checkpoint: Path | None) -> None:
        self.backbone, self.runtime, self.section = backbone, runtime, section
        self.adapters = ("policy", "value") if section.has_value else ("policy",)
        if checkpoint:
            for adapter in self.adapters:
                backbone.load_adapter(adapter, checkpoint / adapter)
        by_adapter = {adapter: backbone.parameters_of(adapter) for adapter in self.adapters}
        self.rates = {"policy": section.learning_rate}
        if section.has_value:
            self.rates["value"] = section.value_learning_rate or section.learning_rate
        groups = [{"params": [*by_adapter[a].values()], "lr": self.rates[a]} for a in self.adapters]
        named = {f"{a}.{name}": p for a, parameters in by_adapter.items() for name, p in parameters.items()}
        runtime.prepare(backbone, groups, named, epsilon=section.adam_epsilon, kind=section.optimizer)
        self.best = BestPolicy() if section.keep_best else None
        self.value_warmup = ValueWarmup(section, self._say)
        self.ema: dict[str, Tensor] | None = None
        if section.ema_decay is not None:
            self.ema = self.gathered()["policy"]

    def set_learning_rates(self, step: int) -> float:
        """Set the learning rates of a step, from 0; the policy's is 0 while only the value warms up.

        Returns:
            The policy's.
        """
        section = self.section
        factor = learning_rate_factor(step, section.steps, kind=section.schedule, warmup=section.warmup_steps)
        rates = {adapter: rate * factor for adapter, rate in self.rates.items()}
        if self.value_warmup.runs(step):
            rates["policy"] = 0.0
        self.runtime.set_learning_rates([*rates.values()])
        return rates["policy"]

    def update_ema(self) -> None:
        """Update the policy's exponential moving average, where there is one; every process must call it."""
        if self.ema is None:
            return
        decay = self.section.ema_decay
        assert decay is not None, "there is an average only with a decay"
        for name, tensor in self.gathered()["policy"].items():
            self.ema[name].lerp_(tensor, 1.0 - decay)

    def note_sampled(self) -> None:
        """Note the policy that samples next, where the best is kept; every process must call it."""
        if self.best is not None:
            self.best.sampled(self.gathered()["policy"])

    def note_figures(self, step: int, figures: dict[str, float]) -> None:
        """Note how good the value was on a step's rollout, and what the test model gave it.

        Raises:
            UserError: the value's warm-up missed its goal; there is no test model.
        """
        self.value_warmup.note(step, figures["value/explained_variance"])
        if self.best is None:
            return
        if "audit/test" not in figures:
            raise UserError(
                "ppo.keep_best chooses by a test model: set reward.test_share, or test_reward_model"
            )
        self.best.judged(figures["audit/test"], figures["audit/test_error"])

    def _say(self, line: str) -> None:
        if self.runtime.rank == 0:
            print(line, flush=True)

    def chosen(self) -> dict[str, Tensor] | None:
        """The policy that is saved instead of the last one: the moving average, the best one, or None."""
        return self.ema if self.best is None else self.best.chosen().tensors

    def gathered(self) -> Adapters:
        """Every learning tensor, gathered from all shards; every process must call it."""
        found: Adapters = {adapter: {} for adapter in self.adapters}
        for name, tensor in self.runtime.gather_state().items():
            adapter, _, saved_name = name.partition(".")
            found[adapter][saved_name] = tensor
        return found

    def write_adapters(self, folder: Path, weights: Adapters) -> None:
        """Save adapters in peft's format, each in a folder of its name."""
        for adapter, tensors in weights.items():
            kind = "policy" if adapter.startswith("policy") else adapter
            (folder / adapter).mkdir(parents=True, exist_ok=True)
            self.backbone.save_adapter(kind, folder / adapter, tensors)

    def save(self, folder: Path, weights: Adapters, moments: dict[str, Tensor]) -> None:
        """Write a checkpoint's tensors; ``moments`` are the runtime's ``optimizer_tensors``."""
        self.write_adapters(folder, weights)
        write_atomically(folder / "optimizer.safetensors", save(moments))
        if self.ema is not None:
            write_atomically(folder / _EMA, save(self.ema))
        if self.best is not None:
            self.best.save(folder)

    def restore(self, checkpoint: Path) -> None:
        """Put optimizer and average back; the adapters were read before the optimizer was made.

        Raises:
            UserError: something is missing.
        """
        with optimizer_state_of(checkpoint):
            self.runtime.load_optimizer_tensors(load_file(checkpoint / "optimizer.safetensors"))
            if self.ema is not None:
                self.ema = load_file(checkpoint / _EMA)
            if self.best is not None:
                self.best.restore(checkpoint)
