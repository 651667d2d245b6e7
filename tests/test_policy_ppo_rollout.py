"""What a rollout is made of, whatever the number of processes and however the work is cut."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.ppo import rollout as module
from policy.ppo.batching import prompt_indices
from policy.ppo.rollout import close, collect, window
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.generation.sampling import Sampled
from rlhf.models.backbone import Backbone
from rlhf.models.tiny import tiny_model, tiny_tokenizer
from rlhf.recipe.schema import Lora, Ppo
from rlhf.tokenization.dialogue import Dialogue

EOS, PAD = 1, 0


TOKENS = st.lists(st.integers(0, 4), min_size=3, max_size=3)


@given(responses=st.lists(TOKENS, min_size=1, max_size=5), more=st.integers(0, 3), data=st.data())
def test_every_closed_sequence_ends_in_one_eos_and_every_sampled_token_is_an_action(responses, more, data):
    prompts = data.draw(
        st.lists(
            st.lists(st.integers(2, 9), min_size=1, max_size=4),
            min_size=len(responses),
            max_size=len(responses),
        )
    )
    wide = max(map(len, prompts))
    ids_BP = torch.tensor([[PAD] * (wide - len(p)) + p for p in prompts])
    mask_BP = torch.tensor([[False] * (wide - len(p)) + [True] * len(p) for p in prompts])
    lengths_B = torch.full((len(responses),), 3)
    sampled = Sampled(ids_BP, mask_BP, torch.tensor(responses), torch.zeros(len(responses), 3), lengths_B)
    start = wide + more
    ids_BT, mask_BT, actions_BR = close(sampled, start, eos_id=EOS, pad_id=PAD)
    assert ids_BT.shape == mask_BT.shape == (len(responses), start + 3 + 1)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        said = response[: response.index(EOS) + 1] if EOS in response else response
        ended = [] if EOS in response else [EOS]
        assert ids_BT[row][mask_BT[row]].tolist() == [*prompt, *said, *ended]
        assert actions_BR[row].tolist() == [True] * len(said) + [False] * (3 - len(said))
        assert ids_BT[row, start:-1][actions_BR[row]].tolist() == said
        assert (ids_BT[row][~mask_BT[row]] == PAD).all()


@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), wide=st.integers(6, 9), data=st.data())
def test_a_window_loses_the_padding_that_its_rows_share_and_nothing_else(lengths, wide, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    total = wide + 2
    ids_BT = torch.arange(len(lengths) * total).reshape(len(lengths), total)
    mask_BT = torch.arange(total) >= wide - torch.tensor(lengths)[:, None]
    hidden_BTD = ids_BT[..., None].float()
    part = window(ids_BT, mask_BT, hidden_BTD, wide, torch.tensor(rows))
    cut = wide - max(lengths[row] for row in rows)
    assert part.start == wide - cut
    assert part.ids_BT.tolist() == ids_BT[rows, cut:].tolist()
    assert part.mask_BT.tolist() == mask_BT[rows, cut:].tolist()
    assert part.hidden_BTD.tolist() == hidden_BTD[rows, cut:].tolist()
    assert bool(part.mask_BT[:, 0].any())
    assert window(ids_BT, mask_BT, None, wide, torch.tensor(rows)).hidden_BTD is None


PROMPTS = [(Message("user", text),) for text in ("a", "a longer one", "medium", "it", "was there", "x y z")]


def stirred(layers="top_2", *, heads=("value",), shared=None):
    """A policy that differs from its base, and its dialogue."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    dialogue = Dialogue(tokenizer, template="plain", max_prompt_tokens=32, max_response_tokens=6)
    dialogue.end_id = 30  # a letter that the tiny model says now and then
    dialogue.also_end = set()
    base = tiny_model(len(tokenizer)).requires_grad_(False).eval()
    adapters = ["policy", *(head for head in heads if not shared)]
    model = Backbone(base, Lora(rank=4, layers=layers), adapters=adapters, heads=heads, shared=shared)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model, dialogue


