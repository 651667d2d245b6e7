"""Any classifier with one label gives the score that it gives a text alone, or a sentence says why not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_classifiers import SIZES, llama, tokenizer_in
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from reward.card import scorers
from reward.card.scorers import load_scorer
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model, tiny_tokenizer
from rlhf.recipe.load import load

PROMPTS = [
    (Message("user", "Hi"),),
    (Message("user", "Why?"), Message("assistant", "So."), Message("user", "Oh")),
    (Message("user", "x" * 40),),
]
RESPONSES = ["Hello there, how are you today?", "No", "Well, it depends."]
ENCODER = {**SIZES, "vocab_size": 300, "num_labels": 1, "pad_token_id": 0}


@pytest.fixture
def recipe(inside):
    (inside / "p.jsonl").write_text("")
    (inside / "r.yaml").write_text("{name: r, model: {path: nowhere}, data: {comparisons: p.jsonl}}")
    return load("r.yaml")


def adapter(folder="adapter", *, base="base", tokenizer=True):
    """A base without a trained head, and a peft adapter with one."""
    llama(base, pad=None)
    decoder = tiny_model(259, seed=3, layers=2, width=16)
    decoder.config.pad_token_id = 1  # EOS, as in many a base
    decoder.save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer_in(folder)
    return model


def alone(model, ids):
    """What the model says to one text without any padding."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def chat_ids(tokenizer, prompt, response):
    text = "".join(f"<|start|>{m.role}\n{m.content}<|end|>\n" for m in prompt)
    return tokenizer(f"{text}<|start|>assistant\n{response}<|end|>\n")["input_ids"]


def refusal(path, recipe, **options):
    with pytest.raises(UserError) as caught:
        load_scorer(path, recipe, **options)
    return str(caught.value)


