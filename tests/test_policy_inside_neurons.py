"""Neurons that a training moved: planted ones, direct effects against logits, peaks by hand; the stage."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import stage
from lxml import html
from test_policy_inside_run import FEW, run  # noqa: F401
from tiny_inside import batch, llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from policy.inside import __main__ as command
from policy.inside.neurons.an import as_text, main, study
from policy.inside.neurons.change import highest, moved, peaks, read, relative_change, responses_of
from policy.inside.neurons.page import neurons_section
from policy.inside.neurons.question import Words, describe, patched_shares, ranked_of, rows_of
from policy.inside.neurons.vocabulary import direct_effect, readout_of, relatedness
from policy.inside.patching import record
from policy.inside.subject import Batch, Site, of_model
from rlhf.errors import UserError
from rlhf.report.gather import gather
from rlhf.report.page import write_page
from rlhf.runs.artifacts import read_json


def read_out(model):
    return readout_of(model.model, model.lm_head)


TEXTS = [torch.randint(2, 12, (6,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(9)]
PLANTED = Site(1, "neurons")
BATCHES = [batch(seed=n) for n in range(2)]


def planted(unit=7):
    """A model in which one neuron of the second layer answers to something else."""
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.gate_proj.weight[unit] += 0.5
    return other


def test_a_planted_neuron_comes_first_and_no_other_moves():
    change = moved(of_model(planted()), of_model(llama()), BATCHES)
    ranked = ranked_of(change)
    assert ranked[0][0] == (PLANTED, 7)
    assert ranked[0][1] > 0.1
    assert [value for _, value in ranked[1:]] == [0] * 23  # of its layer; the layer below does not differ
    assert ranked_of(moved(of_model(llama()), of_model(llama()), BATCHES)) == []
    assert ranked == ranked_of(moved(of_model(planted()), of_model(llama()), BATCHES))


def test_the_planted_neuron_carries_all_of_the_log_prob_s_change_and_others_nothing():
    sets = [[((PLANTED, 7), 1.0)], [((PLANTED, 6), 0.0), ((Site(0, "neurons"), 7), 0.0)]]
    ticks = []
    model, other = of_model(llama()), of_model(planted())
    found = patched_shares(other, model, BATCHES, sets, lambda: ticks.append(1))
    assert [share["mean"] for share in found] == pytest.approx([1, 0], abs=1e-4)
    assert found[0]["n"] == 6  # rows
    assert len(ticks) == len(BATCHES)


def test_the_change_is_in_deviations_of_the_response_tokens():
    change = moved(of_model(planted()), of_model(llama()), BATCHES)
    there, here = (
        torch.cat([record(of_model(m), b).kept[PLANTED][:, 4:, 7].flatten() for b in BATCHES])
        for m in (planted(), llama())
    )
    assert change.tokens == len(here) == 18
    wanted = float((there - here).abs().mean() / here.std(unbiased=False))
    assert float(change.relative[PLANTED][7]) == pytest.approx(wanted, rel=1e-5)


def test_a_neuron_that_does_not_vary_is_not_divided_by_zero():
    found = relative_change(torch.tensor([4.0, 4.0]), torch.tensor([0.0, 4.0]), torch.tensor([16.0, 4.0]), 4)
    torch.testing.assert_close(found, torch.tensor([1 / 2, 1 / 0.01]))  # deviations 2 and 0, mean 1


def test_prompts_padding_and_what_was_not_sampled_do_not_count():
    rows = batch()
    targets_BR = torch.tensor([[True, True], [True, False], [False, False]])
    rows = rows._replace(targets_BR=targets_BR)
    where_BT = responses_of(rows)
    assert where_BT.nonzero().tolist() == [[0, 4], [0, 5], [1, 4]]
    assert [len(row) for row in rows_of(rows)] == [6, 5, 4]
    assert rows_of(rows)[1] == rows.ids_BT[1, :5].tolist()


def test_padding_changes_no_activation():
    subject, texts = of_model(llama()), [[5, 4, 3, 2, 6], [7, 8]]
    units = {Site(0, "neurons"): torch.tensor([3]), PLANTED: torch.tensor([0, 9])}
    found = peaks(subject, texts, units, 2, 0)
    for n, text in enumerate(texts):
        alone = peaks(subject, [text], units, 1, 0)
        for site, numbers in units.items():
            assert found[site][n].shape == (len(text), len(numbers))
            torch.testing.assert_close(found[site][n], alone[site][0])
    rows = batch()
    kept = read(subject, rows, [PLANTED], rows.mask_BT)[PLANTED]
    torch.testing.assert_close(kept, record(subject, rows).kept[PLANTED].flatten(0, 1))


def test_peaks_are_of_different_tokens_and_one_sign():
    texts = [[9, 1, 2, 1], [9, 3, 4]]
    values = [torch.tensor([9.0, -1.0, -5.0, -2.0]), torch.tensor([-9.0, 4.0, -0.5])]
    found = highest(texts, values, 10)
    assert [tuple(peak) for peak in found] == [(0, 2, -5.0), (0, 3, -2.0), (1, 2, -0.5)]
    assert highest(texts, values, 2) == found[:2]
    assert [peak.activation for peak in highest(texts, [-x for x in values], 10)] == [5.0, 2.0, 0.5]
    assert highest([[9], [8]], [torch.ones(1), torch.ones(1)], 3) == []


@pytest.mark.parametrize("make", [llama, planted])
def test_the_direct_effect_is_the_step_of_the_logits_of_a_linear_path(make):
    """The last layer's neurons, and a last norm that only weights."""
    model, rows = make(), batch()

    class Weighted(nn.Module):
        weight = nn.Parameter(torch.linspace(0.5, 2, 16))

        def forward(self, x):
            return x * self.weight

    model.model.norm = Weighted()
    subject, unit, step = of_model(model), 7, 0.5
    down = model.model.layers[1].mlp.down_proj

    def more(_module, inputs):
        return (inputs[0] + step * nn.functional.one_hot(torch.tensor(unit), 24),)

    with torch.no_grad():
        before = model(rows.ids_BT).logits
        handle = down.register_forward_pre_hook(more)
        after = model(rows.ids_BT).logits
        handle.remove()
    found = direct_effect(subject, PLANTED, torch.tensor([unit]), readout_of(model.model, model.lm_head))
    torch.testing.assert_close((after - before) / step, found.expand(3, 7, -1), atol=1e-5, rtol=1e-4)
    assert float(found.abs().max()) > 0.05


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 12}
    return GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, bos_token_id=0, eos_token_id=1)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_the_readout_orders_tokens_as_the_model_s_own_last_norm_does(make):
    model = make()
    decoder = model.get_decoder() if make is llama else model.transformer
    norm = decoder.norm if make is llama else decoder.ln_f
    norm.weight[:] = torch.linspace(0.5, 2, 16)
    vectors_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    found = readout_of(decoder, model.get_output_embeddings())(vectors_ND)
    own = model.get_output_embeddings()(norm(vectors_ND))
    centered = vectors_ND - (vectors_ND.mean(-1, keepdim=True) if make is gpt2 else 0)
    size = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found / size, own, atol=1e-4, rtol=1e-4)


