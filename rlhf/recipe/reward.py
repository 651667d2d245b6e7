"""Comparisons and what is learned from them: the lab, pre-training, the reward model and its card."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.recipe.shared import Training
from rlhf.recipe.types import (
    BASE,
    STARTS,
    Files,
    Folder,
    Fraction,
    Judged,
    LessThanHalf,
    Natural,
    NonNegative,
    Policies,
    Positive,
    Rate,
    Section,
)

Pooling = Literal["last", "mean"]


class Collect(Section):
    """The lab: sampled responses, ranked by a gold judge with noise (Ziegler 2019, Gao 2022)."""

    prompts: Positive = 512
    """Number of prompts that get a comparison."""
    skip: Natural = 0
    """Prompts that are passed over first; what is sampled for the others is as it would be behind them."""
    responses: Annotated[int, Field(ge=2)] = 4
    """Responses K a prompt."""
    policies: Policies = [BASE]
    """Who writes them: `base`, and folders of saved adapters such as runs/x/ppo/policy; dealt out evenly, one
    that stands twice gets twice as many."""
    judge: Judged = "vader"
    """The gold score: `vader`, a function FILE.py:NAME, or a server {url, model, prompt, ...}; used to label
    and to evaluate, never as the PPO reward."""
    noise: NonNegative = 0.1
    """Scale of the annotator's Gumbel noise in units of the gold score: P(i over j) = sigmoid(gap/noise)."""
    temperature: Rate = 1.0
    """Sampling temperature."""
    prompts_per_batch: Positive = 16
    """Prompts sampled together; a finished batch is kept when the run is interrupted."""


class Rank(Section):
    """The page on which people rank responses (`make rank`)."""

    files: Files = []
    """Rows with a prompt and 2 to 9 responses, with or without ranks (any format of comparisons); empty =
    responses are sampled for the prompts of `data.prompts`, or else of `data.comparisons`."""
    prompts: Positive = 100
    """At most this many prompts, drawn by the seed."""
    policies: Policies = [BASE]
    """Who writes the sampled responses, as `collect.policies`; the page does not say it."""
    responses: Annotated[int, Field(ge=2, le=9)] = 4
    """Sampled responses K a prompt; 9 is as many as there are number keys."""
    temperature: Rate = 1.0
    """Sampling temperature."""
    annotators: Positive = 1
    """People who rank each prompt; from 2 on, their agreement is shown. May change between two starts."""
    instructions: str = (
        "Which response would help the person more? Prefer what is correct, honest and harmless; length is "
        "no merit. Responses that are equally good are tied."
    )
    """What people are asked, at the top of the page. May change between two starts."""


class Rounds(Section):
    """Online RLHF in rounds (Bai 2022, section 4.5): sample policies, rank, train anew on all comparisons."""

    number: Positive = 3
    """How many; may be raised later, and the finished ones stay."""
    prompts: Positive = 128
    """Prompts that get a comparison in a round, other ones in each until all have had their turn."""
    policies: Positive = 2
    """How many of the newest policies write the responses; the base is the oldest one."""
    ranked_by: Literal["judge", "people"] = "judge"
    """Who ranks them: `collect.judge`, or people with `make rank`, for whom each round waits."""


