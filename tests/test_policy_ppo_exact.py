"""The whole loop's gradient against the exact one: every response of up to two tokens of a tiny model."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_ppo import SMALL, TOKENIZER, Shaping, trainer

from policy.ppo.kl import ESTIMATORS
from policy.ppo.rollout import Rollout
from policy.ppo.update import NonfiniteUpdates, Updater
from policy.ppo.weights import AdapterWeights
from rlhf.models.backbone import Backbone
from rlhf.models.masks import action_mask
from rlhf.models.tiny import tiny_model
from rlhf.recipe.schema import Distributed, Lora, Ppo
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import Runtime

EOS, VOCABULARY, PROMPT = 1, 3, [2, 0]
EVERY = torch.tensor(
    [[EOS, 0], *itertools.product([v for v in range(VOCABULARY) if v != EOS], range(VOCABULARY))]
)
"""All responses [N, 2]; EOS ends one early."""
ACTIONS = action_mask(EVERY, EOS)
SCORES = torch.randn(len(EVERY), generator=torch.Generator().manual_seed(1))


class Enumerated:
    """A tiny model, the loop's parts around it, and the exact expectations."""

    def __init__(self, folder, **section):
        options = {
            "steps": 1, "epochs": 1, "gamma": 1.0, "lam": 1.0, "clip_range": None, "batch_size": 1,
            "missing_eos": "ignore", "whiten_advantages": False, "max_grad_norm": 1e9,
        }  # fmt: skip
        self.section = Ppo(**options | section)
        shared = self.section.value == "shared"
        values = ["value"] if self.section.has_value else []
        torch.manual_seed(0)
        self.backbone = Backbone(
            tiny_model(VOCABULARY, width=16, layers=2).requires_grad_(False).eval(),
            Lora(rank=4, alpha=8),
            adapters=["policy", *([] if shared else values)],
            heads=values,
            trainable=["policy", *values],
            shared={"value": "policy"} if shared else None,
        )
        for name, parameter in self.backbone.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        self.runtime = Runtime(Distributed(), seed=0, max_grad_norm=1e9, micro_batch_size=8)
        self.weights = AdapterWeights(self.backbone, self.runtime, self.section, None)
        nonfinite = NonfiniteUpdates(folder, self.runtime, 0)
        self.update = Updater(self.weights, seed=0, nonfinite=nonfinite, texts=None)
        self.ids = torch.cat(
            [
                torch.tensor(PROMPT).expand(len(EVERY), 2),
                EVERY,
                torch.where((EVERY == EOS).any(-1, keepdim=True), 0, EOS),
            ],
            dim=1,
        )
        open_B1 = ~(EVERY == EOS).any(-1, keepdim=True)
        self.mask = torch.cat([torch.ones(len(EVERY), 2, dtype=torch.bool), ACTIONS, open_B1], dim=1)
        with torch.no_grad():
            self.log_probs = self.log_prob_table("policy")[0]
            self.reference = self.log_prob_table("reference")[0]
            extra = {"value": "value"} if shared else {}
            said = self.backbone("policy", self.ids, self.mask, start=2, **extra)
            self.values = torch.zeros_like(self.log_probs)
            if shared:
                self.values = said[2]
            elif values:
                self.values = self.backbone("value", self.ids, self.mask, start=2)
        self.probability = (self.log_probs * ACTIONS).sum(-1).exp()

    def log_prob_table(self, role):
        """Log-probs of the tokens and entropies before them [N, 2], from peft's own forward pass."""
        self.backbone.activate(role)
        logits = self.backbone.base(input_ids=self.ids, use_cache=False).logits[:, 1:3]
        logp = (logits / self.section.temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, EVERY[..., None])[..., 0], entropy

    def rollout(self, rows):
        """What sampling would have given."""
        return Rollout(
            ids_BT=self.ids[rows],
            mask_BT=self.mask[rows],
            hidden_BTD=None,
            actions_BR=ACTIONS[rows],
            sampled_log_probs_BR=self.log_probs[rows],
            log_probs_BR=self.log_probs[rows],
            reference_log_probs_BR=self.reference[rows],
            entropy_BR=torch.zeros(len(rows), 2),
            values_BR=self.values[rows],
            scores_B=SCORES[rows],
            ended_B=(EVERY[rows] == EOS).any(-1),
            texts=[""] * len(rows),
            start=2,
        )

    def parameters(self):
        return self.backbone.parameters_of("policy")

    def of_loop(self, rows):
        """Gradient of the loop on some responses, for a loss that is a sum over their actions."""
        rollout = self.rollout(rows)
        found = {}

        def step():
            found.update({n: p.grad.clone() for n, p in self.parameters().items()})
            self.runtime.discard_gradients()
            return 1.0

        self.runtime.step = step
        shaped = Shaping(self.section, self.runtime)(rollout)
        self.update(0, rollout, shaped.advantages_BR, shaped.returns_BR, self.section.kl_coef)
        return {n: g * ACTIONS[rows].sum() for n, g in found.items()}

    def expected_of_loop(self):
        """The same, averaged over all responses, each as often as it is drawn."""
        totals = {}
        for rows in itertools.product(range(len(EVERY)), repeat=self.section.batch_size):
            weight = math.prod(float(self.probability[r]) for r in rows) / len(rows)
            for name, gradient in self.of_loop(list(rows)).items():
                totals[name] = totals.get(name, 0) + weight * gradient
        return totals

    def exact(self, objective):
        """Gradient of minus ``objective(log-probs, entropies)``, through plain peft."""
        self.backbone.activate("policy")
        (-objective(*self.log_prob_table("policy"))).backward()
        found = {n: p.grad.clone() for n, p in self.parameters().items()}
        self.backbone.zero_grad()
        return found

    def score_less_kl(self, beta):
        """E[score - beta * KL], the KL of whole responses."""

        def objective(logp, _):
            probability = (logp * ACTIONS).sum(-1).exp()
            return (probability * (SCORES - beta * ((logp - self.reference) * ACTIONS).sum(-1))).sum()

        return objective


