"""Model variants: weights against peft's own, interpolation of two, and every adapter that is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from policy.alignment_tax.models import (
    ModelVariant,
    check_models,
    load_variant,
    tokenizer_hash,
    variant_hash,
    variant_names,
    variant_stages,
    variants_of,
)
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.merging import with_adapters
from rlhf.models.tiny import tiny_model, write_tiny_model
from rlhf.recipe.schema import Lora, Model
from rlhf.runs.artifacts import SETTINGS, WEIGHTS, write_json

LORA = Lora(rank=4, alpha=8, layers="top_2")
IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 60, 61], [20, 30, 40, 50, 60, 70, 80, 90]])
PROMPT = "A kind assistant.\n\n-----\n\nHuman: Hi\n\nAssistant: Hello!\n"


@torch.no_grad()
def stir(module, seed, std=0.2):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def say(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def backbone(path):
    torch.manual_seed(0)
    built = Backbone(load_base(Model(path=path)), LORA, adapters=["policy", "reference"])
    stir(built, 1)
    with torch.no_grad():  # two different ones
        for name, parameter in built.parameters_of("reference").items():
            if "lora_B" in name:
                parameter.mul_(-0.5)
    return built


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, two adapters on it, and a run whose PPO started from one of them."""
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny_model(Path("models/tiny"))
        built = backbone("models/tiny")
        built.save_adapter("policy", Path("runs/tiny/ppo/policy"))
        built.save_adapter("reference", Path("start"))
        write_json(Path("runs/tiny/ppo/manifest.json"), {})
        Path("hhh.txt").write_text(PROMPT)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def recipe_of(*overrides):
    return tiny_recipe(f"tax.tasks.lm_loss.files={TINY}", "hhh_prompt=hhh.txt", *overrides)


def variants(*overrides):
    recipe = recipe_of(*overrides)
    return recipe, {variant.name: variant for variant in variants_of(recipe, recipe.tax)}


def state(variant, recipe):
    return load_variant(variant, recipe).model.state_dict()


# --- weights ---------------------------------------------------------------------------------------------


def test_a_variant_is_what_peft_makes_of_base_and_adapter(here):
    recipe, by_name = variants()
    variant = load_variant(by_name["policy"], recipe)
    base = AutoModelForCausalLM.from_pretrained("models/tiny")
    peft = PeftModel.from_pretrained(base, "runs/tiny/ppo/policy").eval()
    torch.testing.assert_close(say(variant.model), say(peft), rtol=0, atol=2e-5)
    merged = peft.merge_and_unload().state_dict()
    assert set(variant.model.state_dict()) == set(merged)
    for name, weight in variant.model.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6, msg=name)
    moved = [n for n, w in load_base(recipe.model).state_dict().items() if not torch.equal(w, merged[n])]
    assert len(moved) == 2 * 7  # all linear maps of two layers


