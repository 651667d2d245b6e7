"""Scripts written for trl's PPOTrainer run with another import; every argument is used, idle or refused."""

import dataclasses
import inspect
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_recipe
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
)

from policy.ppo.rollout import Responses
from policy.trl_compat import PPOConfig, PPOTrainer
from policy.trl_compat.config import MAPPED, REFUSED, UNUSED
from policy.trl_compat.trainer import GivenTokens, reads_tokens
from reward.model.model import RewardModelConfig, TextRewardModel, new_reward_model, save_reward_model
from reward.model.reward_func import as_reward_func
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.masks import left_pad
from rlhf.models.tiny import write_tiny_model
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.metrics import read_metrics

NAMES = json.loads((ROOT / "tests/trl_ppo_1_12.json").read_text(encoding="utf-8"))
"""Of trl 1.12.0: the fields of PPOConfig, TrainingArguments' among them, and the arguments of PPOTrainer."""
SCRIPT = re.search(r"```python\n(.*?)```", (ROOT / "docs/from_trl.md").read_text(encoding="utf-8"), re.S)[1]


def test_every_argument_of_trl_is_taken_and_says_what_became_of_it():
    kinds = [MAPPED, UNUSED, REFUSED]
    assert len(NAMES["config"]) == 145
    for name in NAMES["config"]:
        assert sum(name in kind for kind in kinds) == 1, name
    assert {name for kind in kinds for name in kind} == set(NAMES["config"])
    assert {field.name for field in dataclasses.fields(PPOConfig)} >= set(NAMES["config"])
    assert list(inspect.signature(PPOTrainer).parameters) == NAMES["trainer"]


