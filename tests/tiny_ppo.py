"""The PPO loop around a tiny random model, for tests."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from policy.audit.scores import AuditedScore
from policy.ppo.kl import KLController
from policy.ppo.reward_shaping import RewardShaper
from policy.ppo.setup import new_backbone
from policy.ppo.trainer import PpoTrainer
from policy.ppo.weights import ValueWarmup
from rlhf.data.comparisons import Message
from rlhf.models.tiny import tiny_model, tiny_tokenizer
from rlhf.recipe.schema import Lora, Ppo
from rlhf.tokenization.dialogue import Dialogue

TOKENIZER = tiny_tokenizer()
PROMPTS = [(Message("user", text),) for text in ("one", "and two", "three or so", "4", "five", "is six")]
LIMIT = 6
SMALL = {"width": 16, "limit": 4, "batch_size": 8, "micro_batch_size": 8, "epochs": 1, "learning_rate": 1e-3}
"""Options of a trainer that takes a few hundredths of a second a step."""


def varied(said):
    """Scores that differ from text to text."""
    return torch.tensor([sum(map(ord, text)) % 7 - 3.0 for text in said.texts])


def dialogue_of(limit=LIMIT):
    """The token contract."""
    return Dialogue(TOKENIZER, template="plain", max_prompt_tokens=32, max_response_tokens=limit)


def backbone_of(ppo, *, stir=0.0, start=False, width=64, dtype=torch.float32):
    """A random base with the adapters that a ``ppo`` section needs; all random numbers are seeded."""
    torch.manual_seed(0)
    base = tiny_model(len(TOKENIZER), width=width).to(dtype).requires_grad_(False).eval()
    backbone = new_backbone(base, Lora(rank=4, alpha=8, layers="top_2"), ppo, reference_copy=start)
    torch.manual_seed(1)  # the same stir whatever other adapters there are
    for name, parameter in backbone.parameters_of("policy").items():
        if "lora_B" in name:
            parameter.data.normal_(std=stir)
    if start:
        backbone.copy_adapter("policy", "reference")
    return backbone


def trainer(
    folder,
    *,
    reward_fn=varied,
    test_fn=None,
    stir=0.0,
    trunk=True,
    start=False,
    width=64,
    limit=LIMIT,
    dtype=torch.float32,
    trackers=None,
    **section,
):
    """A trainer in a folder.

    test_fn: scores of a test model, which are only logged.
    stir: spread of the policy adapter's B at the start. start: that adapter has a frozen copy as its
    reference. dtype: of the base. section: fields of the recipe's ``ppo`` section.
    """
    options = {"steps": 2, "batch_size": 16, "micro_batch_size": 16, "epochs": 2, "learning_rate": 1e-2,
               "missing_eos": "ignore", "checkpoint_every": 1000} | section  # fmt: skip
    ppo = Ppo(**options)
    backbone = backbone_of(ppo, stir=stir, start=start, width=width, dtype=dtype)
    if not trunk:
        backbone.frozen_layers = 0
    options = {"trackers": trackers}
    if test_fn is not None:
        reward_fn = AuditedScore(reward_fn, test_fn, ppo.micro_batch_size)
        options["reward_metrics"] = lambda: reward_fn.figures(lambda sums: sums, torch.device("cpu"))
    return PpoTrainer(
        backbone=backbone,
        dialogue=dialogue_of(limit),
        prompts=PROMPTS,
        reward_fn=reward_fn,
        section=ppo,
        seed=0,
        folder=folder,
        **options,
    )


class Shaped(NamedTuple):
    """What the loop makes of a rollout."""

    rewards_BR: torch.Tensor
    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor


class Shaping:
    """The loop from a scored rollout to what the update gets."""

    def __init__(self, section, runtime):
        self.section, self.runtime = section, runtime
        self.shaper, self.controller = RewardShaper(section, runtime), KLController(section, runtime)
        self.scores = self.shaper.scores
        self.weights, self.done = SimpleNamespace(value_warmup=ValueWarmup(section, print)), 0

    def __call__(self, rollout):
        rewards_BR = self.shaper(rollout, self.controller.coef)
        advantages_BR, returns_BR = PpoTrainer.estimate_advantages(self, rollout, rewards_BR)
        return Shaped(rewards_BR, advantages_BR, returns_BR)

    def state(self):
        return self.shaper.state() | self.controller.state()

    def restore(self, state):
        self.shaper.restore(state)
        self.controller.restore(state)


def weights(built):
    """A copy of every learning tensor, by adapter and name."""
    named = {a: built.backbone.parameters_of(a) for a in ("policy", "value")}
    return {f"{a}.{n}": p.detach().clone() for a, part in named.items() for n, p in part.items()}


def trained(folder, **options):
    """The weights after all steps."""
    built = trainer(folder, **options)
    built.train()
    return weights(built)


def assert_close(got, expected, atol):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