class PreferenceTraining(Training):
    """How a model learns from comparisons: the fields that `pmp` and `reward` share."""

    objective: Literal["ranked", "binary", "imitation"] = "ranked"
    """`ranked`: order the responses of a prompt (Askell 2021, section 3; Ouyang 2022, eq. 1); `binary`: tell
    good (rank 0) from bad (all others) by an absolute label; `imitation`: language-model loss on the best
    response alone, candidates then ranked by their log-probability."""
    likelihood: Literal["pairs", "plackett_luce"] = "pairs"
    """Of `ranked`: every pair of a prompt on its own (Bradley-Terry), or the whole order at once
    (Plackett 1975, Luce 1959)."""
    margin: NonNegative = 0.0
    """How far the better score has to lead for each step of rank, in units of the score (Touvron 2023)."""
    label_smoothing: LessThanHalf = 0.0
    """Weight of the opposite label in the pair loss."""
    label_noise: LessThanHalf = 0.0
    """Share of labels taken to be flipped by the annotator: the pair's likelihood is mixed, not its loss."""
    center_rewards_coef: NonNegative = 0.0
    """Coefficient of the mean squared sum of a pair's scores, which pulls scores to 0 (Eisenstein 2023)."""
    lm_coef: NonNegative = 0.0
    """Coefficient of the language-model loss on the best response (Askell 2021 and PPO-max use 1)."""
    pooling: Pooling = "last"
    """What the scalar head reads: the state at the closing token, as Hugging Face's classifiers do, or the
    mean of the states over the response, which small models on long texts tell more by. A model of the latter
    kind has to be loaded by this project."""
    learning_rate: Rate | None = None
    """Peak of AdamW; null = 0.1 (`pmp`) or 0.01 (`reward`) of model.pretraining_learning_rate (Bai 2022,
    A.2)."""
    share_prompts: bool = True
    """Forward a prompt once for all its responses (one packed row, block attention mask); false = one row a
    response. Both give the same scores; an architecture that cannot pack falls back with a warning."""
    trunk_gigabytes: NonNegative = 4.0
    """Memory for the hidden states below the first adapted layer (lora.layers=top_k), which are computed once
    for all passes; where they need more, or with 0, every pass computes them anew."""
    max_response_tokens: Positive | None = None
    """Longest response that is read here, in tokens; longer ones are cut. null = that of `dialogue`, up to
    which PPO samples; a greater number reads more of what people wrote."""

    @property
    def length_key(self) -> str:
        """The key that says how long a response may be, for messages."""
        own = self.max_response_tokens is not None
        return f"{type(self).__name__.lower() if own else 'dialogue'}.max_response_tokens"

    @model_validator(mode="after")
    def _objective_options(self) -> PreferenceTraining:
        ranked = self.objective == "ranked"
        pairs = ranked and self.likelihood == "pairs"
        for name in ("margin", "label_smoothing", "label_noise"):
            if getattr(self, name) and not pairs:
                raise ValueError(
                    f"{name} belongs to objective=ranked with likelihood=pairs; remove one of them"
                )
        if self.label_smoothing and self.label_noise:
            raise ValueError("label_smoothing and label_noise are two answers to one question; choose one")
        if self.likelihood != "pairs" and not ranked:
            raise ValueError("likelihood belongs to objective=ranked; remove one of them")
        if self.center_rewards_coef and self.objective == "imitation":
            raise ValueError(
                "center_rewards_coef needs a score, which objective=imitation has not; remove one of them"
            )
        if self.pooling != "last" and self.objective == "imitation":
            raise ValueError("pooling is for a score, which objective=imitation has not; remove one of them")
        if self.lm_coef and self.objective == "imitation":
            raise ValueError("objective=imitation is the language-model loss already; remove lm_coef")
        return self


class PmpSource(Section):
    """One source of public comparisons."""

    files: Files = Field(min_length=1)
    """StackExchange `Posts.xml`, MediaWiki export XML, Reddit and SHP rows, comparisons; globs, hub ids."""
    weight: Rate = 1.0
    """Share of this source in the mixture, relative to the others."""
    columns: dict[str, str | list[str]] = {}
    """Its columns by the names of a known format, as `data.columns`."""


class Pmp(PreferenceTraining):
    """Preference-model pre-training (PMP) on public comparisons, before `reward` (Askell 2021, section 4)."""

    sources: list[PmpSource] = Field(min_length=1)
    """The mixture."""
    start: Folder | None = None
    """What the adapter starts from: a folder, or `sft` or `distill`, that stage of this run; null = fresh."""
    form: Literal["ranked", "binarized"] = "binarized"
    """`binarized`: each ordered pair A > B becomes GOOD:A > BAD:A and BAD:B > GOOD:B, which transfers better
    (Askell 2021, section 4.1); `ranked`: the comparisons as they are."""
    good_prefix: str = "GOOD:"
    """Control text before a response that is called good."""
    bad_prefix: str = "BAD:"
    """Control text before a response that is called bad."""
    max_responses: Annotated[int, Field(ge=2, strict=True)] = 4
    """Responses of one question that are used, the same number from every part of its order."""
    layers: Positive | None = None
    """As `reward.layers`: the reward model that starts from this one needs the same number; null = all."""
    limit: Positive = 10_000
    """Comparisons in the mixture before binarizing; a source that has fewer than its share gives all."""
    held_out: Fraction = 0.05
    """Share of the questions held out."""