def collected(
    *,
    rank=0,
    world=1,
    layers="top_2",
    reward_fn=None,
    temperature=1.0,
    shards_weights=False,
    made=None,
    **sizes,
):
    """One rollout of a policy that differs from its base, on one of several pretended processes."""
    model, dialogue = made or stirred(layers)
    runtime = SimpleNamespace(
        model=model,
        rank=rank,
        world=world,
        shards_weights=shards_weights,
        any_process=bool,
        device=torch.device("cpu"),
    )
    section = Ppo(batch_size=8, temperature=temperature, **({"micro_batch_size": 8} | sizes))
    reward_fn = reward_fn or (lambda said: torch.tensor([float(len(t)) for t in said.texts]))
    with torch.no_grad():
        rollout = collect(model, runtime, dialogue, PROMPTS, reward_fn, section, seed=3, step=1)
    return rollout, dialogue


def rows_of(rollout):
    """Every row of a rollout, free of padding."""
    return [
        {
            "ids": rollout.ids_BT[b][rollout.mask_BT[b]].tolist(),
            "text": rollout.texts[b],
            "score": float(rollout.scores_B[b]),
            "ended": bool(rollout.ended_B[b]),
            **{
                name: getattr(rollout, name)[b][rollout.actions_BR[b]]
                for name in ("log_probs_BR", "reference_log_probs_BR", "values_BR", "entropy_BR")
            },
        }
        for b in range(len(rollout.texts))
    ]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)
            else:
                assert value == other[name], name


@pytest.mark.parametrize("sizes", [{"micro_batch_size": 1}, {"rollout_batch_size": 3}, {"layers": "all"}])
def test_a_rollout_does_not_depend_on_how_it_is_cut_into_batches(sizes):
    if "layers" not in sizes:
        assert_same(rows_of(collected(**sizes)[0]), rows_of(collected()[0]))
    else:  # no trunk to be cached: the same figures as without the cache
        rollout, _ = collected(**sizes)
        assert rollout.hidden_BTD is None
        assert_same(rows_of(collected(micro_batch_size=3, **sizes)[0]), rows_of(rollout))


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_collect_the_rows_of_one(world):
    whole = rows_of(collected()[0])
    for rank in range(world):
        assert_same(rows_of(collected(rank=rank, world=world)[0]), whole[rank::world])


def test_a_rollout_records_the_sampling_and_both_ends():
    rollout, dialogue = collected(temperature=1.5)
    gap = (rollout.sampled_log_probs_BR - rollout.log_probs_BR)[rollout.actions_BR]
    assert float(gap.abs().max()) < 1e-4
    assert float((rollout.log_probs_BR - rollout.reference_log_probs_BR).abs().max()) > 0.1
    for row, b in zip(rows_of(rollout), range(8), strict=True):
        assert row["ids"][-1] == dialogue.end_id
        said = rollout.ids_BT[b, rollout.start : -1][rollout.actions_BR[b]].tolist()
        assert row["ended"] == (said[-1] == dialogue.end_id)
        assert row["text"] == dialogue.decode(said)
        assert row["score"] == len(row["text"])
    order = prompt_indices(3, 1, 8, len(PROMPTS))
    for b, index in enumerate(order):
        prompt = dialogue.encode_prompt(PROMPTS[index])
        assert rollout.ids_BT[b, : rollout.start][rollout.mask_BT[b, : rollout.start]].tolist() == prompt


def test_a_score_function_sees_rows_that_belong_together():
    seen = []

    def reward_fn(said):
        dialogue = Dialogue(tiny_tokenizer(), template="plain", max_prompt_tokens=32, max_response_tokens=6)
        for prompt, text, ids, mask in zip(said.prompts, said.texts, said.ids_BT, said.mask_BT, strict=True):
            start = dialogue.encode_prompt(prompt)
            assert ids[mask].tolist()[: len(start)] == start
            assert dialogue.tokenizer.decode(ids[mask].tolist()[len(start) : -1]).startswith(text)
            assert ids[mask][-1] == 30
        assert said.hidden_BTD.shape[:2] == said.ids_BT.shape
        seen.append(len(said.texts))
        return torch.zeros(len(said.texts))

    collected(reward_fn=reward_fn, micro_batch_size=3)
    assert seen == [3, 3, 2]