# --- classifiers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [True, None, False], ids=["own", "eos", "none"])
def test_a_score_is_that_of_the_text_alone_whatever_the_padding(recipe, pad):
    model, tokenizer = llama(pad=pad)
    scores = load_scorer("model", recipe).score(PROMPTS, RESPONSES)
    expected = [alone(model, chat_ids(tokenizer, p, r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(s, 3) for s in expected}) == 3
    assert scores.dtype == np.float64


@pytest.mark.parametrize("pad", [None, False], ids=["eos", "none"])
def test_a_response_that_ends_in_the_padding_token_is_read_as_alone(recipe, pad):
    model, tokenizer = llama(pad=pad, template=False)
    responses = ["Yes.<|end|>", "No.<|end|>" * 9, "Perhaps<|pad|>"]
    scores = load_scorer("model", recipe).score(PROMPTS, responses)
    rows = [
        tokenizer("\n\n".join([*(m.content for m in p), r]))["input_ids"]
        for p, r in zip(PROMPTS, responses, strict=True)
    ]
    assert scores == pytest.approx([alone(model, row) for row in rows], abs=1e-5)


def test_where_every_token_occurs_rows_go_one_by_one(recipe, monkeypatch):
    model, tokenizer = llama(pad=False)
    monkeypatch.setattr(scorers, "_unused", lambda rows, vocabulary: None)
    scores = load_scorer("model", recipe).score(PROMPTS, RESPONSES)
    expected = [alone(model, chat_ids(tokenizer, p, r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_the_padding_of_a_batch_is_a_token_that_is_not_in_it():
    assert scorers._unused([[0, 1], [3, 1]], 9) == 2
    assert scorers._unused([[0, 1]], 2) is None


def test_without_a_template_the_turns_are_joined_by_blank_lines(recipe):
    model, tokenizer = llama(template=False)
    scorer = load_scorer("model", recipe)
    expected = alone(model, tokenizer("Why?\n\nSo.\n\nOh\n\nNo")["input_ids"])
    assert scorer.score(PROMPTS[1:2], ["No"]) == pytest.approx([expected], abs=1e-5)
    assert scorer.describe()["template"] == "plain"


def test_a_model_describes_itself(recipe):
    llama(limit=100)
    scorer = load_scorer("model", recipe)
    assert scorer.describe() == {
        "path": "model",
        "kind": "sequence classifier",
        "base": None,
        "architecture": "LlamaForSequenceClassification",
        "template": "chat",
        "padding": "<|pad|>",
        "max_tokens": 100,
        "dtype": "float32",
    }
    assert json.dumps(scorer.describe())
    assert (scorer.normalized, scorer.gain) == (False, None)


def test_the_recipe_s_dtype_is_that_of_the_model(recipe):
    llama()
    recipe = load("r.yaml", ["model.dtype=bfloat16"])
    assert load_scorer("model", recipe).describe()["dtype"] == "bfloat16"


def test_a_text_that_is_too_long_loses_its_beginning_and_counts_as_cut(recipe):
    model, tokenizer = llama(limit=60)
    scorer = load_scorer("model", recipe)
    prompts, responses = [PROMPTS[0], (Message("user", "y" * 90),)], ["a", "b"]
    ids = chat_ids(tokenizer, prompts[1], "b")
    expected = alone(model, [ids[0], *ids[-59:]])  # <|start|> is a special token and stays
    assert scorer.score(prompts, responses)[1] == pytest.approx(expected, abs=1e-5)
    assert scorer.cut(prompts, responses).tolist() == [False, True]


def test_the_positions_of_a_model_are_its_limit_too(recipe):
    llama(max_position_embeddings=80)
    assert load_scorer("model", recipe).describe()["max_tokens"] == 80


def test_encoders_are_read_at_their_own_place(recipe):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**ENCODER, max_position_embeddings=64)).save_pretrained("model")
    tokenizer = tokenizer_in("model", template=False)
    model = AutoModelForSequenceClassification.from_pretrained("model").eval()
    scores = load_scorer("model", recipe).score(PROMPTS, RESPONSES)
    rows = [
        tokenizer("\n\n".join([*(m.content for m in p), r]))["input_ids"][-64:]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert scores == pytest.approx([alone(model, row) for row in rows], abs=1e-5)


def test_positions_that_begin_behind_the_padding_leave_less_room(recipe):
    config = RobertaConfig(**{**ENCODER, "pad_token_id": 1}, max_position_embeddings=52)
    RobertaForSequenceClassification(config).save_pretrained("model")
    tokenizer_in("model", template=False)
    scorer = load_scorer("model", recipe)
    assert scorer.describe()["max_tokens"] == 50
    assert np.isfinite(scorer.score(PROMPTS, ["z" * 100] * 3)).all()


# --- adapters --------------------------------------------------------------------------------------------


def test_an_adapter_without_our_card_loads_with_its_head_and_its_own_padding(recipe):
    model = adapter()
    scorer = load_scorer("adapter", recipe)
    tokenizer = tiny_tokenizer()
    expected = [alone(model, chat_ids(tokenizer, p, r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scorer.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)
    told = scorer.describe()
    assert (told["kind"], told["base"]) == ("adapter of a sequence classifier", "base")
    assert told["padding"] == "<|pad|>"  # the base says EOS


def test_an_adapter_without_a_tokenizer_takes_its_base_s(recipe):
    adapter(tokenizer=False)
    assert load_scorer("adapter", recipe).describe()["padding"] == "<|end|>"


def changed(file, change):
    """Write the tensors of a file anew."""
    save_file(dict(filter(None, map(change, load_file(file).items()))), file, metadata={"format": "pt"})


def without_score(item):
    return None if "score" in item[0] else item


def adapter_without_head():
    adapter()
    changed("adapter/adapter_model.safetensors", without_score)


def adapter_with_two_outputs():
    adapter()
    twice = lambda item: (item[0], torch.cat([item[1]] * 2) if "score" in item[0] else item[1])  # noqa: E731
    changed("adapter/adapter_model.safetensors", twice)


def adapter_for_something_else():
    adapter()
    file = Path("adapter/adapter_config.json")
    file.write_text(file.read_text().replace("SEQ_CLS", "CAUSAL_LM"))


def adapter_whose_base_is_gone():
    adapter(base="./models/base")
    Path("models").rename("elsewhere")


def adapter_in_another_form():
    adapter()
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")


def language_model():
    tokenizer_in("model")
    tiny_model(259).save_pretrained("model")


def classifier_without_head():
    llama()
    changed("model/model.safetensors", without_score)


def pickled_weights():
    model, _ = llama()
    Path("model/model.safetensors").unlink()
    torch.save(model.state_dict(), "model/pytorch_model.bin")


def classifier_without_tokenizer():
    llama()
    for file in Path("model").glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (adapter_without_head, "adapter", "has no score.weight with one output (it is not saved)"),
        (adapter_with_two_outputs, "adapter", "(its shape is (2, 16)); it is no reward model"),
        (adapter_for_something_else, "adapter", "an adapter for CAUSAL_LM, not for a sequence classifier"),
        (adapter_whose_base_is_gone, "adapter", "the base of adapter is not there: no folder ./models/base;"),
        (adapter_in_another_form, "adapter", "is not there; only safetensors are read"),
        (lambda: llama(labels=2), "model", "model has 2 labels (LlamaForSequenceClassification); a reward"),
        (language_model, "model", "model has 2 labels (LlamaForCausalLM)"),
        (classifier_without_head, "model", "model has no trained head (score.weight is missing)"),
        (pickled_weights, "model", "only safetensors are read"),
        (classifier_without_tokenizer, "model", "model has no tokenizer; save it beside the model"),
        (lambda: Path("empty").mkdir(), "empty", "no sequence classifier can be loaded from empty ("),
        (lambda: None, "./none", "./none is not a folder; name a reward model's folder or a hub id"),
    ],
)
def test_what_cannot_be_used_says_why(recipe, make, path, message):
    make()
    assert message in refusal(path, recipe)
    assert refusal(path, recipe, key="card.against").startswith("card.against: ")


def test_code_of_a_model_runs_only_when_the_recipe_says_so(recipe, inside):
    llama()
    (inside / "model" / "evil.py").write_text("open('ran', 'w')\nraise RuntimeError('ran')\n")
    config = json.loads((inside / "model" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (inside / "model" / "config.json").write_text(json.dumps(config))
    assert "only with model.trust_remote_code=true" in refusal("model", recipe)
    assert not (inside / "ran").exists()


def test_a_score_that_is_not_a_number_is_an_error(recipe):
    llama()
    weights = load_file("model/model.safetensors")
    weights["score.weight"][:] = torch.inf
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    scorer = load_scorer("model", recipe)
    with pytest.raises(UserError, match="model gives 3 of 3 responses a score that is not a finite number"):
        scorer.score(PROMPTS, RESPONSES)


def test_a_template_that_refuses_a_dialogue_is_named(recipe):
    _, tokenizer = llama()
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    tokenizer.save_pretrained("model")
    scorer = load_scorer("model", recipe)
    with pytest.raises(
        UserError, match=r"refuses a dialogue \(no system turn; the roles are user, assistant\)"
    ):
        scorer.score(PROMPTS[:1], RESPONSES[:1])


# --- our own ---------------------------------------------------------------------------------------------


class Card:
    def __init__(self, **fields):
        self.__dict__ |= fields

    def as_dict(self):
        return dict(self.__dict__)


class Ours:
    """Stands for reward.model.model.TextRewardModel."""

    def __init__(self, folder, device, trust_remote_code):
        self.folder = folder

    def score(self, prompts, responses):
        return torch.tensor([float(len(r)) for r in responses])


@pytest.fixture
def ours(inside, monkeypatch):
    (inside / "mine").mkdir()
    (inside / "mine" / "reward_model.json").write_text("{}")
    fields = {"base": "b", "gain": 1.5}
    monkeypatch.setattr(scorers, "load_config", lambda folder: Card(**{"objective": "ranked"} | fields))
    monkeypatch.setattr(scorers, "TextRewardModel", Ours)
    return fields


def test_a_folder_with_our_card_is_read_by_our_own_class(recipe, ours, inside):
    scorer = load_scorer(str(inside / "mine"), recipe)
    assert scorer.score(PROMPTS, RESPONSES).tolist() == [31.0, 2.0, 17.0]
    assert (scorer.normalized, scorer.gain) == (True, 1.5)
    assert scorer.describe()["base"] == "b"


def test_what_our_own_model_cuts_is_known_from_its_dialogue(recipe, ours, monkeypatch):
    class Dialogue:
        max_prompt_tokens, max_response_tokens = 3, 20

        def encode_prompt(self, messages):
            return list("".join(m.content for m in messages))[-self.max_prompt_tokens :]

        def encode_response(self, text):
            return list(text)[: self.max_response_tokens]

    monkeypatch.setattr(Ours, "dialogue", Dialogue(), raising=False)
    scorer = load_scorer("./mine", recipe)
    assert scorer.cut(PROMPTS, RESPONSES).tolist() == [True, True, True]
    assert scorer.cut(PROMPTS[:1] * 2, ["a", "b" * 21]).tolist() == [False, True]
    assert Ours.dialogue.max_prompt_tokens == 3


def test_a_model_trained_by_imitation_gives_no_score(recipe, ours):
    ours["objective"] = "imitation"
    assert "was trained by imitation and gives no score" in refusal("mine", recipe)


def test_the_adapter_that_the_classifier_scorer_reads_is_the_one_peft_reads(recipe):
    adapter()
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1, pad_token_id=0)
    again = PeftModel.from_pretrained(base, "adapter").eval()
    ids = chat_ids(tiny_tokenizer(), PROMPTS[1], "No")
    got = load_scorer("adapter", recipe).score(PROMPTS[1:2], ["No"])
    assert got == pytest.approx([alone(again, ids)], abs=1e-5)
