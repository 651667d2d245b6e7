"""Which units the study consists of, with every number that decides result and cost. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from studies.engine.ladder import seconds
from studies.engine.units import Settings, Unit

BASE: Mapping[str, Any] = {  # of all policies, unless an arm says otherwise; the rest is the recipe's default
    "epochs": 2,
    "learning_rate": 1e-3,
    "kl_coef": 0.05,
    "missing_eos": "ignore",
}
FREE = {"kl_coef": 0.0}  # no KL price
GROUPED = {"samples_per_prompt": 4}
PRICES = (0.02, 0.1, 0.3)
RATES = (1e-4, 3e-4, 3e-3)
WEAK, MIDDLE, STRONG = 0, 1, 2  # of the proxies' data sizes
NAMES = {  # of the proxies, and the arms without a KL price against them
    f"{size} {data}": f"free {size} {data}" for size in ("small", "large") for data in (WEAK, MIDDLE, STRONG)
}
ESTIMATORS = ("ppo", "rloo", "grpo", "dr_grpo", "reinforce")
CLOSE = 0.05  # gold score: differences within it are none


@dataclass(frozen=True)
class Arm:
    """A policy: what is changed of :data:`BASE`.

    ppo: fields of the recipe's ``ppo`` section. more: settings of the unit. data: which of the plan's data
    sizes the proxy has. large: the proxy is the larger rung. test: a test reward model watches.
    """

    ppo: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    data: int = MIDDLE
    large: bool = False
    test: bool = False


def _arms() -> dict[str, Arm]:
    arms = {
        f"free {size} {data}": Arm(FREE, data=data, large=size == "large", test=data == MIDDLE)
        for size in ("small", "large")
        for data in (WEAK, MIDDLE, STRONG)
    }
    arms |= {f"price {beta:g}": Arm({"kl_coef": beta}) for beta in PRICES}
    arms |= {
        f"{shape}": Arm(FREE | {"score_shape": shape}, data=WEAK) for shape in ("sigmoid", "log_sigmoid")
    }
    arms["ppo"] = Arm()
    arms["reinforce"] = Arm({"algorithm": "reinforce"})
    arms |= {a: Arm({"algorithm": a} | GROUPED) for a in ("rloo", "grpo", "dr_grpo")}
    arms |= {
        "EOS trick": Arm({"missing_eos": "replace"}),
        "advantages not whitened": Arm({"whiten_advantages": False}),
        "rewards whitened": Arm({"whiten_rewards": True}),
        "value from the reward model": Arm(more={"value_init": "reward"}),
        "running reward normalization": Arm({"score_normalization": "running"}),
        "Adam epsilon 1e-8": Arm({"adam_epsilon": 1e-8}),
        "no clip": Arm({"clip_range": None}),
        "lambda 1": Arm({"lam": 1.0}),
        "lambda 0.8": Arm({"lam": 0.8}),
        "value lambda 1": Arm({"lam_value": 1.0}),
        "lambda by length": Arm({"lam_length": 0.2}),
        "LoRA rank 2": Arm(more={"lora_rank": 2}),
        "LoRA rank 64": Arm(more={"lora_rank": 64}),
    }
    return arms | {f"learning rate {rate:g}": Arm({"learning_rate": rate}) for rate in RATES}


ARMS: Mapping[str, Arm] = _arms()


@dataclass(frozen=True)
class Plan:
    """One study; numbers are of one seed."""

    seeds: tuple[int, ...] = (0, 1, 2)
    layers: tuple[int, int] = (1, 2)
    """Of the policy and of the small proxies; of the large proxies."""
    vocabulary: int = 1024
    window: int = 128
    tokens: int = 500_000
    batch: int = 8
    learning_rate: float = 1e-3
    prompt_tokens: int = 24
    response_tokens: int = 24
    prompts: int = 256
    data: tuple[int, int, int] = (200, 600, 1600)
    """Comparisons that a proxy learns from."""
    noise: float = 0.15
    """Of the annotator, in units of the gold score."""
    held_out: int = 256
    """Prompts: of the pairs that reward models are judged by, and of a policy's last figures."""
    reward_rate: float = 1e-3
    reward_epochs: tuple[int, int, int] = (16, 8, 5)
    """Of each data size: few comparisons need several passes to be learned at all."""
    rank: int = 16
    steps: int = 80
    responses: int = 64
    lessons: int = 300
    samples: int = 1024
    """Of a prompt, for best of n."""
    best_prompts: int = 16
    arms: tuple[str, ...] = tuple(ARMS)


