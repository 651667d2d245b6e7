"""Which units the study consists of, with every number that decides result and cost. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from studies.engine.ladder import seconds
from studies.engine.units import Settings, Unit

BASE: Mapping[str, Any] = {  # of all policies, unless an arm says otherwise; the rest is the recipe's default
    "epochs": 2,
    "learning_rate": 1.5e-3,
    "kl_coef": 0.05,
    "missing_eos": "ignore",
}
FREE = {"kl_coef": 0.0}  # no KL price
GROUPED = {"samples_per_prompt": 4}
DPO = {"learning_rate": 1e-3, "beta": 0.1, "epochs": 5, "batch_size": 16}
PRICES = (0.02, 0.1, 0.3)
RATES = (1.5e-4, 5e-4, 5e-3)
WEAK, MIDDLE, STRONG = 0, 1, 2  # of the proxies' data sizes
NAMES = {  # of the proxies, and the arms without a KL price against them
    f"{size} {data}": f"free {size} {data}" for size in ("small", "large") for data in (WEAK, MIDDLE, STRONG)
}
ESTIMATORS = ("ppo", "rloo", "grpo", "dr_grpo", "reinforce", "dpo")
CLOSE = 0.05  # gold score: differences within it are none


@dataclass(frozen=True)
class Arm:
    """A policy: what is changed of :data:`BASE`.

    ppo: fields of the recipe's ``ppo`` section. more: settings of the unit. data: which of the plan's data
    sizes the proxy has. large: the proxy is the larger rung. test: a test reward model watches.
    """

    ppo: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    data: int = STRONG
    large: bool = False
    test: bool = False
    closed: bool = False
    members: int = 1
    """Reward models on the same comparisons, whose averaged weights (`ensemble: average`) are the proxy."""
    dpo: Mapping[str, Any] | None = None


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
    arms["dpo"] = Arm(dpo=DPO)
    arms |= {
        "closed": Arm(closed=True),
        "EOS trick": Arm({"missing_eos": "replace"}, closed=True),
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
        "value pre-trained": Arm({"value_warmup": 10, "value_warmup_until": 0.3}),
        "averaged reward models": Arm(members=3),
        "LoRA rank 1": Arm(more={"lora_rank": 1}),
        "LoRA rank 16": Arm(more={"lora_rank": 16}),
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
    rank: int = 4
    """Of a policy's adapter."""
    reward_rank: int = 16
    steps: int = 50
    responses: int = 80
    lessons: int = 300
    samples: int = 1024
    """Of a prompt, for best of n."""
    best_prompts: int = 16
    arms: tuple[str, ...] = tuple(ARMS)


QUICK = Plan(
    tokens=300_000,
    held_out=128,
    steps=40,
    responses=64,
    lessons=100,
    best_prompts=8,
    arms=(
        *("free small 0", "free small 1", "free small 2", "price 0.1", "sigmoid"),
        *("ppo", "rloo", "closed", "EOS trick", "advantages not whitened"),
    ),
)
OVERHEAD = 3.0  # seconds a unit


def units_of(plan: Plan) -> list[Unit]:
    """All policies and best of n of a study; what they need comes as their needs."""
    return [unit for seed in plan.seeds for unit in _of_seed(plan, seed)]


def _of_seed(plan: Plan, seed: int) -> list[Unit]:
    chains = {closed: _Chain(plan, seed, closed=closed) for closed in (False, True)}
    chain = chains[False]
    used = [ARMS[arm] for arm in plan.arms]
    proxies = {
        f"{size} {data}": chain.proxy(data, of_large=size == "large")
        for size in ("small", "large")
        for data in (WEAK, MIDDLE, STRONG)
        if any(arm.data == data and arm.large == (size == "large") and not arm.closed for arm in used)
    }
    counts = {"prompts": plan.best_prompts, "samples": plan.samples, "proxies": list(proxies)}
    read = plan.best_prompts * plan.samples * chain.both
    needs = (chain.small, chain.pairs, *proxies.values())
    best = Unit("best", chain.lengths | counts, needs, seconds(2, 0, 4 * read, OVERHEAD))
    return [best, *(_policy(plan, name, chains[ARMS[name].closed]) for name in plan.arms)]


