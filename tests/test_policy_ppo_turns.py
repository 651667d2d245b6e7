"""PPO where a turn ends in another token than EOS, and EOS and a third token end a response too."""

import pytest
import tiny_ppo
import torch

from policy.ppo import rollout
from rlhf.models.masks import last_true_index, right_pad
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.metrics import read_metrics


@pytest.fixture(params=[True, False], ids=["trunk", "whole"])
def built(request, tmp_path, monkeypatch):
    probe = tiny_ppo.trainer(tmp_path, steps=1, batch_size=64, width=16, trunk=request.param)
    backbone, section = probe.backbone, probe.section
    first = rollout.collect(
        backbone, probe.runtime, probe.dialogue, probe.prompts, tiny_ppo.varied, section, seed=0, step=0
    )
    often = first.ids_BT[:, first.start : -1].flatten().bincount(minlength=259)
    end, other = [int(i) for i in often.argsort(descending=True) if int(i) > 2][:2]
    contract = Dialogue(
        tiny_ppo.TOKENIZER, template="plain", max_prompt_tokens=32, max_response_tokens=tiny_ppo.LIMIT,
        end_of_turn=tiny_ppo.TOKENIZER.convert_ids_to_tokens(end), also_end=[other],
    )  # fmt: skip
    monkeypatch.setattr(tiny_ppo, "dialogue_of", lambda limit: contract)
    return tiny_ppo.trainer(tmp_path, steps=1, epochs=1, batch_size=64, width=16, trunk=request.param)


@torch.no_grad()
def test_the_reward_is_read_behind_what_was_said_whatever_ended_it(built):
    dialogue, backbone, seen = built.dialogue, built.backbone, []

    def score(responses):
        seen.append(responses)
        return tiny_ppo.varied(responses)

    found = rollout.collect(
        backbone, built.runtime, dialogue, built.prompts, score, built.section, seed=0, step=0
    )
    ended_in = set()
    for row, actions in zip(found.ids_BT[:, found.start : -1].tolist(), found.actions_BR, strict=True):
        ended_in.add(row[int(actions.sum()) - 1])
    assert set(dialogue.end_ids[:1]) | {dialogue.end_ids[-1]} <= ended_in  # both were sampled
    for responses in seen:
        ids_BT, mask_BT, hidden_BTD = responses.ids_BT, responses.mask_BT, responses.hidden_BTD
        part = "all" if hidden_BTD is None else "top"
        got_BTD = backbone._decode(ids_BT, mask_BT, part=part, hidden_BTD=hidden_BTD)
        got_BD = got_BTD[torch.arange(len(ids_BT)), last_true_index(mask_BT)]
        closed = []
        for prompt, ids, mask in zip(responses.prompts, ids_BT, mask_BT, strict=True):
            before, whole = dialogue.encode_prompt(prompt), ids[int(mask.int().argmax()) :].tolist()
            closed.append(dialogue.close(before, whole[len(before) :]))
        assert [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)] == closed
        ids_BT, mask_BT = right_pad(closed, dialogue.pad_id)
        want_BTD = backbone._decode(ids_BT, mask_BT, part="all")
        want_BD = want_BTD[torch.arange(len(ids_BT)), last_true_index(mask_BT)]
        torch.testing.assert_close(got_BD, want_BD, rtol=0, atol=1e-4)


def test_training_goes_on_and_counts_what_ended(built):
    built.train()  # with its checks: log-probs of sampling, first ratios, what closes a sequence
    for row in read_metrics(built.folder):
        assert 0 < row["response/eos_rate"] < 1
