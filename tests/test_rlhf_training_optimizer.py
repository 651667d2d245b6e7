"""The 8-bit optimizer, by a stand-in for the card and for bitsandbytes: there is no GPU here."""

import bitsandbytes.optim
import pytest
import torch

from rlhf.errors import UserError
from rlhf.recipe.schema import Distributed
from rlhf.training.optimizer import make_optimizer
from rlhf.training.runtime import Runtime


def test_the_paged_optimizer_gets_the_groups_with_their_rates(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", lambda *a, **o: made.append((a, o)) or "made")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1e-3, 1e-4)]
    assert make_optimizer("paged_adamw_8bit", groups, epsilon=1e-5) == "made"
    assert made == [((groups,), {"eps": 1e-5, "weight_decay": 0.0})]


def test_the_paged_optimizer_is_refused_on_a_cpu_and_over_zero():
    with pytest.raises(UserError, match="paged_adamw_8bit needs a CUDA GPU, and there is none; use adamw"):
        make_optimizer("paged_adamw_8bit", [], epsilon=1e-8)
    runtime = Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1)
    runtime.stage = 2
    with pytest.raises(UserError, match="does not go with ZeRO 2; use zero_stage 0"):
        runtime.prepare(torch.nn.Linear(1, 1), [], {}, epsilon=1e-8, kind="paged_adamw_8bit")