def test_samples_that_would_be_torn_apart_are_refused():
    with pytest.raises(
        UserError, match=r"ppo.batch_size / ppo.samples_per_prompt: 8 / 4 = 2 .* 4 processes.* multiple of 16"
    ):
        collected(samples_per_prompt=4, world=4)


@pytest.mark.parametrize("samples", [2, 4])
def test_several_samples_of_a_prompt_are_different_answers_to_it(samples):
    rollout, dialogue = collected(samples_per_prompt=samples)
    different = 8 // samples
    order = prompt_indices(3, 1, different, len(PROMPTS))
    for b, row in enumerate(rows_of(rollout)):
        prompt = dialogue.encode_prompt(PROMPTS[order[b % different]])
        assert row["ids"][: len(prompt)] == prompt
    assert len({str(row["ids"]) for row in rows_of(rollout)}) == 8
    for world in (1, 2):
        for rank in range(world):
            mine = rows_of(
                collected(rank=rank, world=world, samples_per_prompt=samples, rollout_batch_size=3)[0]
            )
            assert_same(mine, rows_of(rollout)[rank::world])


def test_prompts_of_one_length_are_sampled_together(monkeypatch):
    lengths, sample = [], module.sample

    def spied(backbone, role, prompts, uniform, **options):
        lengths.append([len(prompt) for prompt in prompts])
        return sample(backbone, role, prompts, uniform, **options)

    monkeypatch.setattr(module, "sample", spied)
    collected(rollout_batch_size=3, samples_per_prompt=2)
    flat = [length for part in lengths for length in part]
    assert flat == sorted(flat)
    assert flat != flat[::-1]
    assert [len(part) for part in lengths] == [3, 3, 2]


def test_the_trunk_is_kept_while_sampling():
    expected, _ = collected(shards_weights=True)  # computed anew
    made, roles = stirred(), []
    made[0].register_forward_pre_hook(lambda _m, _a, given: roles.append(given.get("role")), with_kwargs=True)
    rollout, _ = collected(rollout_batch_size=3, made=made)
    assert "trunk" not in roles
    mask = rollout.mask_BT
    assert torch.equal(mask, expected.mask_BT)
    whole = stirred()[0].trunk(rollout.ids_BT, mask)
    for hidden in (rollout.hidden_BTD, expected.hidden_BTD):
        assert hidden.shape == whole.shape
        torch.testing.assert_close(hidden[mask], whole[mask], rtol=0, atol=1e-4)
    assert_same(rows_of(rollout), rows_of(expected))


def test_weights_in_pieces_have_no_trunk_from_sampling(monkeypatch):
    asked, sample = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *a, **o: asked.append(o["keep_trunk"]) or sample(*a, **o))
    collected(shards_weights=True)
    collected(layers="all")
    collected()
    assert asked == [False, False, True]


def test_a_trunk_beyond_its_memory_is_computed_anew_in_every_pass(capsys, monkeypatch):
    whole, _ = collected()
    size = whole.hidden_BTD.numel() * 4
    assert collected(trunk_gigabytes=size / 1e9)[0].hidden_BTD is not None
    assert capsys.readouterr().out == ""
    for _ in range(2):
        rollout, _ = collected(trunk_gigabytes=(size - 1) / 1e9, reward_fn=blind)
        assert rollout.hidden_BTD is None
        assert_same(rows_of(rollout), rows_of(collected(reward_fn=blind)[0]))
    assert capsys.readouterr().out.count("ppo.trunk_gigabytes") == 1
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert collected(trunk_gigabytes=0, rank=1, world=2)[0].hidden_BTD is None
    assert capsys.readouterr().out == ""
    assert collected(layers="all")[0].hidden_BTD is None
    assert capsys.readouterr().out == ""
    for why, drop in (("lora.layers adapts all", False), ("the model is odd", True)):
        for _ in range(2):
            made = stirred(layers="top_2" if drop else "all")
            if drop:
                made[0].drop_trunk(why)
            assert collected(trunk_gigabytes=0, made=made)[0].hidden_BTD is None
        out = capsys.readouterr().out
        assert out.count("ppo.trunk_gigabytes has no effect") == 1
        assert why in out