class Reward(PreferenceTraining):
    """The reward model: k-way ranked loss (InstructGPT, Ouyang 2022, eq. 1) unless said otherwise."""

    start: Folder | None = None
    """Folder of a trained preference model to start from; or the folder of a policy's adapter, or `sft` or
    `distill`, that stage of this run, whose weights the adapter takes under a fresh head; null = the run's
    `pmp` stage where the recipe has one, else a fresh adapter and head."""
    layers: Positive | Literal["auto"] | None = None
    """The reward model consists of so many of the base's layers, from the first, then its last norm and the
    head: in the middle there may be more to read than at the end (Tenney 2019, arXiv 1905.05950), and what is
    not there costs nothing, in PPO either. `auto` = as many as give the best linear probe of that pooling
    by cross-validation on the training comparisons; null = all. lora.layers=top_k counts from the last of
    them."""
    limit: Positive | None = None
    """Train on this many of the training comparisons, drawn by the seed; null = all. A smaller number is
    a part of a larger, and the held-out part stays the same, so runs can be compared."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training comparisons' groups (else prompts) that is kept out of training to choose by: the
    adapter of the step with the best pair accuracy there is kept, of equal ones that with the lower loss.
    0 = the last step's."""
    evaluations: Positive = 4
    """Steps at which `validation` judges, evenly spread, the last one included."""
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training comparisons' groups and prompts that a second reward model alone learns from, the
    test model, with the same settings: PPO is never rewarded by it, and it tells when the reward model is
    exploited (Bai 2022, section 4.3: 0.5). 0 = none."""
    members: Positive = 1
    """Reward models trained from different seeds on the same comparisons (an ensemble of adapters)."""
    reference_responses: Positive = 256
    """Responses whose scores are brought to mean 0 and variance 1 after training (Ziegler 2019)."""
    probe: bool | Literal["all"] = True
    """Also fit linear probes on the frozen base's features, the figure a reward model has to beat: at the
    last layer's last token, and at the layer and the pooling (last token, or mean over the response) that
    cross-validation on the training part finds best. true = of the layers above the frozen trunk, where there
    is one, since those below would take a pass of their own; `all` = of all, as with layers=auto."""
    head_init: Literal["normal", "zero", "probe"] = "normal"
    """A fresh head starts as N(0, 1/(d+1)) (Stiennon 2020), as 0, or as the linear probe there; with few
    comparisons the latter two spare the training a random direction to be unlearned first (LP-FT, Kumar 2022,
    arXiv 2202.10054)."""

    @property
    def scorers(self) -> int:
        """Reward models that the stage trains, the test model included."""
        return self.members + bool(self.test_share)

    @model_validator(mode="after")
    def _head(self) -> Reward:
        if self.validation and self.objective == "imitation":
            raise ValueError(
                "validation is for a score, which objective=imitation has not; remove one of them"
            )
        if self.test_share and self.objective == "imitation":
            raise ValueError("test_share makes a second score, and objective=imitation has none; remove one")
        if self.layers == "auto" and not self.probe:
            raise ValueError("layers=auto takes those of the best probe; set reward.probe=true")
        if self.layers == "auto" and self.start:
            raise ValueError("layers=auto fits the frozen base; name the number of layers that start has")
        if self.layers is not None and self.objective == "imitation":
            raise ValueError(
                "objective=imitation reads the vocabulary head, behind all layers; remove layers"
            )
        if self.layers is not None and self.start in STARTS["reward"]:
            raise ValueError(f"start={self.start} is an adapter for all layers; remove layers, or start")
        if self.head_init == "probe" and not self.probe:
            raise ValueError("head_init=probe needs the probe; set reward.probe=true")
        if self.head_init == "probe" and self.start in STARTS["reward"]:
            raise ValueError(
                f"head_init=probe fits the frozen base, which start={self.start} changes: use zero or normal"
            )
        if self.head_init == "probe" and self.start:
            raise ValueError("head_init=probe would overwrite the head of reward.start; remove one of them")
        if self.members > 1 and self.objective == "imitation":
            raise ValueError("members are for scores; objective=imitation has none; remove one of them")
        return self


class Card(Section):
    """The reward-model card: how far a reward model can be trusted, on comparisons it has not seen."""

    model: str | None = None
    """Folder or hub id of any sequence-classification reward model; null = the one of this run."""
    against: str | None = None
    """A second reward model, judged on the same comparisons and compared by a paired test."""
    comparisons: Files = []
    """Files as in data.comparisons; empty = the run's held-out comparisons."""
    columns: dict[str, str | list[str]] = {}
    """Their columns by the names of a known format, as `data.columns`."""
    limit: Positive | None = None
    """Use at most this many comparisons."""
    bins: Annotated[int, Field(ge=2, strict=True)] = 10
    """Bins of the calibration table, with equal numbers of pairs."""
    curve: list[Positive] = []
    """Numbers of the run's training comparisons, [100, 300, 1000] say, on each of which a linear probe of
    the frozen base is fitted: a learning curve, and a line in log N (Bai 2022, section 3.2); empty = none."""
    curve_of: Literal["probe", "reward"] = "probe"
    """What the curve is of: that probe, or the reward model, trained by `reward` anew for every number; these
    stand in the run's folder as curve-<number> and are not trained again."""
    near_tie: NonNegative = 0.5
    """A pair whose scores differ by less is a near-tie, in units of the normalized score."""
    outliers: Files = []
    """Prompts that are out of distribution (files as in data.prompts): the card then says how well
    Mahalanobis distances tell them from the run's own."""
    outlier_layer: int = -1
    """Layer whose activations are looked at; -1 = the last."""
    exposure: Natural = 0
    """Outliers shown to a linear classifier (outlier exposure, Bai 2022, section 5.4); 0 = none."""

    @model_validator(mode="after")
    def _curve(self) -> Card:
        if self.curve_of == "reward" and not self.curve:
            raise ValueError(
                "curve_of=reward needs the numbers of comparisons: add curve, as [100, 300, 1000]"
            )
        return self