class _Chain:
    """What the policies of a seed need: rungs, their pairs, proxies.

    closed: the stories of the text end, and so do responses; otherwise all have the full length.
    """

    def __init__(self, plan: Plan, seed: int, *, closed: bool) -> None:
        self.plan, own = plan, {"seed": seed, "revision": 3, "closed": closed}
        self.lengths: Settings = own | {
            "prompt_tokens": plan.prompt_tokens,
            "response_tokens": plan.response_tokens,
        }
        self.both = plan.prompt_tokens + plan.response_tokens
        names = ("vocabulary", "window", "tokens", "batch", "learning_rate")
        trained = own | {name: getattr(plan, name) for name in names} | {"text": []}
        self.small, self.large = (
            Unit("rung", trained | {"layers": n}, cost=seconds(n, plan.tokens, 0, OVERHEAD))
            for n in plan.layers
        )
        kept = {"pairs": 2 * plan.data[MIDDLE] + plan.data[STRONG], "prompts": plan.prompts}
        noise = {"noise": plan.noise, "held_out": plan.held_out}
        self.pairs = Unit("pairs", self.lengths | kept | noise, (self.small,), cost=OVERHEAD)

    def proxy(self, data: int, *, of_large: bool, half: str = "train", member: int = 0) -> Unit:
        """A reward model on so many comparisons, from the front (train) or from the back (test); members
        differ in their first weights and the order of the comparisons."""
        plan, base = self.plan, self.large if of_large else self.small
        number, layers = plan.data[data], base.settings["layers"]
        learning = {"reward_rate": plan.reward_rate, "reward_epochs": plan.reward_epochs[data]}
        what = {"comparisons": number, "half": half, "layers": layers, "rank": plan.reward_rank}
        what |= {"member": member} if member else {}
        cost = seconds(layers, 2 * plan.reward_epochs[data] * number * self.both, 0, OVERHEAD)
        return Unit("reward", self.lengths | learning | what, (base, self.pairs), cost)

    def average(self, data: int, *, of_large: bool, members: int) -> Unit:
        """The reward model of the averaged weights of several."""
        needs = [self.proxy(data, of_large=of_large, member=number) for number in range(members)]
        first = needs[0].settings
        settings = {**self.lengths, **{n: first[n] for n in ("comparisons", "layers")}}
        settings |= {"rank": members * first["rank"]}
        return Unit("average", settings, (self.large if of_large else self.small, *needs), OVERHEAD)


def _policy(plan: Plan, name: str, chain: _Chain) -> Unit:
    arm = ARMS[name]
    test = (chain.proxy(arm.data, of_large=arm.large, half="test"),) if arm.test else ()
    proxy = chain.proxy(arm.data, of_large=arm.large)
    if arm.members > 1:
        proxy = chain.average(arm.data, of_large=arm.large, members=arm.members)
    needs = (chain.small, chain.pairs, proxy, *test)
    sizes = {n: getattr(plan, n) for n in ("steps", "responses", "prompts", "held_out", "lessons")}
    changed = {"lora_rank": plan.rank, "lora_layers": "all", "value_init": "zero"} | dict(arm.more)
    learned = {"dpo": dict(arm.dpo)} if arm.dpo else {"ppo": {**BASE, **arm.ppo}}
    settings = chain.lengths | sizes | changed | {"arm": name} | learned
    sampled = plan.steps * plan.responses * chain.both
    cost = seconds(1, 4 * sampled, 6 * sampled, OVERHEAD)
    return Unit("policy", settings, needs, cost + (seconds(2, 0, sampled, 0) if arm.large else 0))