def blind(said):
    return torch.zeros(len(said.texts))


def test_a_policy_without_a_value_has_values_of_0():
    made = stirred(heads=())
    rollout, _ = collected(made=made, algorithm="rloo", samples_per_prompt=2)
    assert torch.equal(rollout.values_BR, torch.zeros_like(rollout.log_probs_BR))


def test_a_value_on_the_policys_adapter_comes_with_its_pass():
    made = stirred(shared={"value": "policy"})
    passes = []
    hook = made[0].register_forward_pre_hook(lambda _module, args: passes.append(args[0]) if args else None)
    rollout, _ = collected(made=made, value="shared")
    hook.remove()
    assert passes == ["policy", "reference"]
    with torch.no_grad():
        values = made[0]("value", rollout.ids_BT, rollout.mask_BT, start=rollout.start)
    actions = rollout.actions_BR
    torch.testing.assert_close(rollout.values_BR[actions], values[actions], rtol=0, atol=1e-4)
    assert float(values[actions].abs().max()) > 0.01


def test_policy_and_value_are_asked_with_their_adapters_folded_in():
    made = stirred()
    layer, folded = made[0].base.model.layers[2].mlp.up_proj, []

    def look(_module, _args, given):
        if given.get("inputs_embeds") is not None:  # the layers above the trunk: a pass over the whole
            inside = "forward" in vars(layer) and layer.forward.weights() is not None
            folded.append((*layer.active_adapters, layer.disable_adapters, inside))

    hook = made[0].decoder.register_forward_pre_hook(look, with_kwargs=True)
    rollout, _ = collected(made=made)
    hook.remove()
    assert folded == [("policy", False, True), ("policy", True, False), ("value", False, True)]
    assert set(rollout.seconds) == {"time/generate", "time/score"}


def test_a_score_shape_has_the_reference_answer_the_same_prompts_whoever_collects():
    asked = []

    def reward_fn(said):
        asked.append((said.logged, said.prompts, said.texts))
        return torch.tensor([float(sum(map(ord, text))) for text in said.texts])

    shape = {
        "score_shape": "sigmoid",
        "reference_samples": 3,
        "samples_per_prompt": 2,
        "rollout_batch_size": 5,
    }
    whole, _ = collected(reward_fn=reward_fn, **shape)
    plain, _ = collected(reward_fn=reward_fn, samples_per_prompt=2)
    assert plain.baseline_BM is None
    assert_same(rows_of(whole), rows_of(plain))
    by_reference = [(p, t) for logged, prompts, texts in asked if not logged
                    for p, t in zip(prompts, texts, strict=True)]  # fmt: skip
    assert len(by_reference) == 12  # three to each of four prompts
    assert whole.baseline_BM.shape == (8, 3)
    assert torch.equal(whole.baseline_BM[:4], whole.baseline_BM[4:])  # the samples of a prompt stand 4 apart
    order = prompt_indices(3, 1, 4, len(PROMPTS))
    for row, index in enumerate(order):
        texts = [text for prompt, text in by_reference if prompt == PROMPTS[index]]
        assert len(texts) == 3 * order.count(index)
        assert set(whole.baseline_BM[row].tolist()) <= {float(sum(map(ord, text))) for text in texts}
    assert sorted(whole.baseline_BM[:4].flatten().tolist()) == sorted(
        float(sum(map(ord, text))) for _, text in by_reference
    )
    # by the base, whatever the policy's adapter is
    made = stirred()
    for name, parameter in made[0].parameters_of("policy").items():
        if "lora_B" in name:
            parameter.data.mul_(-1)
    other, _ = collected(reward_fn=reward_fn, made=made, **shape)
    assert other.texts != whole.texts
    assert torch.equal(other.baseline_BM, whole.baseline_BM)
    for rank in range(2):
        share, _ = collected(reward_fn=reward_fn, rank=rank, world=2, **shape)
        assert torch.equal(share.baseline_BM, whole.baseline_BM[rank::2])
