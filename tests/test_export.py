"""What `make export` writes: plain models that give what was trained, and refusals that leave nothing."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import noted_anew, stage, tiny_recipe
from safetensors import safe_open
from tiny_tax import finished
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from policy.export import __main__ as policy
from reward.export import __main__ as reward
from reward.model.model import TextRewardModel, load_config
from rlhf.data.comparisons import Counts, Message
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.export.hub import push
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.tiny import write_tiny_model
from rlhf.runs.artifacts import read_json, staged_folder, write_json

EXPORT = Path("runs/tiny/export")
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, prompt, response, closing = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
model.score.bias = torch.nn.Parameter(torch.tensor([model.config.reward_offset], dtype=model.dtype))
ids = [t for text in (prompt, response) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
print(model(input_ids=torch.tensor([[*ids, *json.loads(closing)]])).logits[0, 0].item())
ours = ("rlhf", "reward", "policy", "peft")
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ours]))
"""


@pytest.fixture(scope="module")
def exported(road, tmp_path_factory):
    """The tiny road with both models exported. Do not change it."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(road, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage(policy.main)
        stage(reward.main)
    return folder


@pytest.fixture
def at(exported, monkeypatch):
    """The exported run's folder as the current one."""
    monkeypatch.chdir(exported)


@pytest.fixture
def run(road, tmp_path, monkeypatch):
    """A copy of the tiny road as the current folder."""
    shutil.copytree(road, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def held_out():
    return read_native("runs/tiny/comparisons/held_out.jsonl", "stop", Counts())[:3]


def by_peft(adapter, ids):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained("models/tiny")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits


@torch.no_grad()
def test_the_policy_is_the_trained_one(at):
    model = AutoModelForCausalLM.from_pretrained(EXPORT / "policy").eval()
    base = AutoModelForCausalLM.from_pretrained("models/tiny").eval()
    tokenizer = AutoTokenizer.from_pretrained(EXPORT / "policy")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained("models/tiny").chat_template
    for comparison in held_out():
        ids = torch.tensor([tokenizer(comparison.prompt[-1].content)["input_ids"]])
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, by_peft("runs/tiny/ppo/policy", ids), rtol=0, atol=1e-5)
        assert (logits - base(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_the_score_in_a_fresh_process_without_this_project_is_the_trained_one(at):
    prompt, own = (Message("user", "The ferry was"),), TextRewardModel(Path("runs/tiny/reward/model"))
    assert abs(own.config.offset) > 1e-3
    expected = own.score([prompt], [" late."])
    words = [prompt[-1].content, " late.", json.dumps(own.dialogue.closing)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(EXPORT / "reward"), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    score, loaded = done.stdout.splitlines()
    torch.testing.assert_close(torch.tensor([float(score)]), expected, rtol=0, atol=1e-5)
    assert json.loads(loaded) == []


def snippet(folder, **names):
    """What the card's own lines give, run as they stand."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    found = {"folder": str(folder), **names}
    exec(code, found)
    return found


@pytest.fixture(scope="module")
def packed(road, tmp_path_factory):
    """A run over a base in 4 bits with a chat template, and two reward models of fewer layers, exported."""
    from policy.ppo import __main__ as train
    from reward.training import __main__ as reward_train
    from rlhf.collect import __main__ as collect

    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(road / "models", folder / "models")
    sizes = ("name=packed", "model.quantization=nf4", "dialogue.template=chat", "reward.members=2")
    sizes += ("dialogue.max_prompt_tokens=200", "reward.layers=2", "ppo.steps=2", "collect.prompts=24")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for main in (collect.main, reward_train.main, train.main, policy.main, reward.main):
            stage(main, *sizes)
    return folder / "runs/packed"


@pytest.mark.slow
@torch.no_grad()
def test_what_was_trained_over_a_packed_base_is_unpacked(packed, monkeypatch):
    monkeypatch.chdir(packed.parents[1])
    assert sorted(p.name for p in (packed / "export").iterdir()) == ["policy", "reward", "reward-1"]
    messages = [{"role": "user", "content": "The ferry was"}]
    scores = []
    for name in ("", "-1"):
        folder = packed / f"export/reward{name}"
        assert "quantization_config" not in read_json(folder / "config.json")
        assert read_json(folder / "config.json")["num_hidden_layers"] == 2
        own = TextRewardModel(packed / f"reward/model{name}")
        expected = own.score([(Message("user", "The ferry was"),)], [" late."])
        found = snippet(folder, messages=messages, response=" late.")["score"]
        torch.testing.assert_close(found[None], expected, rtol=0, atol=1e-4)
        scores.append(float(found))
    assert abs(scores[0] - scores[1]) > 1e-2
    recipe = tiny_recipe("name=packed", "model.quantization=nf4", "dialogue.template=chat")
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["policy"])
    backbone.load_adapter("policy", packed / "ppo/policy")
    loaded = snippet(packed / "export/policy")
    ids = loaded["tokenizer"].apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    logps = loaded["model"](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    padded, mask = torch.tensor([[*ids, 0]]), torch.tensor([[True] * len(ids) + [False]])
    expected = backbone("policy", padded, mask, start=1)[0][0]
    torch.testing.assert_close(logps[torch.arange(len(ids) - 1), ids[1:]], expected, rtol=0, atol=1e-3)
    assert "quantized to nf4" in (packed / "export/policy/README.md").read_text()


def test_the_lines_of_the_card_give_the_score(at):
    own = TextRewardModel(Path("runs/tiny/reward/model"))
    expected = own.score([(Message("user", "The ferry was"),)], [" late."])
    found = snippet(EXPORT / "reward", text="The ferry was", response=" late.")["score"]
    torch.testing.assert_close(found[None].detach(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_policy_of_which_all_weights_were_trained_is_copied(run, reloaded_here):
    recipe = tiny_recipe()
    made = finished(recipe, "distill")
    write_tiny_model(made.folder / "model", seed=7)
    made.finish({})
    stage(policy.main, "export.policy=distill")
    found, own, base = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (EXPORT / "policy", made.folder / "model", "models/tiny")
    )
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert not all(torch.equal(found[name], base[name]) for name in own)


def test_names_and_shapes_are_what_vllm_and_llama_cpp_read(at):
    for name, kind, auto in (
        ("policy", "LlamaForCausalLM", AutoModelForCausalLM),
        ("reward", "LlamaForSequenceClassification", AutoModelForSequenceClassification),
    ):
        folder = EXPORT / name
        config = read_json(folder / "config.json")
        assert config["architectures"] == [kind]
        assert "quantization_config" not in config
        assert not {"auto_map", "_name_or_path"} & config.keys()
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        fresh = auto.from_config(auto.from_pretrained(folder).config).state_dict()
        assert names | {"lm_head.weight"} == set(fresh) | {"lm_head.weight"}  # tied
        assert not any("lora" in key or "base_layer" in key or key.endswith("score.bias") for key in names)
        assert {file.name for file in folder.iterdir()} >= {
            "README.md",
            "tokenizer.json",
            "chat_template.jinja",
        }
    assert config["num_labels"] == 1 if "num_labels" in config else list(config["id2label"]) == ["0"]


def test_generation_settings_are_those_of_the_training(at):
    config = GenerationConfig.from_pretrained(EXPORT / "policy")
    assert (config.temperature, config.top_k, config.top_p, config.do_sample) == (1.0, 0, 1.0, True)
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id) == (8, [1], 0)


def test_lm_eval_reads_the_policy_and_gives_its_log_probabilities(at):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(EXPORT / "policy"), device="cpu", batch_size=1)
    context, target = held_out()[0].prompt[-1].content, " was good"
    request = Instance("loglikelihood", {}, (context, target), 0)
    found, _ = model.loglikelihood([request], disable_tqdm=True)[0]
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    before, after = (tokenizer(text)["input_ids"] for text in (context, target))
    ids = torch.tensor([[*before, *after]])
    logps = by_peft("runs/tiny/ppo/policy", ids)[0, :-1].log_softmax(-1)
    expected = logps.gather(-1, ids[0, 1:, None])[-len(after) :].sum()
    assert abs(found - float(expected)) < 1e-3


def test_the_card_has_the_figures_of_the_run(at):
    for name in ("policy", "reward"):
        text = (EXPORT / name / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["license"] == "other"
        assert front["base_model"] == "tiny"
        assert "train on, " in text
        assert "{{" not in text
    summary = read_json(Path("runs/tiny/evaluate/summary.json"))
    assert "Over-optimization: no sign of a collapse" in (EXPORT / "policy/README.md").read_text()
    line = next(x for x in (EXPORT / "policy/README.md").read_text().splitlines() if x.startswith("| gold"))
    assert f"| {summary['gold']['before']:.3f} | {summary['gold']['after']:.3f} |" in line
    offset = load_config(Path("runs/tiny/reward/model")).offset
    assert f"{offset:.6g}" in text
    assert read_json(EXPORT / "reward/config.json")["reward_offset"] == offset


def test_a_half_type_and_a_license_are_written_as_asked(run, reloaded_here):
    settings = ("export.dtype=bfloat16", "export.license=apache-2.0", "export.folder=elsewhere")
    stage(policy.main, *settings, "export.models=[policy]")
    stage(reward.main, *settings, "export.models=[policy]")
    assert [p.name for p in Path("elsewhere").iterdir()] == ["policy"]
    with safe_open("elsewhere/policy/model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert yaml.safe_load(Path("elsewhere/policy/README.md").read_text().split("---")[1])["license"] == (
        "apache-2.0"
    )


def test_what_is_there_is_not_written_over(run):
    place = EXPORT / "policy"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="is there already, and nothing is written over it"):
        stage(policy.main)
    assert list(place.iterdir()) == []
    (EXPORT / "reward").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        stage(reward.main)


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    with contextlib.suppress(KeyError), staged_folder(tmp_path / "export" / "policy") as made:
        (made / "half").touch()
        raise KeyError
    assert list((tmp_path / "export").iterdir()) == []


def test_a_pooled_reward_model_is_refused_with_what_to_do(run):
    file = Path("runs/tiny/reward/model/reward_model.json")
    write_json(file, read_json(file) | {"pooling": "mean"})
    noted_anew(Path("runs/tiny/reward"))
    with pytest.raises(UserError, match=r"reward.pooling=mean.*export.models=\[policy\]"):
        stage(reward.main)
    assert not EXPORT.exists()


def test_a_damaged_adapter_is_refused(run):
    file = Path("runs/tiny/ppo/policy/adapter_model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        stage(policy.main)
    assert not EXPORT.exists()


def test_a_stage_that_has_not_finished_is_named(run):
    with pytest.raises(UserError, match="run `make dpo RECIPE"):
        stage(policy.main, "export.policy=dpo")
    shutil.rmtree("runs/tiny/reward")
    stage(reward.main)  # nothing to export, and nothing asked for
    with pytest.raises(UserError, match="run `make reward RECIPE"):
        stage(reward.main, "export.models=[reward]")


def test_nothing_is_pushed_unless_asked(run, reloaded_here, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **options):
            calls.append((repo, options["private"]))

        def upload_folder(self, repo_id, folder_path, **_):
            assert (folder_path / "model.safetensors").is_file()
            calls.append(repo_id)
            if "bad" in repo_id:
                raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    stage(policy.main)
    assert calls == []
    stage(policy.main, "export.repo=me/lab", "export.folder=a")
    assert calls == [("me/lab-policy", True), "me/lab-policy"]
    with pytest.raises(UserError, match="no route to the hub"):
        stage(policy.main, "export.repo=me/bad", "export.folder=b", "export.private=false")
    assert calls[2] == ("me/bad-policy", False)
    assert (Path("b/policy/README.md")).is_file()
    with pytest.raises(UserError, match="OWNER/NAME"):
        stage(policy.main, "export.repo=lab")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(UserError, match=r"me/lab-policy did not take the model .*hf upload me/lab-policy"):
        push(tiny_recipe("export.repo=me/lab"), tmp_path, "policy")
