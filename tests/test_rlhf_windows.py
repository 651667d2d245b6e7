"""Layers that look back at a window only: every faster way of reading gives what whole rows give.

What is right comes from the model's own forward pass on one whole row: nothing packed, cached, folded or cut.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from preference_cases import cases, plain_scores
from preference_cases import taught as taught_comparisons
from preference_cases import tiny as tiny_road

from policy.sft.loss import check_packing as check_demonstrations
from policy.sft.loss import losses
from reward.model.batch import pack
from reward.model.forward import awkward, check_packing, forward_packed, score_examples
from reward.model.model import RewardModelConfig, TextRewardModel, new_reward_model, save_reward_model
from reward.model.trunk_cache import build_trunk
from reward.training.trainer import plan_forward
from rlhf.data.comparisons import Message
from rlhf.evals.scoring import Job, Scorer
from rlhf.generation.sampling import ModelParts, SamplingParams, generate, sample, uniforms
from rlhf.models import masks, packing
from rlhf.models.backbone import Backbone
from rlhf.models.masks import attention_masks, attention_window, left_pad
from rlhf.models.packing import Row, with_hidden_states
from rlhf.models.tiny import tiny_tokenizer
from rlhf.recipe.schema import Lora

WINDOW, VOCABULARY, NEVER = 16, len(tiny_tokenizer()), 10**6
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
WIDE = {**SHAPE, "head_dim": 8}
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
NO_CAPS = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
FAMILIES = {
    "mistral": hf.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "phi3": hf.Phi3Config(**SHAPE, sliding_window=WINDOW),
    "gemma2": hf.Gemma2Config(**WIDE, **NO_CAPS, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": hf.Gemma3TextConfig(
        **WIDE, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL], query_pre_attn_scalar=8
    ),
    "qwen2": hf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
}
LLAMA4 = hf.Llama4TextConfig(
    **WIDE,
    attention_chunk_size=WINDOW,
    intermediate_size_mlp=64,
    num_local_experts=2,
    no_rope_layers=[1, 1, 0],
)
EACH = pytest.mark.parametrize("family", FAMILIES)
GPT_NEO = hf.GPTNeoConfig(
    vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=WINDOW,
    attention_types=[[["global", "local"], 1]], max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip


def base_of(config):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def stir(module, std=0.2):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name or name.startswith("heads."):
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


def backbone_of(config, layers="all"):
    base = with_hidden_states(base_of(config))
    lora = Lora(rank=4, layers=layers)
    return stir(Backbone(base, lora, adapters=["policy", "value"], heads=["value"]))


@functools.cache
def folder_of(family, made=[]):  # noqa: B006
    """A folder with a model of a family and the byte tokenizer, which goes when the tests end."""
    import tempfile

    made.append(tempfile.TemporaryDirectory())
    tiny_tokenizer().save_pretrained(made[-1].name)
    base_of(GPT_NEO if family == "gpt_neo" else FAMILIES[family]).save_pretrained(made[-1].name)
    return made[-1].name


def reward_model(family, *overrides):
    recipe, dialogue = tiny_road(f"model.path={folder_of(family)}", *overrides)
    return recipe, stir(new_reward_model(recipe, dialogue)).eval()


def ids_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


EXAMPLES = [
    *cases(3, 1, prompt=(1, 5)),  # within the window
    *cases(2, 2, prompt=(40, 50), said=(5, 40), first=3),  # a prompt beyond it
    *cases(1, 3, prompt=(3, 3), said=(45, 50), first=5),  # responses beyond it
    *cases(1, 4, prompt=(60, 60), responses=(7, 7), said=(0, 0), first=6),  # nothing but the closing token
    *cases(1, 5, responses=(1, 1), prompt=(30, 30), first=7),
]
ROWS = [Row(ids_of(n, n), [True] * n) for n in (3, 50, 1, 12, 41, 2, 20, 49, 33, 7)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def without_windows(monkeypatch):
    """Let ready-made masks forget the windows."""
    flat = SimpleNamespace(layer_types=None)
    made = masks.attention_masks
    for module in ("rlhf.models.packing", "rlhf.evals.prefix_tree"):
        monkeypatch.setattr(
            f"{module}.attention_masks",
            lambda may, query, key, config, dtype: made(may, query, key, flat, dtype),
            raising=False,
        )


def test_a_mask_counts_positions_in_the_sequence_and_not_columns():
    positions = torch.tensor([[0, 1, 2, 1, 2, 3]])  # a shared token, two behind it, three behind it
    may = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    may[0, 3:, 1:3] = False
    types = [SLIDING, CHUNKED, FULL]
    config = SimpleNamespace(layer_types=types, sliding_window=2, attention_chunk_size=2)
    found = attention_masks(may, positions, positions, config, torch.float32)
    assert set(found) == set(types)
    rule = {
        SLIDING: lambda q, k: q - k < 2, CHUNKED: lambda q, k: q // 2 == k // 2, FULL: lambda q, k: True,
    }  # fmt: skip
    for kind, mask in found.items():
        for i in range(6):
            for j in range(6):
                seen = bool(may[0, i, j]) and rule[kind](int(positions[0, i]), int(positions[0, j]))
                assert float(mask[0, 0, i, j]) == (0.0 if seen else torch.finfo(torch.float32).min)
    alone = attention_masks(may, positions, positions, FAMILIES["mistral"], torch.float32)
    assert alone.shape == (1, 1, 6, 6)
    with pytest.raises(ValueError, match="layers of type linear_attention"):
        attention_masks(may, positions, positions, SimpleNamespace(layer_types=["linear_attention"]), None)


def test_a_window_is_what_the_configuration_says_and_what_the_model_can_pass():
    assert [attention_window(config) for config in FAMILIES.values()] == [WINDOW] * len(FAMILIES)
    assert attention_window(GPT_NEO) == WINDOW
    assert attention_window(hf.LlamaConfig(**SHAPE)) is None
    assert attention_window(hf.Qwen2Config(**SHAPE, sliding_window=WINDOW)) is None  # not used
    assert attention_window(hf.MistralConfig(**SHAPE, sliding_window=250)) is None  # nothing fits beyond it


def nll_of(model, row):
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
    return -sum(float(logits[t, row.ids[t + 1]]) for t in range(len(row.ids) - 1))


@EACH
@torch.no_grad()
def test_packed_demonstrations_beyond_the_window_are_read_as_whole_rows(family, monkeypatch):
    backbone = backbone_of(FAMILIES[family])
    backbone.activate("policy")
    head = backbone.base.get_output_embeddings()
    expected = torch.tensor([nll_of(backbone.base, row) for row in ROWS])
    for together in (True, False):
        close(losses(backbone.model, head, ROWS, 0, packing=together)[0], expected)
    assert check_demonstrations(backbone.model, ROWS, 0) is None
    without_windows(monkeypatch)
    assert not torch.allclose(losses(backbone.model, head, ROWS, 0, packing=True)[0], expected, atol=1e-2)
    warning = check_demonstrations(backbone.model, ROWS, 0)
    assert warning.startswith("packed rows give other outputs with this architecture (by ")


@EACH
@torch.no_grad()
def test_responses_that_share_a_prompt_are_scored_as_whole_rows(family, monkeypatch):
    _, model = reward_model(family)
    expected = plain_scores(model, EXAMPLES)
    for share in (True, False):
        close(score_examples(model, EXAMPLES, 0, share=share)[0], expected)
    assert check_packing(model, EXAMPLES, 0) is None
    without_windows(monkeypatch)
    found = score_examples(model, EXAMPLES, 0, share=True)[0]
    assert float((found - expected).abs().max()) > float(expected.std()) / 10
    assert "packed rows give other outputs" in check_packing(model, EXAMPLES, 0)
    assert check_packing(model, EXAMPLES[:3], 0) is None  # rows in which nothing can go wrong


def test_rows_of_a_model_that_attends_in_chunks_share_them_too():
    model = base_of(LLAMA4)
    assert set(LLAMA4.layer_types) == {CHUNKED, FULL}
    batch = packing.pack(ROWS[:5], [[0, 1, 2], [4, 3]], 0, [ids_of(21, 8), ids_of(9, 9)])
    mask = packing.attention_mask(batch.segments_NT, batch.positions_NT, LLAMA4, torch.float32)
    with torch.no_grad():
        found = model(batch.ids_NT, attention_mask=mask, position_ids=batch.positions_NT).logits
        for number, row in enumerate(ROWS[:5]):
            whole = [*(ids_of(9, 9) if number in (3, 4) else ids_of(21, 8)), *row.ids]
            n, column = batch.rows_B[number], batch.columns_B[number]
            close(found[n, column], model(torch.tensor([whole])).logits[0, -1])


@torch.no_grad()
def test_a_lost_window_is_noticed_in_half_precision_too(monkeypatch):
    backbone = backbone_of(FAMILIES["mistral"])
    backbone.base.to(torch.bfloat16)
    assert check_demonstrations(backbone.model, ROWS, 0) is None
    without_windows(monkeypatch)
    assert "packed rows give other outputs" in check_demonstrations(backbone.model, ROWS, 0)


@torch.no_grad()
def test_a_reward_model_tries_again_when_longer_rows_come(tmp_path, monkeypatch):
    recipe, dialogue = tiny_road(f"model.path={folder_of('mistral')}")
    model = reward_model("mistral")[1]
    card = RewardModelConfig(recipe.model.path, 0.0, 1.0, dialogue.fingerprint(), "plain", 96, 8)
    save_reward_model(model, tmp_path, card, dialogue)
    texts = ["ab", "c" * 60, "d" * 55]
    prompts = [(Message("user", text),) for text in ("x", "y" * 70)]
    rows = [[*dialogue.encode_prompt(p), *dialogue.close([], dialogue.encode_response(t))] for p, t in (
        (prompts[0], "ab"), (prompts[0], "cd"), *((prompts[1], t) for t in texts)
    )]  # fmt: skip
    expected = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    without_windows(monkeypatch)  # a model whose windows get lost, as long as rows are shared
    scorer = TextRewardModel(tmp_path)
    for part in (slice(0, 2), slice(2, 5)):
        asked = prompts[:1] * 2 if part.start == 0 else prompts[1:] * 3
        answers = ["ab", "cd"] if part.start == 0 else texts
        close(scorer.score(asked, answers), expected[part])


def test_the_examples_that_are_tried_are_the_awkward_ones():
    chosen = awkward(EXAMPLES)
    assert {3, 4} & {e["index"] for e in chosen}
    assert {5, 6} <= {e["index"] for e in chosen}
    longest = max(len(e["prompt"]) for e in EXAMPLES if len(e["responses"]) > 1)
    assert longest in [len(e["prompt"]) for e in chosen]
    assert awkward(EXAMPLES[:1]) == EXAMPLES[:1]


@torch.no_grad()
def test_a_window_that_no_mask_of_ours_knows_keeps_rows_apart():
    _, model = reward_model("gpt_neo")
    close(score_examples(model, EXAMPLES, 0, share=False)[0], plain_scores(model, EXAMPLES))
    narrow = cases(3, 9, prompt=(1, 3), responses=(2, 3), said=(0, 3))
    assert check_packing(model, narrow, 0) is None
    assert "packed rows give other outputs" in check_packing(model, [*narrow, *EXAMPLES], 0)


@EACH
@torch.no_grad()
def test_trunk_and_top_of_rows_beyond_the_window_are_the_whole(family):
    backbone = backbone_of(FAMILIES[family], "top_2")
    assert backbone.check_architecture() is None
    ids, mask = left_pad([ids_of(50), ids_of(30, 1), ids_of(2, 2)], 0)
    hidden = backbone.trunk(ids, mask)
    assert hidden is not None
    for role in ("value", "policy"):
        options = {"start": 40} if role == "policy" else {}
        whole, split = (backbone(role, ids, mask, states, **options) for states in (None, hidden))
        close(split, whole)
    alone = backbone("value", ids[1:2, -30:], mask[1:2, -30:])
    close(backbone("value", ids, mask)[1:2], alone)


@EACH
@torch.no_grad()
def test_scores_by_a_kept_trunk_are_those_of_whole_rows(family, monkeypatch):
    recipe, model = reward_model(family, "lora.layers=top_2")
    for share in (True, False):
        trunk = build_trunk(recipe, recipe.reward, model, EXAMPLES, 0, share=share)
        assert trunk is not None
        packed = pack(EXAMPLES, 0, share=share)
        close(forward_packed(model, packed, trunk)[1], plain_scores(model, EXAMPLES))


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
@torch.no_grad()
def test_a_top_whose_layers_take_the_windows_of_others_is_noticed(family, monkeypatch, capsys):
    import contextlib

    @contextlib.contextmanager
    def uncut(decoder, part, cut, *_):  # the types of the layers stay as they were
        layers, norm = decoder.layers, decoder.norm
        if part != "all":
            decoder.layers = layers[:cut] if part == "trunk" else layers[cut:]
            decoder.norm = torch.nn.Identity() if part == "trunk" else norm
        yield
        decoder.layers, decoder.norm = layers, norm

    for module in ("rlhf.models.backbone", "rlhf.models.packing"):
        monkeypatch.setattr(f"{module}.layers_of", uncut)
    assert "no trunk cache" in backbone_of(FAMILIES[family], "top_2").check_architecture()
    recipe, model = reward_model(family, "lora.layers=top_2")
    assert build_trunk(recipe, recipe.reward, model, EXAMPLES, 0, share=False) is None
    assert "trunk and top differ from the whole" in capsys.readouterr().out
    assert build_trunk(recipe, recipe.reward, model, EXAMPLES[:3], 0, share=False) is not None


@EACH
@torch.no_grad()
def test_a_folded_role_reads_rows_beyond_the_window_as_an_unfolded_one(family):
    backbone = backbone_of(FAMILIES[family])
    ids, mask = left_pad([ids_of(50), ids_of(1, 1)], 0)
    expected = backbone("value", ids, mask)
    with backbone.folded("value"):
        close(backbone("value", ids, mask), expected)


PROMPTS = [ids_of(40), ids_of(3, 1), ids_of(40), ids_of(20, 2), ids_of(1, 3), ids_of(3, 1)]


def log_probs_of(model, prompt, response):
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(response)]


@EACH
@torch.no_grad()
def test_sampled_tokens_have_the_log_probs_of_a_whole_pass(family):
    backbone = backbone_of(FAMILIES[family], "top_2")
    uniform = uniforms(0, "test", 0, range(len(PROMPTS)), 30)
    options = {"pad_id": 0, "temperature": 1.0, "keep_trunk": True}
    open_ended = sample(backbone, "policy", PROMPTS, uniform, eos_id=NEVER, **options)
    eos = int(open_ended.response_ids_BR[0, 20])
    found = sample(backbone, "policy", PROMPTS, uniform, eos_id=eos, **options)
    assert len(set(found.lengths_B.tolist())) > 1  # rows leave the batch
    assert int(found.lengths_B.max()) > WINDOW
    backbone.activate("policy")
    lengths = found.lengths_B.tolist()
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        response = found.response_ids_BR[row, :length].tolist()
        close(found.log_probs_BR[row, :length], torch.tensor(log_probs_of(backbone.base, prompt, response)))


@EACH
@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_model_is_sampled_alike_by_its_parts_and_as_a_whole(family, whole):
    model = base_of(FAMILIES[family])
    uniform = uniforms(0, "test", 0, range(len(PROMPTS)), 20)
    params = SamplingParams(1.0, frozenset([NEVER]))
    found = generate(ModelParts.of(model, whole=whole), PROMPTS, uniform, params)
    for row, prompt in enumerate(PROMPTS):
        expected = log_probs_of(model, prompt, found.response_ids_BR[row].tolist())
        close(found.log_probs_BR[row], torch.tensor(expected))


@pytest.mark.parametrize(
    "config", [*FAMILIES.values(), GPT_NEO, LLAMA4], ids=[*FAMILIES, "gpt_neo", "llama4"]
)
@pytest.mark.parametrize("text", [0, 1, 40])
@torch.no_grad()
def test_continuations_behind_a_long_text_are_scored_as_whole_rows(config, text):
    model = base_of(config)
    question, prefix = ids_of(30, 1), ids_of(text, 2)
    answers = [ids_of(n, 3 + n) for n in (1, 25, 2)]
    jobs = [Job([*question, *answer[:-1]], 29, answer) for answer in answers]
    jobs.append(Job(ids_of(4, 9)[:3], 2, ids_of(4, 9)[3:]))
    found, _ = Scorer(model, 512).score(prefix, jobs)
    expected = [
        sum(log_probs_of(model, [*prefix, *job.inputs[: job.first + 1]], job.targets)) for job in jobs
    ]
    assert found == pytest.approx(expected, abs=1e-3)


def test_trees_are_tried_on_a_row_beyond_the_window(monkeypatch):
    for config in (*FAMILIES.values(), GPT_NEO, LLAMA4):
        assert not Scorer(base_of(config), 512).takes_trees()
    monkeypatch.setattr("rlhf.evals.scoring.attention_window", lambda _: None)
    assert Scorer(base_of(GPT_NEO), 512).takes_trees()  # on a few tokens no window shows
    monkeypatch.undo()
    assert Scorer(base_of(hf.LlamaConfig(**SHAPE)), 512).takes_trees()


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_what_is_learned_does_not_depend_on_sharing_rows(family, tmp_path):
    rows = [*EXAMPLES, *cases(4, 6, prompt=(20, 40), said=(5, 30), first=len(EXAMPLES))]
    before, scores = [], []
    for share in (True, False):
        recipe, model = reward_model(family, "lora.layers=top_2")
        before.append(score_examples(model, rows, 0, share=False)[0])
        plan = plan_forward(recipe, recipe.reward, model, rows, tiny_road()[1])
        assert plan.share
        trunk = build_trunk(recipe, recipe.reward, model, rows, 0, share=share)
        options = (f"model.path={folder_of(family)}", "lora.layers=top_2", "reward.learning_rate=0.003")
        folder = tmp_path / str(share)
        taught = taught_comparisons(folder, rows, *options, share=share, trunk=trunk, model=model).eval()
        with torch.no_grad():
            scores.append(plain_scores(taught, rows))
    assert float((scores[0] - before[0]).abs().max()) > 0.1
    torch.testing.assert_close(*scores, rtol=1e-2, atol=1e-2)