def test_relatedness_by_hand():
    assert relatedness(torch.tensor([[1.0, 2.0]]).expand(4, 2)) == pytest.approx(1)
    assert relatedness(torch.tensor([[1.0, 0.0], [0.0, 3.0]])) == pytest.approx(0)
    assert relatedness(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1)
    three = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    assert relatedness(three) == pytest.approx((2**-0.5 + 0 + 2**-0.5) / 3)
    assert math.isnan(relatedness(three[:1]))


def test_a_model_that_cannot_be_read_as_tokens_is_told():
    model = llama()
    with pytest.raises(UserError, match=r"reads 8 units and the stream has 16: set inside\.neurons=0"):
        readout_of(model.model, nn.Linear(8, 12))
    model.model.last = model.model.norm
    del model.model.norm
    with pytest.raises(UserError, match="has none of norm, ln_f"):
        readout_of(model.model, model.lm_head)


def test_a_neuron_s_line_is_made_of_its_tokens():
    line = describe([" good", " fine"], [(" great", 1.0)], [])
    assert line == "active at ' good', ' fine'; promotes ' great'"


def test_words_are_those_of_the_activations_in_both_models():
    new, old = planted(), llama()
    heads = {"get_output_embeddings": lambda: old.lm_head, "get_input_embeddings": old.get_input_embeddings}
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    models: Any = SimpleNamespace(
        backbone=SimpleNamespace(decoder=old.model, base=SimpleNamespace(**heads)),
        dialogue=SimpleNamespace(tokenizer=tokenizer, pad_id=0),
        recipe=SimpleNamespace(inside=SimpleNamespace(micro_batch_size=2)),
    )
    neurons = [(PLANTED, 7), (Site(0, "neurons"), 3), (PLANTED, 2), (PLANTED, 11)]
    words = Words(models, of_model(new), of_model(old), TEXTS, neurons, 2, int)
    ids_N = [torch.tensor([text]) for text in TEXTS]
    for n, (site, unit) in enumerate(neurons[:2]):
        found = words.of(n)
        one, other = (
            [record(of_model(m), Batch(ids, ids > 0)).kept[site][0, :, unit] for ids in ids_N]
            for m in (new, old)
        )
        peaks_ = highest(TEXTS, one, 10)
        assert found["tokens"] == [str(TEXTS[p.row][p.column]) for p in peaks_]
        first, shown = peaks_[0], found["contexts"][0]
        assert shown["text"] == " ".join(map(str, TEXTS[first.row][: first.column + 1]))
        assert shown["after"] == pytest.approx(first.activation, abs=1e-5)
        assert shown["before"] == pytest.approx(float(other[first.row][first.column]), abs=1e-5)
        sign = 1 if first.activation > 0 else -1
        for key, model in (("after", new), ("before", old)):
            down = model.model.layers[site.layer].mlp.down_proj.weight[:, unit]
            effect_V = sign * (old.lm_head.weight @ (old.model.norm.weight * down)).detach()
            assert [int(t) for t, _ in found[f"promoted_{key}"]] == effect_V.topk(5).indices.tolist()
            assert [int(t) for t, _ in found[f"suppressed_{key}"]] == (-effect_V).topk(5).indices.tolist()
            for token, value in found[f"promoted_{key}"] + found[f"suppressed_{key}"]:
                assert value == pytest.approx(float(effect_V[int(token)]), abs=1e-5)
        tokens = torch.tensor([int(token) for token in found["tokens"]])
        assert words.related[n] == pytest.approx(relatedness(old.get_input_embeddings().weight[tokens]))
        assert words.rank(n) == sum(words.related[m] < words.related[n] for m in (2, 3)) / 2