def gap(got, expected):
    """Largest difference, and largest entry."""
    assert set(got) == set(expected)
    pairs = [(got[n], expected[n]) for n in got]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(b.abs().max()) for _, b in pairs)


def assert_equal(got, expected):
    distance, size = gap(got, expected)
    assert size > 0.05
    assert distance < 1e-5 * size


@pytest.mark.parametrize(
    "section",
    [
        {"kl_coef": 0.0},
        {"kl_coef": 0.3, "temperature": 0.7, "clip_range": 0.2},
        {"kl_coef": 0.3, "value": "shared", "value_coef": 0.0},
        {"kl_coef": 0.3, "algorithm": "reinforce"},
        {"kl_coef": 0.3, "algorithm": "rloo", "samples_per_prompt": 2, "batch_size": 2},
    ],
    ids=lambda section: ",".join(f"{k}={v}" for k, v in section.items()),
)
def test_the_loop_follows_the_exact_gradient_of_score_less_kl(section, tmp_path):
    model = Enumerated(tmp_path, **section)
    assert float(model.probability.sum()) == pytest.approx(1, abs=1e-5)
    assert float((model.log_probs - model.reference)[ACTIONS].abs().max()) > 0.1
    assert_equal(model.expected_of_loop(), model.exact(model.score_less_kl(section["kl_coef"])))


def test_the_value_is_a_baseline_that_changes_single_gradients_but_not_their_mean(tmp_path):
    gradients = {}
    for algorithm in ("ppo", "reinforce"):
        model = Enumerated(tmp_path, algorithm=algorithm)
        gradients[algorithm] = [model.of_loop([r]) for r in range(len(EVERY))]
    assert gap(gradients["ppo"][1], gradients["reinforce"][1])[0] > 0.01


def token_kl(model, estimator):
    """Minus the mean over drawn responses of an estimate summed over tokens, the draw a constant."""

    def objective(logp, _):
        prices = ESTIMATORS[estimator](logp, model.reference) * ACTIONS
        return -(model.probability * prices.sum(-1)).sum()

    return objective


def exact_token_kl(model):
    """Minus the KL of every next-token distribution, over prefixes as they are drawn: constants."""

    def objective(logp, _):
        probability = torch.where(ACTIONS, logp, 0).exp()
        reach = torch.stack([torch.ones(len(EVERY)), model.log_probs[:, 0].exp()], dim=1)
        terms = torch.where(ACTIONS, probability * (logp - model.reference), 0) * reach
        alike = torch.tensor([int((EVERY[:, 0] == first).sum()) for first in EVERY[:, 0]])
        return -(terms[:, 0] / alike).sum() - terms[:, 1].sum()

    return objective


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_price_in_the_loss_adds_its_own_gradient(estimator, tmp_path):
    model = Enumerated(tmp_path, kl_in="loss", kl_estimator=estimator, kl_coef=0.3)
    price = token_kl(model, estimator)
    score = model.score_less_kl(0.0)
    assert_equal(model.expected_of_loop(), model.exact(lambda *x: score(*x) + 0.3 * price(*x)))


def test_k2_in_the_loss_has_the_gradient_of_each_tokens_kl_k3_another_and_k1_none(tmp_path):
    model = Enumerated(tmp_path)
    exact = model.exact(exact_token_kl(model))
    assert_equal(model.exact(token_kl(model, "k2")), exact)
    assert gap(model.exact(token_kl(model, "k3")), exact)[0] > 0.05 * gap(exact, exact)[1]
    nothing = {n: torch.zeros_like(g) for n, g in exact.items()}
    assert gap(model.exact(token_kl(model, "k1")), nothing)[0] < 1e-5