@pytest.mark.parametrize("name", ["base", "policy"])
def test_a_variant_is_what_the_backbone_says_in_that_role(name, here):
    recipe, by_name = variants()
    logits = say(load_variant(by_name[name], recipe).model)
    expected = torch.log_softmax(logits, -1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    built = backbone("models/tiny")
    if name == "base":
        built = Backbone(load_base(recipe.model), LORA, adapters=["policy"])
    closed = torch.cat([IDS, torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        log_probs, _ = built(
            "policy" if name == "policy" else "reference",
            closed,
            torch.ones_like(closed, dtype=torch.bool),
            start=1,
        )
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", [None, "start"])
def test_between_reference_and_policy_every_weight_is_on_the_line(start, here):
    recipe, by_name = variants(
        f"ppo.start={start or 'null'}", "tax.interpolate=[0.25,0.5]", "tax.models.start=start"
    )
    reference = state(by_name["start"] if start else by_name["base"], recipe)
    policy, quarter, half = (state(by_name[n], recipe) for n in ("policy", "policy_0.25", "policy_0.5"))
    for name in policy:
        line = 0.75 * reference[name] + 0.25 * policy[name]
        torch.testing.assert_close(quarter[name], line, rtol=0, atol=1e-6, msg=name)
        line = (reference[name] + policy[name]) / 2
        torch.testing.assert_close(half[name], line, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(say(load_variant(by_name["policy_0.5"], recipe).model),
                           say(load_variant(by_name["policy_0.25"], recipe).model))  # fmt: skip


def test_the_ends_of_the_way_are_reference_and_policy_exactly(here):
    recipe = recipe_of()
    policy, start = "runs/tiny/ppo/policy", "start"
    for weight, only in ((0.0, start), (1.0, policy)):
        end = state(ModelVariant("end", "models/tiny", ((start, 1 - weight), (policy, weight))), recipe)
        variant = state(ModelVariant("variant", "models/tiny", ((only, 1.0),)), recipe)
        assert all(torch.equal(end[name], variant[name]) for name in variant)


def adapted(base, folder, **options):
    """An adapter by peft itself on a base, and what peft says with it."""
    torch.manual_seed(2)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    stir(model, 3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return say(model)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 7, "target_modules": ["v_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}},
        {"r": 3, "lora_alpha": 3, "target_modules": ["lm_head", "o_proj"]},  # the head is tied
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 3}},
        {"r": 2, "target_modules": ["up_proj"], "use_dora": True},
        {"r": 2, "target_modules": ["up_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_any_adapter_of_peft_is_added_as_peft_does(options, tmp_path):
    expected = adapted(tiny_model(259), tmp_path, **options)
    model = tiny_model(259).eval()
    embedding = model.get_input_embeddings().weight.clone()
    model = with_adapters(model, [(tmp_path, 1.0)])
    torch.testing.assert_close(say(model), expected, rtol=0, atol=2e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.allclose(say(tiny_model(259).eval()), expected, atol=1e-2)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize("weights", [[1.0], [0.25, 0.75]])
@pytest.mark.parametrize(
    ("base", "targets"), [(gpt2, ["c_attn", "c_proj"]), (lambda: tiny_model(259).eval(), ["q_proj"])]
)
def test_weights_that_sum_to_one_give_the_adapter_transposed_matrices_too(base, targets, weights, tmp_path):
    expected = adapted(base(), tmp_path, r=2, lora_alpha=5, target_modules=targets)
    model = with_adapters(base(), [(tmp_path, weight) for weight in weights])
    torch.testing.assert_close(say(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "section", [{"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}]
)
def test_where_the_matrix_cannot_be_written_to_the_adapter_runs_beside_it(section, here):
    recipe = recipe_of(*(f"model.{key}={value}" for key, value in section.items()))
    variant = load_variant(ModelVariant("policy", "models/tiny", (("runs/tiny/ppo/policy", 1.0),)), recipe)
    built = Backbone(load_base(recipe.model), LORA, adapters=["policy"])
    built.load_adapter("policy", Path("runs/tiny/ppo/policy"))
    built.activate("policy")
    expected = say(built.model)
    torch.testing.assert_close(say(variant.model).float(), expected.float(), rtol=0, atol=1e-2)
    built.activate("reference")
    assert not torch.allclose(say(built.model).float(), expected.float(), atol=0.1)


# --- which variants --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "names", "stages"),
    [
        (["tax.models={x: start}"], "base prompted policy_0.25 policy_0.5 policy x", ["ppo"]),
        (["hhh_prompt=nowhere.txt", "name=other"], "base", []),  # no stage of it has finished
        (
            ["tax.variants=[sft,distilled,policy_prompted]"],
            "sft distilled policy_prompted",
            ["sft", "distill", "ppo"],
        ),
        (["tax.variants=policy"], "policy_0.25 policy_0.5 policy", ["ppo"]),
    ],
)
def test_variants_are_those_named_or_those_whose_stage_has_finished(overrides, names, stages, here):
    recipe = recipe_of("tax.interpolate=[0.5,0.25]", *overrides)
    assert variant_names(recipe, recipe.tax) == names.split()
    assert variant_stages(names.split()) == stages


def test_variants_know_their_base_their_adapters_and_their_prompt(here, tmp_path):
    hub = "someone/some-model"
    _, by_name = variants(
        f"tax.models={{adapter: start, whole: models/tiny, hub: {hub}}}", "tax.interpolate=[0.5]"
    )
    adapter = "runs/tiny/ppo/policy"
    assert by_name["base"].adapters == ()
    assert by_name["prompted"].prompted
    assert by_name["prompted"].weights == by_name["base"].weights
    assert by_name["policy"].adapters == ((adapter, 1.0),)
    assert by_name["policy_0.5"].adapters == ((adapter, 0.5),)
    assert (by_name["adapter"].base, by_name["adapter"].adapters) == ("models/tiny", (("start", 1.0),))
    assert (by_name["whole"].base, by_name["whole"].adapters) == ("models/tiny", ())
    assert by_name["hub"].base == hub
    assert all(variant.what for variant in by_name.values())


def test_a_stage_that_trained_all_weights_is_a_model_of_its_own(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(Path("runs/tiny/distill/model"), seed=4)
    _, by_name = variants("tax.variants=[distilled]")
    assert by_name["distilled"].base == "runs/tiny/distill/model"
    assert by_name["distilled"].adapters == ()


def test_a_prompted_variant_needs_no_other_weights(here):
    recipe, by_name = variants()
    base = load_variant(by_name["base"], recipe)
    assert base.prefix_ids == []
    prompted = load_variant(by_name["prompted"], recipe, same=base)
    assert prompted.model is base.model
    assert base.tokenizer.decode(prompted.prefix_ids).startswith("A kind assistant.")


def test_a_prompt_longer_than_the_window_is_told(here, tmp_path):
    (tmp_path / "long.txt").write_text(PROMPT + "Human: x\n\nAssistant: " + "y" * 600 + "\n")
    recipe, by_name = variants(f"hhh_prompt={tmp_path}/long.txt")
    with pytest.raises(UserError, match=r"the model reads 512"):
        load_variant(by_name["prompted"], recipe)


def test_the_hash_knows_everything_that_decides_what_a_variant_says(here, tmp_path):
    recipe = recipe_of()
    plain = ModelVariant("a", "models/tiny", (("start", 1.0),))
    shutil.copytree("models/tiny", tmp_path / "moved")
    for equal in (replace(plain, name="b", what="x"), replace(plain, base=str(tmp_path / "moved"))):
        assert variant_hash(equal, recipe) == variant_hash(plain, recipe)
    write_tiny_model(tmp_path / "other", seed=7)
    others = [
        (replace(plain, adapters=(("start", 0.5),)), recipe),
        (replace(plain, adapters=(("runs/tiny/ppo/policy", 1.0),)), recipe),
        (replace(plain, adapters=()), recipe),
        (replace(plain, base=str(tmp_path / "other")), recipe),
        (replace(plain, prompted=True), recipe),
        (plain, recipe_of("model.dtype=bfloat16")),
        (plain, recipe_of("dialogue.template=chat")),
        (ModelVariant("a", "hub/one"), recipe),
        (ModelVariant("a", "hub/two"), recipe),
    ]
    hashes = [variant_hash(variant, r) for variant, r in others]
    assert len({*hashes, variant_hash(plain, recipe)}) == len(others) + 1
    assert tokenizer_hash(plain) == tokenizer_hash(ModelVariant("x", str(tmp_path / "other")))
    assert tokenizer_hash(plain) != tokenizer_hash(ModelVariant("x", "hub/one"))


# --- what is refused -------------------------------------------------------------------------------------


def broken(tmp_path, settings=(), tensors=None, drop=()):
    """A copy of a good adapter with settings or tensors changed."""
    adapted(tiny_model(259), tmp_path, r=2, target_modules=["q_proj"])
    written = json.loads((tmp_path / SETTINGS).read_text())
    write_json(tmp_path / SETTINGS, written | dict(settings))
    saved = {name: t for name, t in load_file(tmp_path / WEIGHTS).items() if not any(d in name for d in drop)}
    save_file(saved | (tensors or {}), tmp_path / WEIGHTS)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"task_type": "SEQ_CLS"}}, "of kind LORA for SEQ_CLS; name a LoRA adapter"),
        ({"settings": {"peft_type": "IA3"}}, "of kind IA3"),
        ({"tensors": {"base_model.model.score.weight": torch.zeros(1, 4)}}, "score.weight has no place"),
        ({"drop": ["layers.1.self_attn.q_proj.lora_B"]}, r"layers\.1\S+ is missing: the file is damaged"),
        ({"drop": ["lora_"]}, "is missing: the file is damaged"),
    ],
)
def test_what_is_no_whole_adapter_of_a_language_model_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        with_adapters(tiny_model(259), [(broken(tmp_path, **change), 1.0)])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_only_a_sum_of_low_rank_updates_can_be_weighted(options, tmp_path):
    adapted(tiny_model(259), tmp_path, r=2, target_modules=["q_proj"], **options)
    for adapters in ([(tmp_path, 0.5)], [(tmp_path, 1.0), (tmp_path, 1.0)]):
        with pytest.raises(UserError, match="is more than low-rank updates"):
            with_adapters(tiny_model(259), adapters)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    broken(tmp_path)
    for base in (tiny_model(259, width=16), tiny_model(259, layers=1), gpt2()):
        with pytest.raises(UserError, match="made for another base"):
            with_adapters(base, [(tmp_path, 1.0)])
    with pytest.raises(UserError, match="no adapter here"):
        with_adapters(tiny_model(259), [(tmp_path / "nowhere", 1.0)])


def test_other_models_must_be_there(here, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, message in (
        (f"{tmp_path}/empty", "holds neither an adapter nor a model"),
        ("runs/tiny/gone/policy", r"tax\.models\.x: runs/tiny/gone/policy is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_models(recipe_of(f"tax.models.x={place}").tax)
    for place in ("start", "models/tiny", "owner/name", "gpt2"):
        check_models(recipe_of(f"tax.models.x={place}").tax)


def test_a_model_that_cannot_be_loaded_is_told_by_the_variant_s_name(here):
    write_json(Path("bare/config.json"), {"model_type": "llama"})
    recipe, by_name = variants("tax.models.x=bare")
    with pytest.raises(UserError, match=r"^variant x: no (model|tokenizer) at bare") as caught:
        load_variant(by_name["x"], recipe)
    assert "make model" not in str(caught.value)