def test_the_study_of_a_word_finds_a_planted_neuron():
    """A neuron of the second layer that is active at token 3 alone and adds to the logit of token 5."""
    model = llama(scale=0.02)
    with torch.no_grad():
        unit_DD, embeddings_VD = torch.eye(16), model.model.embed_tokens.weight
        embeddings_VD[:], embeddings_VD[3] = 4 * unit_DD[1], 4 * unit_DD[2]
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[7] = mlp.up_proj.weight[7] = unit_DD[2]
        model.lm_head.weight[5] = unit_DD[9]
        mlp.down_proj.weight[9, 7] = 1
    ids = {"clean": [4, 6, 3], "corrupt": [4, 6, 8], "first": [5], "second": [6], "long": [4, 4, 6, 8]}

    def tokenizer(text, **_):
        return {"input_ids": ids[text]}

    tokenizer.decode = lambda tokens: f"<{tokens[0]}>"
    found = study(model, tokenizer, "clean", "corrupt", ("first", "second"))
    assert found["best"] == [1, 7]
    assert found["neurons"][7] == pytest.approx(1, abs=0.05)
    assert found["layers"][1] == pytest.approx(1, abs=0.05)
    assert sorted(found["neurons"])[-2] < 0.05
    assert found["rank"] == 1
    assert found["next"][0][0][0] == "<5>"
    whole = found["differences"][0] - found["differences"][1]
    assert found["lens"][-1] == pytest.approx(found["differences"][0], rel=1e-3)
    assert found["direct"] == pytest.approx(whole, rel=0.05)
    text = as_text(found)
    assert "L1.N7: activation" in text
    assert "number 1 of 24 of its layer" in text
    with pytest.raises(UserError, match="the texts have 3 and 4 tokens, and the words 1 and 1"):
        study(model, tokenizer, "clean", "long", ("first", "second"))
    with pytest.raises(UserError, match="nothing to explain"):
        study(model, tokenizer, "clean", "clean", ("first", "second"))