def test_k1_in_the_reward_of_one_token_has_the_gradient_of_k2_in_the_loss(tmp_path, monkeypatch):
    """On responses of one token; of longer ones the reward also prices the KL that a token leads to."""
    monkeypatch.setitem(globals(), "ACTIONS", torch.tensor([[True, False]]).expand(len(EVERY), 2))
    gradients = {}
    for place, estimator in (("reward", "k1"), ("loss", "k2"), ("loss", "k3")):
        model = Enumerated(tmp_path, kl_in=place, kl_estimator=estimator, kl_coef=0.3)
        model.probability = model.probability * 0
        for token in range(VOCABULARY):  # one response for each first token
            row = int((EVERY[:, 0] == token).nonzero()[0])
            model.probability[row] = model.log_probs[row, 0].exp()
        gradients[estimator] = model.expected_of_loop()
    assert_equal(gradients["k1"], gradients["k2"])
    distance, size = gap(gradients["k3"], gradients["k1"])
    assert distance > 0.01 * size


def test_the_entropy_bonus_adds_the_gradient_of_the_entropies_before_the_actions(tmp_path):
    model = Enumerated(tmp_path, entropy_coef=0.2, kl_coef=0.0)
    score = model.score_less_kl(0.0)

    def objective(logp, entropy):
        return score(logp, entropy) + 0.2 * (model.probability[:, None] * entropy * ACTIONS).sum()

    assert_equal(model.expected_of_loop(), model.exact(objective))


# ---- the start of a run


@pytest.mark.parametrize("options", [{}, {"start": True, "stir": 0.3}, {"value": "shared", "start": True}])
def test_the_first_ratio_is_one_and_the_first_kl_zero(options, monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr("policy.ppo.update.check_first_ratio", lambda error: errors.append(float(error)))
    built = trainer(tmp_path, **SMALL | {"micro_batch_size": 3}, **options)
    if options.get("stir"):  # the reference is not the base
        built.backbone.activate("policy")
        assert float(built.backbone.parameters_of("reference").popitem()[1].abs().max()) > 0
    built.train()
    assert len(errors) == 2
    assert max(errors) < 2e-6
    row = read_metrics(tmp_path)[0]
    assert abs(row["objective/kl"]) < 1e-5
    assert 0 <= row["objective/kl_k3"] < 1e-9
    assert read_metrics(tmp_path)[1]["objective/kl_k3"] > 1e-7


def test_a_reference_that_was_copied_never_moves(tmp_path):
    built = trainer(tmp_path, start=True, stir=0.3, **SMALL)
    before = {n: p.clone() for n, p in built.backbone.parameters_of("reference").items()}
    built.train()
    for name, tensor in built.backbone.parameters_of("reference").items():
        assert torch.equal(tensor, before[name]), name
    saved = load_file(built.checkpoints.newest() / "policy" / "adapter_model.safetensors")
    assert any(not torch.equal(saved[name], before[name]) for name in before)


# ---- a known optimum


def test_a_priced_policy_ends_near_the_closed_form_optimum(tmp_path):
    """One token, two letters with a score: the optimum is the reference tilted by exp(score / beta)."""
    beta, scored = 0.3, {}
    built = trainer(
        tmp_path, reward_fn=lambda r: torch.tensor([scored.get(text, 0.0) for text in r.texts]), limit=1,
        kl_coef=beta, steps=30, epochs=2, batch_size=128, micro_batch_size=128, rollout_batch_size=128,
        learning_rate=1e-2, whiten_advantages=False,
    )  # fmt: skip
    built.prompts = built.prompts[:1]
    prompt = torch.tensor([built.dialogue.encode_prompt(built.prompts[0])])

    def distribution(role):
        built.backbone.activate(role)
        with torch.no_grad():
            return built.backbone.base(prompt).logits[0, -1].double().log_softmax(-1)

    reference = distribution("reference")
    letters = [v for v in reference.argsort(descending=True).tolist() if TOKENIZER.decode([v]).isascii()][:2]
    rewards = torch.zeros(len(TOKENIZER))
    for letter, score in zip(letters, (1.0, 0.7), strict=True):
        scored[TOKENIZER.decode([letter])] = score
        rewards[letter] = score
    optimum = (reference + rewards / beta).log_softmax(-1)

    def distance():
        now = distribution("policy")
        return float((now.exp() * (now - optimum)).sum())

    before = distance()
    built.train()
    assert before > 0.1
    assert distance() < before / 10