def other_value(field):
    """A value that is not the field's default."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool) or default is None:
        return not default
    return default + 1 if isinstance(default, int | float) else "other"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_without_a_counterpart_is_refused_with_where_it_went(tmp_path, name):
    field = next(field for field in dataclasses.fields(PPOConfig) if field.name == name)
    with pytest.raises(UserError, match=f"PPOConfig: {name}=.* has no counterpart here: ") as caught:
        PPOConfig(output_dir=str(tmp_path), **{name: other_value(field)})
    assert REFUSED[name] in str(caught.value)


def test_the_arguments_mean_what_they_meant(tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=6,
        num_mini_batches=3, total_episodes=50, num_ppo_epochs=2, learning_rate=1e-4, cliprange=0.3,
        vf_coef=0.5, cliprange_value=0.4, kl_coef=0.1, kl_estimator="k3", gamma=0.9, lam=0.8,
        whiten_rewards=True, temperature=0.5, missing_eos_penalty=2.0, lr_scheduler_type="cosine",
        warmup_steps=0.5, local_rollout_forward_batch_size=7, adam_epsilon=1e-6, max_grad_norm=2.0,
        save_steps=2,
    )  # fmt: skip
    section = args.section(rows=10, processes=2)
    assert (args.batch_size, args.micro_batch_size, args.local_batch_size) == (48, 8, 24)
    assert (args.mini_batch_size, args.local_mini_batch_size, args.num_total_batches) == (16, 8, 2)
    expected = {
        "steps": 2, "batch_size": 48, "micro_batch_size": 4, "minibatches": 3, "epochs": 2,
        "learning_rate": 1e-4, "clip_range": 0.3, "value_coef": 0.5, "value_clip_range": 0.4, "kl_coef": 0.1,
        "kl_estimator": "k3", "gamma": 0.9, "lam": 0.8, "whiten_rewards": True, "temperature": 0.5,
        "missing_eos": "subtract", "missing_eos_penalty": 2.0, "schedule": "cosine", "warmup_steps": 1,
        "rollout_batch_size": 7, "adam_epsilon": 1e-6, "max_grad_norm": 2.0, "checkpoint_every": 2,
    }  # fmt: skip
    assert {name: getattr(section, name) for name in expected} == expected
    plain = PPOConfig(output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2)
    section = plain.section(rows=5, processes=1)
    assert (section.steps, section.missing_eos) == (5, "ignore")
    assert (section.learning_rate, section.temperature) == (3e-6, 0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mini_batches": 3}, "batch_size 8 does not divide into num_mini_batches 3"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type=polynomial: use one of linear"),
        ({"optim": "adafactor"}, "optim=adafactor: use one of adamw_torch"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(tmp_path, options, message):
    args = PPOConfig(output_dir=str(tmp_path), **options)
    with pytest.raises(UserError, match=message):
        args.section(rows=8, processes=1)


@pytest.mark.parametrize(
    ("report_to", "trackers"),
    [
        ("none", []),
        (None, []),
        ("tensorboard", ["tensorboard"]),
        (["wandb", "trackio"], ["wandb", "trackio"]),
        ("all", ["tensorboard"]),
    ],
)
def test_report_to_names_the_trackers(tmp_path, monkeypatch, report_to, trackers):
    monkeypatch.setattr(
        "policy.trl_compat.config.importlib.util.find_spec", lambda name: name == "tensorboard" or None
    )
    assert PPOConfig(output_dir=str(tmp_path), report_to=report_to).report_to == trackers


def test_a_tracker_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(UserError, match="report_to=mlflow: use one of tensorboard, wandb, trackio, or none"):
        PPOConfig(output_dir=str(tmp_path), report_to=["wandb", "mlflow"])


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A tiny policy and a classifier over the same tokens, in folders."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "sft")
    config = LlamaConfig.from_pretrained("sft", num_labels=1)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward")
    AutoTokenizer.from_pretrained("sft").save_pretrained("reward")
    return tmp_path


def test_the_old_example_runs_with_one_changed_import(models, capsys):
    before = AutoModelForCausalLM.from_pretrained("sft").state_dict()
    script = SCRIPT.replace("learning_rate=3e-4", "learning_rate=1e-2, report_to='tensorboard'")
    assert "from policy.trl_compat import PPOConfig, PPOTrainer" in script
    exec(compile(script, "from_trl.md", "exec"), names := {"__name__": "script"})
    log = read_metrics(models / "runs/from_trl")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert list(Path("runs/from_trl").rglob("events.out.tfevents.*"))
    after = AutoModelForCausalLM.from_pretrained("runs/from_trl/final").state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "down_proj"}
    assert not any("embed" in name or "norm" in name for name in changed)
    rows = [json.loads(line) for line in Path("runs/from_trl/completions.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"query", "model response", "score"}] * len(names["prompts"])
    assert "value_model is unused" in capsys.readouterr().out
    # saving leaves the trainer as it was, and the saved model says what it says
    trainer = names["trainer"]
    trainer.save_model("runs/from_trl/again")
    assert trainer.generate_completions() == rows
    ids = torch.tensor([[7, 8, 9, 20, 1]])
    backbone = trainer.trainer.backbone
    with torch.no_grad(), backbone.folded("policy"):
        expected = backbone("policy", ids, ids.bool(), start=1, temperature=1.0)[0]
        logits = AutoModelForCausalLM.from_pretrained("runs/from_trl/again")(ids).logits.log_softmax(-1)
    own = logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(own[:3], expected[0], rtol=0, atol=1e-4)


def test_the_reward_model_is_read_on_the_last_token_whatever_the_padding(models):
    model = AutoModelForSequenceClassification.from_pretrained("reward").eval()
    rows = [[7, 8, 9, 20, 1], [9, 24, 25, 26, 27]]  # the second was cut, and is closed by the loop
    ids, mask = left_pad([rows[0], [*rows[1], 1]], 0)
    ids[0], mask[0] = torch.tensor([*rows[0], 0]), torch.tensor([True] * 5 + [False])
    with torch.no_grad():
        found = reads_tokens(model)(Responses([], ["", ""], ids, mask, None, 2))
        alone = [
            float(model.score(model.model(torch.tensor([row])).last_hidden_state[0, -1])) for row in rows
        ]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    with pytest.raises(UserError, match="without a head `score`"):
        reads_tokens(AutoModelForCausalLM.from_pretrained("sft"))


def test_prompts_are_the_tokens_that_were_given(models):
    tokenizer = AutoTokenizer.from_pretrained("sft")
    options = {"max_prompt_tokens": 1, "max_response_tokens": 4}
    dialogue = GivenTokens(tokenizer, end_of_turn=tokenizer.eos_token, **options)
    rows = [
        {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [0, 20, 21, 22]},
        {"input_ids": [30]},
    ]
    prompts = dialogue.take(rows, "train_dataset")
    assert [dialogue.encode_prompt(prompt) for prompt in prompts] == [[7, 8], [20, 21, 22], [30]]
    with pytest.raises(UserError, match=r"train_dataset, row 1: no column input_ids \(prompt\)"):
        dialogue.take([{"prompt": "x"}], "train_dataset")


@pytest.mark.parametrize("pad", ["the EOS token", "beyond the model's embeddings"])
def test_the_padding_of_old_scripts_is_no_obstacle(models, pad):
    arguments = given(train_dataset=[{"input_ids": [7, 8]}, {"input_ids": [9]}])
    tokenizer = arguments["processing_class"]
    if pad == "the EOS token":
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id >= arguments["model"].config.vocab_size
    named = tokenizer.pad_token
    trainer = PPOTrainer(**arguments)
    trainer.train()
    trainer.save_model("runs/whole")
    assert AutoTokenizer.from_pretrained("runs/whole").pad_token == named


def given(**changed):
    """The arguments of a trainer, some of them changed."""
    tokenizer = AutoTokenizer.from_pretrained("sft")
    classifier = AutoModelForSequenceClassification.from_pretrained("reward")
    args = PPOConfig("runs/x", per_device_train_batch_size=2, total_episodes=2, response_length=4)
    usual = {
        "args": args, "processing_class": tokenizer, "ref_model": None,
        "model": AutoModelForCausalLM.from_pretrained("sft"),
        "reward_model": classifier, "value_model": classifier, "train_dataset": [{"input_ids": [7, 8]}],
    }  # fmt: skip
    return usual | changed


def test_with_a_peft_config_the_adapter_is_what_is_saved(models):
    from peft import LoraConfig

    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = PPOTrainer(**given(peft_config=lora))
    trainer.train()
    trainer.save_model("runs/adapter")
    kept = json.loads(Path("runs/adapter/adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"], sorted(kept["target_modules"])) == (2, 8, ["q_proj", "v_proj"])
    assert Path("runs/adapter/adapter_model.safetensors").is_file()
    assert Path("runs/adapter/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizers", (1, None), "optimizers has no counterpart here: AdamW"),
        ("callbacks", [object()], "callbacks has no counterpart here: metrics.jsonl"),
        ("data_collator", object(), "data_collator has no counterpart here: rows are padded"),
        ("train_dataset", [], "train_dataset has no rows"),
        ("ref_model", "changed", "ref_model differs from model"),
        ("peft_config", "dora", "use_dora has no counterpart"),
    ],
)
def test_what_would_be_ignored_is_refused(models, name, value, message):
    from peft import LoraConfig

    if value == "changed":
        value = AutoModelForCausalLM.from_pretrained("sft")
        with torch.no_grad():
            next(value.parameters()).add_(1.0)
    if value == "dora":
        value = LoraConfig(use_dora=True)
    with pytest.raises(UserError, match=message):
        PPOTrainer(**given(**{name: value}))


def test_the_arguments_come_from_a_command_line_as_they_did():
    line = (
        "--output_dir x --kl_coef 0.1 --stop_token eos --kl_estimator k3 --total_episodes 9 "
        "--whiten_rewards true --gradient_checkpointing false"
    )
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line.split())
    assert (args.kl_coef, args.stop_token, args.kl_estimator, args.total_episodes) == (0.1, "eos", "k3", 9)
    assert args.whiten_rewards
    assert not args.gradient_checkpointing
    with pytest.raises(UserError, match="max_steps=3 has no counterpart here: give total_episodes"):
        HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--output_dir", "x", "--max_steps", "3"])


# ---- the other way: our reward model and our functions in trl's trainers


@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_a_saved_reward_model_and_functions_of_a_file_train_with_trl(models, kind):
    import trl

    recipe = tiny_recipe("model.path=sft")
    dialogue = load_dialogue(recipe)
    model = new_reward_model(recipe, dialogue)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    card = RewardModelConfig("sft", 0.5, 1.0, dialogue.fingerprint(), "plain", 96, 8)
    save_reward_model(model, Path("runs/own/reward/model"), card, dialogue)
    ours, called = as_reward_func("runs/own/reward/model"), []

    def noted(prompts, completions, **columns):
        called.append((list(prompts), list(completions), ours(prompts, completions, **columns)))
        return called[-1][2]

    example = runpy.run_path(str(ROOT / "recipes/reward_functions.py"))
    args = getattr(trl, f"{kind}Config")(
        output_dir="runs/trl", per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
        max_steps=1, logging_steps=1, learning_rate=1e-3, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = ["the soup was", "a long walk"]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained("sft"), args=args,
        reward_funcs=[noted, example["brevity"], example["length_schedule"], example["right_answer"]],
        processing_class=AutoTokenizer.from_pretrained("sft", padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": prompts, "answer": ["1", "2"]}),
    )  # fmt: skip
    trainer.train()
    ((asked, said, scores),) = called
    assert sorted(set(asked)) == sorted(prompts)
    own = TextRewardModel(Path("runs/own/reward/model")).score([(Message("user", p),) for p in asked], said)
    assert scores == pytest.approx(own.tolist(), abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["rewards/noted/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert log["rewards/brevity/mean"] == pytest.approx(sum(example["brevity"](asked, said)) / 4, abs=1e-5)
