"""From the results of the units to the claims: one function a claim, plain numbers in, verdicts out.

Intervals are over seeds (``seeds.over_seeds``); what is compared is paired by item wherever both sides saw
the same items.
"""

from __future__ import annotations

import numpy as np

from rlhf.stats.intervals import Estimate
from studies.engine.ladder import matrix_weights
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, combine, over_seeds, slope_weights
from studies.engine.verdicts import Claim, above, below, inside, shown
from studies.preference.tables import (
    FEW,
    TRANSFER_COLUMNS,
    VERSUS_COLUMNS,
    mean_of,
    transfer_gap,
    transfer_rows,
    versus_gaps,
    versus_rows,
)

EQUIVALENCE = 0.03  # claim 2: 3 percentage points
CALIBRATED = (0.8, 1.25)  # claim 11: slopes that count as "about 1"


def all_claims(results: Results) -> list[Claim]:
    """Every claim of the study, in the order of their numbers."""
    return [
        ranked_against_imitation(results),
        binary_against_imitation(results),
        pretraining_helps(results),
        binary_pretraining_transfers(results),
        calibrated(results),
        whole_sets(results),
    ]


def ranked_against_imitation(results: Results) -> Claim:
    """Claim 1: the gap at every size, and its slope on log N."""
    statements = []
    sizes = results.values("versus", "layers")
    for layers in sizes:
        gap = mean_of(versus_gaps(results, "ranked", layers))
        statements.append(above(f"accuracy of PM less that of imitation, L = {layers}", gap))
    if len(sizes) > 1:
        weights = slope_weights([np.log10(matrix_weights(layers)) for layers in sizes])
        by_size = [versus_gaps(results, "ranked", layers) for layers in sizes]
        slopes = [np.asarray(weights) @ np.asarray(gaps) for gaps in zip(*by_size, strict=True)]
        statements.append(above("growth of that gap per tenfold N", mean_of(slopes)))
    return Claim(
        1,
        "Ranked preference modelling against imitation",
        "Ranked PM does much better than imitation of the good side, and scales better (Askell et al. 2021).",
        "PM and imitation start from the same language model and see the same pairs once, sentences of "
        "any two different qualities; imitation trains on the good sides.",
        statements,
        VERSUS_COLUMNS,
        versus_rows(results, "ranked"),
        (
            "Imitation is scored by the sum and by the mean of the log-probabilities; the better of the "
            "two on the test pairs is kept, which favours it.",
            "Perfect imitation is the exact log-probability under the distribution of the good sides: no "
            "amount of data or size takes imitation beyond it, because common words and length count in "
            "a probability. How far it is below 1 is a property of this grammar; the size of the gap is "
            "therefore not comparable with the paper's, its sign and its trend are.",
            "Control: trained on shuffled labels, the PM is at 0.5 on average over seeds; one model alone "
            "may lean either way by more than its test pairs say.",
        ),
    )


def binary_against_imitation(results: Results) -> Claim:
    """Claim 2: equivalence within 3 points at every size, and a smaller gap than on ranked pairs."""
    statements = []
    for layers in results.values("versus", "layers"):
        binary = [SeedMean.of(g) for g in versus_gaps(results, "binary", layers)]
        ranked = [SeedMean.of(g) for g in versus_gaps(results, "ranked", layers)]
        less = [combine(both, (1.0, -1.0)) for both in zip(ranked, binary, strict=True)]
        text = f"accuracy of PM less that of imitation, L = {layers}"
        statements.append(inside(text, over_seeds(binary), -EQUIVALENCE, EQUIVALENCE))
        statements.append(
            above(f"the gap on ranked pairs less that on binary pairs, L = {layers}", over_seeds(less))
        )
    return Claim(
        2,
        "Binary discrimination against imitation",
        "Where good is absolutely good and bad is bad, PM and imitation do about equally well (Askell et "
        "al. 2021).",
        "The same comparison on pairs of a valid sentence (all seven words fit) and a corrupted one (one "
        "or two words do not). About equal: within 3 percentage points.",
        statements,
        VERSUS_COLUMNS,
        versus_rows(results, "binary"),
    )


def pretraining_helps(results: Results) -> Claim:
    """Claim 3: PMP against none and against the control with few pairs, and less so with many."""
    statements = []
    for layers in results.values("finetune", "layers"):
        for arm in ("ranked", "binary"):
            for other, called in (("none", "no PMP"), ("imitation", "the control")):
                text = f"{arm} PMP less {called}, mean over few pairs, L = {layers}"
                statements.append(above(text, transfer_gap(results, layers, "shifted", arm, other)))
            text = f"{arm} PMP less no PMP: with few pairs less with most, L = {layers}"
            shrinks = transfer_gap(results, layers, "shifted", arm, "none", less_many=True)
            statements.append(above(text, shrinks))
    return Claim(
        3,
        "Preference-model pre-training (PMP)",
        "Pre-training the PM on plentiful comparisons from elsewhere raises accuracy when few human "
        "comparisons follow (Askell et al. 2021: 5 to 10 points at 500 pairs, for their largest model).",
        "Source: pairs by quality. Target: only the last four words count and some fillers are disliked. "
        "Arms: no PMP; a control that models the language of the source's good sides; ranked PMP; binary "
        f"PMP (GOOD and BAD control tokens). Few pairs: up to {FEW}; all arms are finetuned in the same "
        "way.",
        statements,
        TRANSFER_COLUMNS,
        transfer_rows(results, "shifted"),
    )