QUICK = Plan(
    tokens=300_000,
    held_out=128,
    steps=50,
    responses=32,
    lessons=100,
    best_prompts=8,
    arms=(
        *("free small 0", "free small 1", "free small 2", "price 0.1", "sigmoid"),
        *("ppo", "rloo", "EOS trick", "advantages not whitened"),
    ),
)
OVERHEAD = 3.0  # seconds a unit


def units_of(plan: Plan) -> list[Unit]:
    """All policies and best of n of a study; what they need comes as their needs."""
    return [unit for seed in plan.seeds for unit in _of_seed(plan, seed)]


def _of_seed(plan: Plan, seed: int) -> list[Unit]:
    own: Settings = {"seed": seed, "revision": 2}
    lengths = own | {"prompt_tokens": plan.prompt_tokens, "response_tokens": plan.response_tokens}
    names = ("vocabulary", "window", "tokens", "batch", "learning_rate")
    trained = own | {name: getattr(plan, name) for name in names} | {"text": []}
    small, large = (
        Unit("rung", trained | {"layers": n}, cost=seconds(n, plan.tokens, 0, OVERHEAD)) for n in plan.layers
    )
    both = plan.prompt_tokens + plan.response_tokens
    kept = {"pairs": 2 * plan.data[MIDDLE] + plan.data[STRONG], "prompts": plan.prompts}
    pairs = Unit(
        "pairs", lengths | kept | {"noise": plan.noise, "held_out": plan.held_out}, (small,), cost=OVERHEAD
    )

    def proxy(data: int, *, of_large: bool, half: str = "train") -> Unit:
        base = large if of_large else small
        number, layers = plan.data[data], base.settings["layers"]
        learning = {"reward_rate": plan.reward_rate, "reward_epochs": plan.reward_epochs[data]}
        what = {"comparisons": number, "half": half, "layers": layers, "rank": plan.rank}
        cost = seconds(layers, 2 * plan.reward_epochs[data] * number * both, 0, OVERHEAD)
        return Unit("reward", lengths | learning | what, (base, pairs), cost)

    used = [ARMS[arm] for arm in plan.arms]
    proxies = {
        f"{size} {data}": proxy(data, of_large=size == "large")
        for size in ("small", "large")
        for data in (WEAK, MIDDLE, STRONG)
        if any(arm.data == data and arm.large == (size == "large") for arm in used)
    }
    counts = {"prompts": plan.best_prompts, "samples": plan.samples, "proxies": list(proxies)}
    read = plan.best_prompts * plan.samples * both
    made = [
        Unit("best", lengths | counts, (small, pairs, *proxies.values()), seconds(2, 0, 4 * read, OVERHEAD))
    ]
    for name in plan.arms:
        arm = ARMS[name]
        test = (proxy(arm.data, of_large=arm.large, half="test"),) if arm.test else ()
        needs = (small, pairs, proxies[f"{'large' if arm.large else 'small'} {arm.data}"], *test)
        sizes = {n: getattr(plan, n) for n in ("steps", "responses", "prompts", "held_out", "lessons")}
        changed = {"lora_rank": plan.rank, "lora_layers": "all", "value_init": "zero"} | dict(arm.more)
        settings = lengths | sizes | changed | {"arm": name, "ppo": {**BASE, **arm.ppo}}
        sampled = plan.steps * plan.responses * both
        cost = seconds(1, 4 * sampled, 6 * sampled, OVERHEAD) + (
            seconds(2, 0, sampled, 0) if arm.large else 0
        )
        made.append(Unit("policy", settings, needs, cost))
    return made
