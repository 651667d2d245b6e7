"""`make plan`: what is read before anything is loaded, what is said, what is refused."""

import contextlib
import json
import subprocess

import pytest
from conftest import ROOT, TINY, tiny_recipe
from safetensors.numpy import save_file

from rlhf.errors import UserError
from rlhf.plan import __main__ as plan_command
from rlhf.plan import check, memory
from rlhf.plan.lengths import Lengths, lengths_of
from rlhf.plan.machine import Machine, machine, size_of
from rlhf.plan.remedies import remedies, together
from rlhf.plan.report import fits
from rlhf.plan.shapes import PUBLISHED, Known, shape_of, stored_weights
from rlhf.plan.stages import plan
from rlhf.plan.timing import Pace, step_seconds
from rlhf.recipe.load import load
from rlhf.recipe.schema import Model, Recipe

LENGTHS = Lengths(512, 2, 1000, measured=False)
QWEN = PUBLISHED["qwen3-8b"]


def big(**sections):
    """A recipe over an 8B model that is nowhere here."""
    values = {
        "name": "big",
        "model": {"path": "Qwen/Qwen3-8B", "dtype": "bfloat16"},
        "data": {"comparisons": "x"},
    }
    return Recipe.model_validate(values | sections)


def largest(recipe, world=1, gpu=True):
    return plan(recipe, QWEN, LENGTHS, gpu=gpu, world=world).largest()


def total(recipe, world=1):
    return largest(recipe, world).parts.total


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("24g", 24e9), ("512MB", 512e6), ("25000000000", 25e9)],
)
def test_a_size_is_read(text, expected):
    assert size_of(text, "GPU") == expected


@pytest.mark.parametrize("text", ["24 bananas", "0GB", "-1GB", "GB", "24"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="write a size of memory, such as GPU=24GB"):
        machine({"GPU": text})


def test_processes_share_a_machine_and_not_a_gpu():
    alone, two = machine({"GPU": "none", "PROCS": "1"}), machine({"GPU": "none", "PROCS": "2"})
    assert two.bytes == alone.bytes / 2
    many = machine({"GPU": "80GB", "PROCS": "8", "NODES": "2"})
    assert (many.bytes, many.world, many.gpu) == (80e9, 16, True)
    with pytest.raises(UserError, match="NODES=none must be a number"):
        machine({"GPU": "80GB", "NODES": "none"})


def test_a_host_file_says_how_many_machines_and_processes(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("a slots=4\nb slots=4\nc slots=4\n")
    found = machine({"GPU": "80GB", "HOSTFILE": str(file), "PROCS": ""})
    assert (found.processes, found.nodes, found.world) == (4, 3, 12)
    file.write_text("a slots=4\nb slots=1\n")
    found = machine({"GPU": "none", "HOSTFILE": str(file)})
    assert (found.world, found.processes) == (5, 4), "the fullest machine has least for each"
    assert found.words.endswith("4 processes on each of 2 machines at most, 5 in all, "
                                f"{found.bytes / 1e9:.1f} GB a process")  # fmt: skip
    for name in ("PROCS", "NODES"):
        with pytest.raises(
            UserError, match=f"^{name}: the hosts and slots of HOSTFILE say it; leave {name} out"
        ):
            machine({"HOSTFILE": str(file), name: "2"})


def test_a_shape_comes_from_the_folder_the_cache_or_what_is_published(tmp_path, monkeypatch):
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 11,
        "head_dim": 16,
    }
    text = json.dumps(sizes)
    snapshot = tmp_path / "hub" / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    own = shape_of(Model(path=str(tmp_path))).shape
    assert (own.layers, own.hidden, own.intermediate, own.attention, own.kv) == (3, 8, 32, 32, 32)
    model = Model(path="meta-llama/Llama-3.1-8B")
    assert shape_of(model).shape == PUBLISHED["llama-3.1-8b"]
    assert shape_of(Model(path="meta-llama/Meta-Llama-3-70B-Instruct")).shape == PUBLISHED["llama-3.1-70b"]
    (snapshot / "config.json").write_text(text)
    assert shape_of(model).shape == own
    with pytest.raises(UserError, match="who/knows is not in place and its shape is not known here"):
        shape_of(Model(path="who/knows"))


def test_weight_files_are_read_by_their_headers(tmp_path):
    import numpy as np

    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(2, np.float16)}, tmp_path / "m.safetensors")
    assert stored_weights(tmp_path) == (64, "float32")
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"m.safetensors is damaged"):
        stored_weights(tmp_path)


