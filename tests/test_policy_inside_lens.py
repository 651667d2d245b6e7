"""The lens of the mean difference of states: by hand, by group, and of another run's policy in the stage."""

import shutil

import pytest
import torch
from conftest import noted_anew, stage
from lxml import html
from safetensors.torch import load_file, save_file
from test_policy_inside_neurons import TEXTS, planted, read_out
from test_policy_inside_run import FEW, run  # noqa: F401
from tiny_inside import batch, llama

from policy.inside import __main__ as command
from policy.inside.neurons import lens as lens_module
from policy.inside.neurons.lens import expected_use, lens, risen, states_of, summary
from policy.inside.neurons.page import lens_section
from policy.inside.subject import of_model
from rlhf.markdown import percent
from rlhf.report.gather import gather
from rlhf.report.page import write_page
from rlhf.runs.artifacts import read_json


def states(model, texts=TEXTS, size=4):
    return states_of(of_model(model), texts, size, int)


def test_the_lens_is_the_mean_difference_by_hand():
    one, other = llama(), planted()
    found = lens(states(other), states(one), read_out(one), torch.arange(12) == 3, 0)
    ids = torch.tensor(TEXTS)[:, :5]
    kept = []
    for model in (one, other):
        model.model.layers[1].register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
        model.model(ids)
    gap = (kept[1] - kept[0]).mean((0, 1))
    (layer,) = found["layers"]  # the first does not differ
    assert layer["layer"] == 1
    assert layer["strength"] == pytest.approx(float(gap.norm() / kept[0].norm(dim=-1).median()), rel=1e-4)
    logits = (gap * one.model.norm.weight) @ one.lm_head.weight.T
    assert layer["tokens"] == logits.argsort(descending=True).tolist()
    assert layer["share"] == pytest.approx(1 / 12)  # one token of a vocabulary of 12
    assert len(found["strength"]) == len(found["share"]) == 8  # groups
    assert len(found["random"]) == 20


def test_the_share_is_of_the_first_tokens_and_turns_with_the_sign(monkeypatch):
    monkeypatch.setattr(lens_module, "TOP", 3)
    one, other = llama(), planted()
    same = states(other, TEXTS[:1] * 9), states(one, TEXTS[:1] * 9)
    risen_V = torch.zeros(12).bool()
    risen_V[lens(*same, read_out(one), risen_V, 0)["layers"][0]["tokens"]] = True
    found = lens(*same, read_out(one), risen_V, 0)
    assert found["layers"][0]["share"] == 1
    assert found["share"] == [1] * 8
    assert found["opposite"] == [0] * 8
    assert found["subject"] == [1] * 8
    assert lens(*same, read_out(one), risen_V, 0, ~risen_V)["subject"] == [0] * 8
    assert 0 < sum(found["random"]) / 20 < 0.6
    assert lens(*same, read_out(one), risen_V, 0) == found
    state_D = one.model.norm.weight.detach() * same[1].mean_NLD[0, 1]
    first = (one.lm_head.weight @ state_D).topk(3).indices
    assert found["state"] == pytest.approx([float(risen_V[first].double().mean())] * 8)


def test_groups_hold_every_text_once_and_equal_models_have_no_lens():
    one, other = llama(), planted()
    risen_V = torch.arange(12) == 3
    found = lens(states(other, TEXTS[:3]), states(one, TEXTS[:3]), read_out(one), risen_V, 0)
    gaps = [
        float((states(other, [text]).mean_NLD - states(one, [text]).mean_NLD)[0, 1].norm())
        for text in TEXTS[:3]
    ]
    size = float(states(one, TEXTS[:3]).size_L[1])
    assert found["strength"] == pytest.approx([gap / size for gap in gaps], rel=1e-4)
    assert lens(states(llama()), states(one), read_out(one), risen_V, 0) == {}


def test_the_states_do_not_depend_on_the_size_of_a_pass():
    one, other = states(llama()), states(llama(), size=2)
    torch.testing.assert_close(one.mean_NLD, other.mean_NLD)
    torch.testing.assert_close(one.size_L, other.size_L)


def test_the_expected_use_is_of_what_comes_next_in_responses():
    model, rows = llama(), batch()
    rows = rows._replace(targets_BR=torch.tensor([[True, True], [True, False], [False, False]]))
    found = expected_use(of_model(model), model.lm_head, [rows, rows])
    p = model(rows.ids_BT).logits.detach().softmax(-1)
    torch.testing.assert_close(found, 2 * (p[0, 3] + p[0, 4] + p[1, 3]).double(), atol=1e-6, rtol=1e-5)


def test_the_risen_tokens_are_a_twentieth_by_factor():
    before = torch.full((40,), 0.5)
    after = before.clone()
    after[4], after[7], after[9] = 1.5, 1.0, 0.1
    before[9] = 0.02  # by a factor of 5
    assert risen(after, before).nonzero()[:, 0].tolist() == [4, 9]
    assert risen(torch.zeros(40), before).sum() == 2


def test_a_lens_without_a_change_is_said():
    one = summary({"gained": [0.0, 0.0]}, {})
    found = {"texts": 2, "source": "x", "own": False, "policies": {"this run's policy": one}}
    assert lens_section(found)[-1] == "No change: the states do not differ.\n"
    assert "2 of the held-out" in lens_section({"skipped": "2 of the held-out prompts"})[1]


@pytest.mark.slow
def test_the_lens_of_another_run_s_policy(run, capsys):  # noqa: F811
    other = run.with_name("other")
    shutil.copytree(run / "ppo", other / "ppo")
    file = other / "ppo/policy/adapter_model.safetensors"
    save_file({k: 0.1 * t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    noted_anew(other / "ppo")
    text = run / "texts.txt"
    text.write_text("".join(f"It was day {n} by the river\n" for n in range(9)))
    named = other / "ppo/policy"
    stage(command.main, *FEW, f"inside.texts=[{text}]", f"inside.others=[{named}]")
    found = read_json(run / "inside/inside.json")
    assert "policies" not in found  # nothing lies between two
    own, less = found["lens"]["policies"].values()
    assert [layer["layer"] for layer in own["layers"]] == [1, 2]  # lora.layers: top_2 of 3
    assert own["gained"]["mean"] == pytest.approx(found["policy"]["into"]["change"], rel=1e-3)
    assert less["strength"]["mean"] < own["strength"]["mean"] / 5  # a hundredth of the update
    assert less["less_policy"]["strength"]["mean"] == pytest.approx(
        less["strength"]["mean"] - own["strength"]["mean"]
    )
    page = capsys.readouterr().out
    assert f"### Lens of {named}" in page
    assert "Less this run's policy: strength" in page
    assert "unrelated text" not in page
    write_page([gather(run)], run / "report.html")
    section = html.fromstring((run / "report.html").read_text()).xpath("//*[@id='inside']")[0]
    cells = section.xpath(f".//tr[th='{named}']/td/text()")
    assert cells[:2] == [percent(less["strength"]), percent(less["share"])]
    assert cells[-1].split() == " ".join(less["layers"][-1]["tokens"]).split()
