"""Which options of fine-tuning change what is learned, and which do not."""

import pytest
import torch
from sft_cases import cases, taught, weights

MIXED = [*cases(6, 1), *cases(2, 3, said=(20, 25))]
BASE = ("sft.batch_size=4", "sft.warmup_ratio=0.25", "sft.epochs=2", "sft.learning_rate=1e-3")
OF_THE_TRAINING = [
    "sft.learning_rate=2e-3",
    "sft.schedule=linear",
    "sft.warmup_ratio=0.5",
    "sft.weight_decay=0.5",
    "sft.max_grad_norm=0.01",
    "sft.epochs=1",
    "sft.batch_size=2",
    "lora.alpha=4",
    "seed=3",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights(taught(tmp_path_factory.mktemp("base"), MIXED, *BASE))


@pytest.mark.parametrize("option", OF_THE_TRAINING)
def test_an_option_of_the_training_changes_what_is_learned(option, base, tmp_path):
    found = weights(taught(tmp_path, MIXED, *BASE, option))
    assert float((found - base).abs().max()) > 1e-5


@pytest.mark.parametrize(
    "option", ["sft.tokens_per_micro_batch=60", "sft.checkpoint_every=1", "packing", "again"]
)
def test_an_option_of_the_work_does_not_change_what_is_learned(option, base, tmp_path):
    overrides = [option] if "=" in option else []
    found = weights(taught(tmp_path, MIXED, *BASE, *overrides, packing=option != "packing"))
    atol = 0 if option in ("again", "sft.checkpoint_every=1") else 1e-5
    torch.testing.assert_close(found, base, rtol=0, atol=atol)