def test_the_study_asks_for_a_model(monkeypatch):
    monkeypatch.setattr("sys.argv", ["an"])
    with pytest.raises(UserError, match="which model"):
        main()


def test_the_stage_shows_the_neurons(run, capsys):  # noqa: F811
    stage(command.main, *FEW, "inside.neurons=3")
    found = read_json(run / "inside/inside.json")["neurons"]
    assert len(found["top"]) == 3
    changes = [row["change"] for row in found["top"]]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] > 0
    assert found["neurons"] == 2 * 64  # lora.layers: top_2 of 3
    held = found["moved"]
    assert held["first"] > max(held["random"])
    assert len(held["random"]) == len(found["patched"]["random"]) == 2
    assert found["patched"]["first"]["n"] == 4  # prompts
    assert found["related"]["random"]["n"] <= 100
    page = (run / "inside/inside.md").read_text()
    assert page in capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in page)
    for row in found["top"]:
        assert f"- {row['name']}: {row['description']}" in page
        assert len(row["promoted_before"]) == len(row["suppressed_after"]) == 5
        values = [value for _, value in row["promoted_after"]]
        assert values == sorted(values, reverse=True)
    write_page([gather(run)], run / "report.html")
    section = html.fromstring((run / "report.html").read_text()).xpath("//*[@id='inside']")[0]
    cells = section.xpath(f".//tr[th='{found['top'][0]['name']}']/td/text()")
    assert cells == [f"{changes[0]:.2f}", " ".join(found["top"][0]["description"].split())]


def test_random_neurons_are_left_beside_the_most(run):  # noqa: F811
    stage(command.main, *FEW, "inside.neurons=500")
    found = read_json(run / "inside/inside.json")["neurons"]
    assert len(found["top"]) == 64  # half of them
    assert min(found["moved"]["random"]) > 0


def test_zero_neurons_leave_the_question_out(run):  # noqa: F811
    stage(command.main, *FEW, "inside.neurons=0")
    assert "neurons" not in read_json(run / "inside/inside.json")
    assert "PPO moved most" not in (run / "inside/inside.md").read_text()


def test_plain_texts_are_read_and_short_ones_refused_before_any_work(run, capsys):  # noqa: F811
    text = run / "texts.txt"
    text.write_text("a b\n")
    with pytest.raises(UserError, match=r"inside\.texts: 0 texts of 5 tokens or more in .*texts\.txt"):
        stage(command.main, *FEW, f"inside.texts=[{text}]")
    assert not (run / "inside/inside.json").exists()
    assert not (run / "inside/parts").exists()
    text.write_text("It was a quiet day by the river\n" * 3)
    stage(command.main, *FEW, f"inside.texts=[{text}]")
    found = read_json(run / "inside/inside.json")["neurons"]
    assert found["source"] == "inside.texts"
    assert found["texts"][1] >= 3
    assert "plain texts of inside.texts" in capsys.readouterr().out


def test_nothing_changed_is_said():
    assert neurons_section({"skipped": "no neuron's activation differs"})[1] == (
        "Not looked into: no neuron's activation differs.\n"
    )