def test_each_way_to_save_memory_saves_it():
    """Against figures worked out by hand where there are any."""
    recipe = big()
    setting = memory.Setting("bfloat16", "none", gpu=True)
    assert memory.weights(QWEN, setting)[0] == 2 * 8190735360
    nf4 = memory.weights(QWEN, setting._replace(quantization="nf4"))[0]
    assert nf4 == pytest.approx((8190735360 - 2 * 151936 * 4096) * 0.5625 + 2 * 2 * 151936 * 4096, rel=1e-3)
    assert memory.kv_cache(QWEN, 1, 1, setting) == 147456  # 36 layers, 8 heads of 128, keys and values
    for change in (
        {"model": {"path": "x", "dtype": "bfloat16", "gradient_checkpointing": True}},
        {"model": {"path": "x", "dtype": "bfloat16", "quantization": "nf4"}},
        {"ppo": {"micro_batch_size": 1, "rollout_batch_size": 8}},
        {"lora": {"layers": "top_8"}},
        {"dialogue": {"max_response_tokens": 16}},
    ):
        assert total(big(**change)) < total(recipe), change
    sharded = [memory.learning(1000, setting._replace(zero=stage, world=8), bucket=10) for stage in range(4)]
    assert sharded == [(4000, 8000), (4040, 1500), (540, 1500), (540, 1500)]
    offloaded = setting._replace(zero=2, world=8, offload_optimizer=True)
    assert memory.learning(1000, offloaded, bucket=10) == (540, 0)
    update = [m for m in plan(big(distributed={"zero_stage": 3}), QWEN, LENGTHS, gpu=True, world=8).moments
              if (m.stage, m.name) == ("ppo", "update")]  # fmt: skip
    assert update[0].parts.weights == pytest.approx(8190735360 * 2 / 8)


def rows_of(stage, lengths=LENGTHS, **sections):
    moments = plan(big(**sections), QWEN, lengths, gpu=True, world=1).moments
    return {m.name: m.parts for m in moments if m.stage == stage}


def test_card_and_tax_have_rows_where_the_recipe_runs_them():
    """Against figures worked out by hand."""
    token, head = 147456, 2 * 151936 * 4096  # bytes of a token's keys and values, and of a vocabulary head
    whole = 2 * 8190735360
    card = rows_of("card", reward={"layers": 18}, card={"outliers": ["x"]})
    assert [*card] == ["scoring", "outliers"]
    half = (whole - 2 * head - 2 * 4096) / 2 + head + 2 * 4096  # of the layers, with an embedding and a norm
    assert card["scoring"].weights == half
    assert card["outliers"].states == 4096 * 18 * 4096 * 2
    assert rows_of("card", ppo={"rewards": [{"judge": "vader"}]}) == rows_of("tax") == {}
    tax = {"score": True, "reward_model_hhh": True, "tasks": {"hhh": "x"}, "interpolate": []}
    found = rows_of("tax", LENGTHS._replace(context=1000), tax=tax, reward={"members": 3})
    assert [*found] == ["reading items", written := "reading prompts", "judging"]
    rows, room = 9, 1000 + 512 + 128 + 1  # 8 times 2048 tokens hold nine such rows
    assert (found[written].kv_cache, found[written].states) == (rows * room * token, 1000 * token)
    assert found["judging"].weights == 3 * (whole - head)
    few = rows_of("tax", tax=tax, evaluate={"prompts": 5})
    assert few[written].kv_cache == 5 * 641 * token


def test_what_a_task_of_lm_eval_has_written_is_in_the_plan():
    token = 147456
    tax = {"tasks": {"gsm8k": {"limit": 9}, "ifeval": {}, "arc_easy": {}}, "interpolate": []}
    found = rows_of("tax", tax=tax)
    assert {name: parts.kv_cache for name, parts in found.items()} == {
        "reading items": 0,
        "reading prompts of gsm8k": 9 * (512 + 256 + 1) * token,  # its file says nothing of the length
        "reading prompts of ifeval": 9 * (512 + 1280 + 1) * token,  # 8 times 2048 tokens hold nine
    }


def test_nothing_is_folded_or_reordered_in_compiled_blocks():
    maps = QWEN.layers * QWEN.layer_weights()  # every layer has an adapter
    for compiled, folded in ((False, 4 * maps), (True, 0)):
        model = {"path": "x", "dtype": "float32", "compile": compiled}
        moments = plan(big(model=model), QWEN, LENGTHS, gpu=False, world=1).moments
        copies = {m.name: m.parts.copies for m in moments if m.stage == "ppo"}
        head = 4 * QWEN.vocabulary * QWEN.hidden
        sampling = {"reading prompts": 0} if compiled else {"sampling": 2 * folded + head}
        assert copies == sampling | {"update": folded}, compiled