def binary_pretraining_transfers(results: Results) -> Claim:
    """Claim 4: binary against ranked PMP with few pairs of a target in the opposite order."""
    statements = []
    notes = []
    for layers in results.values("finetune", "layers"):
        text = f"binary PMP less ranked PMP, opposite order, mean over few pairs, L = {layers}"
        statements.append(above(text, transfer_gap(results, layers, "conflicting", "binary", "ranked")))
        for target, called in (("agreeing", "orders agree"), ("shifted", "shifted target of claim 3")):
            other = shown(transfer_gap(results, layers, target, "binary", "ranked"))
            notes.append(f"No claim, for comparison: the same where the {called}, L = {layers}: {other}.")
    return Claim(
        4,
        "Binary PMP transfers better than ranked PMP",
        "Ranked PMP imprints an order that has to be unlearned, so binary PMP transfers better where the "
        "orders conflict (Askell et al. 2021).",
        "The PMP models of claim 3, finetuned on pairs in which the sentence with FEWER fitting words is "
        "the good side: the source's levels in the opposite order.",
        statements,
        TRANSFER_COLUMNS,
        transfer_rows(results, "conflicting") + transfer_rows(results, "agreeing"),
        notes,
    )


def calibrated(results: Results) -> Claim:
    """Claim 11: the slope of the labels on the gaps after one pass, and after several."""
    statements = []
    rows = []
    passes = results.values("calibration", "epochs")

    def measured(name: str, layers: int, epochs: int, *head: str) -> Estimate:
        """The slope; the row is put in the table."""
        found = [r[name] for r in results.by_seed("calibration", layers=layers, epochs=epochs)]
        slope = over_seeds([SeedMean(f["slope"], f["slope_error"]) for f in found])
        means = [f"{np.mean([f[key] for f in found]):.3f}" for key in ("ece", "loss", "accuracy")]
        rows.append([*head, shown(slope), *means])
        return slope

    for layers in results.values("calibration", "layers"):
        for epochs in passes:
            slope = measured("model", layers, epochs, str(layers), str(epochs))
            if epochs == passes[0]:
                text = f"slope after {epochs} pass, L = {layers}"
                statements.append(inside(text, slope, *CALIBRATED))
            else:
                text = f"slope after {epochs} passes (over-confident: below 1), L = {layers}"
                statements.append(below(text, slope, 1.0))
    measured("known score", layers, passes[0], "the known score", "-")
    return Claim(
        11,
        "Calibration",
        "The gap of two scores foretells how often the better one is preferred, 1 / (1 + exp(-gap)) (Bai "
        "et al. 2022); more than one pass over the data makes a PM over-confident.",
        "Labels drawn from the Bradley-Terry model of 0.7 * quality; held-out pairs labelled in the same "
        "way. Slope: the b for which sigmoid(b * gap) describes the labels best; 1 = calibrated, below 1 "
        f"= over-confident. About 1: inside [{CALIBRATED[0]}, {CALIBRATED[1]}].",
        statements,
        ("L", "passes", "slope", "ECE", "held-out loss", "agreement with noisy labels"),
        rows,
    )


def whole_sets(results: Results) -> Claim:
    """Claim 12: held-out loss of both arms after one pass, and the forward passes they pay."""
    statements = []
    rows = []
    k = results.values("sets", "k")[0]
    for layers in results.values("sets", "layers"):
        arms = {a: results.by_seed("sets", layers=layers, arm=a) for a in ("grouped", "shuffled")}
        loss = {a: [np.array(r["held_out_losses"]) for r in found] for a, found in arms.items()}
        less = mean_of([s - g for s, g in zip(loss["shuffled"], loss["grouped"], strict=True)])
        text = f"held-out loss after one pass, shuffled less grouped, L = {layers}"
        statements.append(above(text, less, digits=4))
        for arm, forwards in (("grouped", k), ("shuffled", k * (k - 1))):
            paid = over_seeds([SeedMean(r["forwards_per_prompt"], 0.0) for r in arms[arm]])
            text = f"forward passes a prompt, {arm}, L = {layers} (exact)"
            statements.append(inside(text, paid, forwards, forwards, digits=0))
            rows.append(
                [
                    str(layers),
                    arm,
                    shown(mean_of(loss[arm])),
                    f"{np.mean([r['training_loss'] for r in arms[arm]]):.3f}",
                    f"{np.mean([r['known_score_loss'] for r in arms[arm]]):.3f}",
                ]
            )
    return Claim(
        12,
        "All comparisons of a prompt as one batch element",
        "Comparisons of one prompt shuffled into independent pairs overfit in a single pass; kept "
        "together they do not, and cost K forward passes instead of K (K - 1) (Ouyang et al. 2022).",
        f"K = {k} sentences a prompt, ranked by a noisy annotator (Plackett-Luce, 0.7 * quality). Both "
        "arms take the same number of steps with the same number of comparisons, and see every "
        "comparison once.",
        statements,
        (
            "L",
            "arm",
            "held-out loss after one pass",
            "loss on the training sets",
            "held-out loss of the known score",
        ),
        rows,
        (
            "Overfitting is a loss on the training sets below the held-out loss. Where one pass leaves no "
            "such difference, shuffling has nothing to spoil, and what is compared is only how fast the "
            "two orders learn.",
        ),
    )
