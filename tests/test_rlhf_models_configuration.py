"""What config.json says against a base ends every command within a second, in one line that is true."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROMPTS, ROOT, TINY

from rlhf.errors import UserError
from rlhf.models.configuration import check_base, context_window, fault_of_config, read_config
from rlhf.recipe.load import from_command_line


def config(folder, **fields):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mamba"}, "recurrent"),
        ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, "recurrent"),
        ({"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention"]}}, "recurrent"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, "recurrent"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "a LlamaForSeq"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]}, None),
        ({"model_type": "falcon", "alibi": False}, None),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, None),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, None),
        (
            {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "m.M"}},
            None,
        ),
        ({"model_type": "llama", "architectures": None, "layer_types": None}, None),
    ],
)
def test_what_cannot_be_trained_is_known_from_the_configuration(fields, reason, inside):
    config("m", **fields)
    fault = fault_of_config(read_config("m"))
    assert (fault is None) if reason is None else reason in fault


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32, "n_ctx": 16}, 32),
        ({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 4}, 8),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_window_is_read_under_any_name_and_of_the_text_part(fields, window, inside):
    config("m", **fields)
    assert context_window(read_config("m")) == window


def test_a_folder_without_a_configuration_is_looked_at_elsewhere_and_a_damaged_one_is_named(inside):
    check_base("some/hub-id", {"dialogue.max_prompt_tokens": 10**9})
    for content in ("{", "[1]", "[" * 100_000):
        config("m")
        Path("m/config.json").write_text(content)
        with pytest.raises(UserError, match=r"m/config\.json is damaged: "):
            check_base("m", {})


LONGER = r"up to \d+ tokens, and the model at m reads 64; lower it$"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dialogue.max_prompt_tokens=48", "dialogue.max_response_tokens=15"], None),
        (["dialogue.max_prompt_tokens=48", "dialogue.max_response_tokens=16"], r"up to 65 tokens.* reads 64"),
        (
            ["dialogue.max_prompt_tokens=48", "dialogue.max_response_tokens=15", "dialogue.end_of_context=x"],
            r"dialogue\.max_prompt_tokens \+ dialogue\.max_response_tokens: up to 65",
        ),
        (
            ["dialogue.max_prompt_tokens=8", "reward.max_response_tokens=56"],
            rf"^dialogue\.max_prompt_tokens \+ reward\.max_response_tokens: {LONGER}",
        ),
        (["distill={texts: [t.txt], max_tokens: 65}"], rf"^distill\.max_tokens: {LONGER}"),
        (
            ["ppo.ptx_texts=[t.txt]", "ppo.ptx_coef=1", "ppo.ptx_max_tokens=65"],
            rf"^ppo\.ptx_max_tokens: {LONGER}",
        ),
        (
            ["distill={texts: [t.txt], max_tokens: 9, teacher: b}"],
            r"^distill\.teacher: b \(bloom\) cannot be",
        ),
    ],
)
def test_the_longest_text_of_every_stage_fits_in_the_window(overrides, message, inside):
    config("m", model_type="llama", max_position_embeddings=64)
    config("b", model_type="bloom")
    Path("t.txt").write_text("some words\n")
    short = ["dialogue.max_prompt_tokens=8", "dialogue.max_response_tokens=8"]
    words = [str(TINY), *PROMPTS, "model.path=m", "model.source=hub", "hhh_prompt=t.txt", *short, *overrides]
    if message is None:
        from_command_line(words)
        return
    with pytest.raises(UserError, match=message):
        from_command_line(words)


def test_a_command_ends_at_once(inside):
    config("m", model_type="mamba", architectures=["MambaForCausalLM"])
    command = [sys.executable, "-m", "policy.ppo", str(TINY), *PROMPTS, "model.path=m", "model.source=hub"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2
    assert time.monotonic() - began < 5  # under 1 s where nothing else runs
    assert done.stderr.startswith(
        "error: model.path: m (mamba) cannot be trained here: it has recurrent layers"
    )
    assert done.stderr.count("\n") == 1