def test_the_prompt_counts_where_a_variant_of_the_tax_table_runs_behind_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("a" * 77)
    tax = "tax={score: true, variants: %s}"
    for variants, tokens in (("null", 77), ("[base, policy_prompted]", 77), ("[base, policy]", 0)):
        recipe = tiny_recipe("hhh_prompt=prompt.txt", tax % variants)
        assert lengths_of(recipe).context == tokens, variants
    assert lengths_of(tiny_recipe("hhh_prompt=prompt.txt")).context == 0


def test_the_remedies_are_valid_fit_and_begin_with_what_changes_no_result():
    recipe = big()
    found = remedies(recipe, largest, world=1)
    needs = [remedy.largest.parts.total for remedy in found]
    assert needs == sorted(needs)
    assert 0 < needs[-1] < total(recipe)
    assert any("model.gradient_checkpointing=true" in remedy.overrides for remedy in found)
    combined = together(recipe, largest, world=1, limit=24e9)
    assert combined.largest.parts.total <= 24e9
    keys = [override.partition("=")[0] for override in combined.overrides]
    assert "ppo.micro_batch_size" in keys
    assert not any(key.startswith("dialogue.") for key in keys)
    assert together(recipe, largest, world=1, limit=1e9) is None


def test_a_plan_that_fits_ends_well_and_one_that_does_not_says_what_would_help(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU", "24GB")
    check.show(tiny_recipe())
    text = capsys.readouterr().out
    assert "| stage | largest at |" in text
    assert "it fits" in text
    with pytest.raises(UserError, match=r"plan: .* of 24\.0 GB, .* does not fit"):
        check.show(big())
    text = capsys.readouterr().out
    assert "model.quantization=nf4" in text
    assert "| yes |" in text


@pytest.mark.parametrize(("policy", "refused"), [("refuse", True), ("warn", False), ("off", False)])
def test_a_run_that_cannot_fit_is_refused_as_the_recipe_says(tmp_path, capsys, monkeypatch, policy, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU", "80GB")  # which speaks of another machine
    monkeypatch.setattr("rlhf.plan.machine.gpu_bytes", lambda: [24 << 30])
    if refused:
        with pytest.raises(UserError, match=r"does not fit .* set plan=warn to start all the same"):
            check.before_a_run(big(plan=policy))
    else:
        check.before_a_run(big(plan=policy))
    assert ("gradient_checkpointing" in capsys.readouterr().out) == (policy != "off")


def test_within_its_own_error_a_plan_refuses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    need = check.planned(big(), Machine(True, 1.0, 1, 1, "x")).plan.largest().parts.total
    card = int(need * 0.9 * 2**30 / 1e9)
    monkeypatch.setattr("rlhf.plan.machine.gpu_bytes", lambda: [card])
    check.before_a_run(big())
    assert "does not fit" in capsys.readouterr().out


FLASH, LIGER = "model.attn_implementation=flash_attention_2", "model.use_liger_kernel=true"


@pytest.mark.parametrize(
    ("gpu", "options", "refused"),
    [
        ("none", [FLASH, "model.dtype=bfloat16"], "flash_attention_2 needs a GPU"),
        ("none", [LIGER], "use_liger_kernel needs a GPU"),
        ("24GB", [FLASH], "computes in half types"),
        ("24GB", [FLASH, LIGER, "model.dtype=auto"], None),
        ("here", [FLASH, "model.dtype=auto"], "flash_attention_2 needs flash_attn"),
        ("here", [LIGER], "pip install liger-kernel"),
    ],
)
def test_kernels_are_refused_as_the_first_stage_would(gpu, options, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU", gpu.removeprefix("here"))
    cards = [] if gpu == "none" else [24 << 30]
    monkeypatch.setattr("rlhf.plan.machine.gpu_bytes", lambda: cards)  # asked for where none is named
    for told in (check.show, check.before_a_run)[: 1 if gpu == "24GB" else 2]:
        with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
            told(tiny_recipe(*options))


PAGED = "ppo.optimizer=paged_adamw_8bit"


@pytest.mark.parametrize(
    ("cards", "processes", "options", "refused"),
    [
        (1, "8", [PAGED, "distributed.zero_stage=2"], "does not go with ZeRO 2; use zero_stage 0"),
        (1, "1", [PAGED, "distributed.zero_stage=2"], None),
        (1, "8", [PAGED, "distributed.zero_stage=0"], None),
        (0, "1", [PAGED], "needs a CUDA GPU"),
    ],
)
def test_an_optimizer_is_refused_before_hours_of_other_stages(
    cards, processes, options, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROCS", processes)
    monkeypatch.setattr("rlhf.plan.machine.gpu_bytes", lambda: [24 << 30] * cards)
    for told in (check.show, check.before_a_run):
        with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
            told(tiny_recipe(*options))


def test_the_texts_of_ppo_ptx_are_read_in_one_pass_whatever_the_micro_batch():
    def need(batch, tokens):
        ptx = {"ptx_coef": 1, "ptx_texts": ["x"], "ptx_batch_size": batch, "ptx_max_tokens": tokens}
        return total(big(ppo=ptx))

    few = total(big(ppo={}))
    assert need(1, 8) == few
    assert need(8, 4096) > 2 * few
    assert need(16, 4096) == pytest.approx(2 * need(8, 4096), rel=0.6)


def test_the_heap_keeps_what_is_small_of_a_training_that_has_ended():
    def again(tokens, gpu=False):
        recipe = tiny_recipe(f"reward.tokens_per_micro_batch={tokens}", "reward.batch_size=512")
        made = plan(recipe, PUBLISHED["smollm2-135m"], Lengths(400, 2, 512, True), gpu=gpu, world=1)
        found = {m.name: m.parts.activations for m in made.moments if m.stage == "reward"}
        return found.get("loading again", 0.0), found["training"]

    (few, trained), (many, more) = again(1000), again(20_000)
    assert 0.5 * trained < few < trained
    assert (many, more > trained) == (0.0, True), "tensors above 32 MiB are given back"
    assert again(1000, gpu=True)[0] == 0.0


def test_files_of_another_type_are_in_memory_while_they_are_read():
    recipe, shape = tiny_recipe("model.dtype=bfloat16"), PUBLISHED["smollm2-135m"]
    lengths = Lengths(16, 2, 8, True)
    made = [plan(recipe, shape, lengths, gpu=False, world=1, converted=size) for size in (0.0, 538e6)]
    again = [next(m for m in p.moments if m.name == "loading again").parts.total for p in made]
    assert again[1] - again[0] == 538e6


def test_only_files_of_another_type_are_counted_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def again(stored_dtype):
        known = Known(PUBLISHED["smollm2-135m"], "x", 538_000_000, stored_dtype)
        monkeypatch.setattr(check, "shape_of", lambda model: known)
        made = check.planned(tiny_recipe("model.dtype=bfloat16"), machine({"GPU": "none"})).plan
        return next(m for m in made.moments if m.name == "loading again").parts.total

    assert again("float32") - again("bfloat16") == 538e6
    assert again("") == again("bfloat16")


def test_time_is_that_of_this_machine_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan", str(TINY), "time=true"])
    monkeypatch.setenv("GPU", "80GB")
    with pytest.raises(UserError, match="GPU speaks of another; leave one of them out"):
        plan_command.main()
    assert capsys.readouterr().out == ""


def test_yaml_reads_off_as_false():
    assert load(TINY, ["plan=off"]).plan == "off"


@pytest.mark.slow
def test_the_command_ends_with_2_where_it_does_not_fit(tmp_path):
    command = f"make --no-print-directory plan RECIPE=recipes/tiny.yaml SET=name={tmp_path.name[:20]}".split()
    for gpu, status in (("1GB", 0), ("1kB", 2)):
        done = subprocess.run([*command, f"GPU={gpu}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr


def stated(recipe):
    """What a recipe's header says of its machine: the words behind `Plan:`."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    words = next((line.partition("Plan:")[2].split() for line in lines if line.startswith("# Plan:")), None)
    return dict(word.split("=") for word in words or ["GPU=none", "PROCS=1"])


SHIPPED = sorted(p for p in (ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_fits_the_machine_that_it_is_for(file, monkeypatch):
    monkeypatch.setattr("rlhf.recipe.load.files_of", lambda spec: [spec])  # data may be elsewhere
    monkeypatch.chdir(ROOT)
    words = stated(file)
    here = machine(words)
    if not here.gpu:
        here = here._replace(bytes=16e9)
    recipe = load(str(file.relative_to(ROOT)))
    monkeypatch.undo()
    found = check.planned(recipe, here)
    assert fits(found.plan.largest(), here), found.plan.largest()


def test_some_recipes_are_for_gpus():
    assert sum("GPU" in stated(file) and stated(file)["GPU"] != "none" for file in SHIPPED) >= 5


def test_a_step_is_read_once_for_all_members_where_their_weights_are_averaged():
    pace = Pace(0.0, 1.0, 0.0)  # a second a token and pass; policy, reference, value and reward read
    mean, average = (
        step_seconds(tiny_recipe("reward.members=3", f"ppo.ensemble={how}"), pace, 5)
        for how in ("mean", "average")
    )
    assert average == step_seconds(tiny_recipe(), pace, 5)
    assert mean / average == pytest.approx(6 / 4)
