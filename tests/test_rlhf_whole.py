"""What a finished stage left is looked at before it is read again; damage is one line with the file."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, noted_anew, stage, tiny_recipe

from rlhf.errors import UserError
from rlhf.runs import verify
from rlhf.runs.artifacts import MANIFEST, fault_of, read_json, write_manifest
from rlhf.runs.stage import open_stage
from rlhf.runs.whole import READ, STAGES, check_place

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
MODEL = (WEIGHTS, SETTINGS, "reward_model.json")
LEFT = {
    "comparisons": ("train.jsonl", "held_out.jsonl", "prompts.jsonl", "held_out_prompts.jsonl"),
    "sft": (f"policy/{WEIGHTS}", f"policy/{SETTINGS}", "policy/tokenizer.json"),
    "distill": (f"policy/{WEIGHTS}", f"policy/{SETTINGS}", "teacher/shard-00000.npy"),
    "pmp": tuple(f"model/{name}" for name in MODEL),
    "reward": tuple(f"{model}/{name}" for model in ("model", "model-1") for name in MODEL),
    "ppo": (f"policy/{WEIGHTS}", f"policy/{SETTINGS}", f"value/{WEIGHTS}", f"policy_last/{WEIGHTS}"),
    "dpo": (f"policy/{WEIGHTS}", f"policy/{SETTINGS}"),
    "card": ("card.json", "card.md"),
    "evaluate": ("summary.md",),
}
UNREAD = ("teacher/shard-00000.npy", f"value/{WEIGHTS}", f"policy_last/{WEIGHTS}")
SFT = ("sft.data=chosen",)
DPO = ("dpo.beta=0.2",)
DISTILL = ("distill.text_share=0", f"hhh_prompt={ROOT}/recipes/prompts/hhh.txt")
PMP = (f"pmp.sources=[{{files: {ROOT}/recipes/tiny/comparisons.jsonl}}]",)
TAX = (
    f"tax.tasks.lm_loss.files={ROOT}/recipes/tiny/texts.jsonl",
    f"hhh_prompt={ROOT}/recipes/prompts/hhh.txt",
)
HHH = f"tax.tasks.hhh={ROOT}/recipes/tiny/hhh_helpful.json"
TOXICITY = f"tax.tasks.toxicity.files={ROOT}/recipes/prompts/sentiment_held_out.jsonl"
JUDGE = "evaluate.reward_model=runs/other/reward/model"
MAINS = {
    "sft": "policy.sft",
    "distill": "policy.distillation",
    "pmp": "reward.pretraining",
    "reward": "reward.training",
    "ppo": "policy.ppo",
    "dpo": "policy.dpo",
    "card": "reward.card",
    "evaluate": "policy.evaluate",
    "tax": "policy.alignment_tax",
}
SUCCESSORS = [  # of each stage, whoever reads it
    ("comparisons", "sft", SFT),
    ("comparisons", "distill", DISTILL),
    ("comparisons", "reward", ()),
    ("comparisons", "ppo", ()),
    ("comparisons", "card", ()),
    ("comparisons", "evaluate", ()),
    ("comparisons", "tax", (*TAX, "tax.score=true")),
    ("sft", "distill", (*SFT, *DISTILL, "distill.start=sft")),
    ("sft", "pmp", (*SFT, *PMP, "pmp.start=sft")),
    ("sft", "reward", (*SFT, "reward.start=sft")),
    ("sft", "ppo", (*SFT, "ppo.start=sft")),
    ("sft", "tax", (*SFT, *TAX)),
    ("distill", "reward", (*DISTILL, "reward.start=distill")),
    ("distill", "ppo", (*DISTILL, "ppo.start=distill")),
    ("distill", "evaluate", (*DISTILL, "ppo.start=distill")),
    ("pmp", "reward", PMP),
    ("reward", "ppo", ()),
    ("reward", "card", ()),
    ("reward", "evaluate", ()),
    ("reward", "tax", (*TAX, "tax.reward_model_hhh=true", HHH)),
    ("comparisons", "dpo", DPO),
    ("sft", "dpo", (*SFT, "dpo.start=sft")),
    ("ppo", "evaluate", ()),
    ("dpo", "evaluate", (*DPO, "evaluate.policy=dpo")),
    ("ppo", "tax", TAX),
]


def named(value):
    """Names of cases: the words, without the overrides."""
    return value if isinstance(value, str) else ""


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def replaced(file):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "flipped": flipped,
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
    "replaced": replaced,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in which every stage but the tax table seems to have finished, and a second one of its kind."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("tiny", "other"):
            for made, files in LEFT.items():
                run = open_stage(tiny_recipe(f"name={name}"), made)
                for file in files:
                    (run.folder / file).parent.mkdir(exist_ok=True)
                    settings = {"r": 4, "lora_alpha": 8, "file": file}
                    (run.folder / file).write_text(json.dumps(settings) + "\n")
                run.finish({})
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A copy of it as the current folder."""
    shutil.copytree(whole, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def refusal(name, *overrides):
    """The line with which a stage that has not been done refuses to begin."""
    shutil.rmtree(f"runs/tiny/{name}", ignore_errors=True)
    with pytest.raises(UserError) as caught:
        stage(importlib.import_module(f"{MAINS[name]}.__main__").main, *overrides)
    assert not Path(f"runs/tiny/{name}").exists()
    return str(caught.value)


def assert_named(line, file, kind):
    what = {"deleted": "is missing", "replaced": "is a folder, and was a file"}.get(kind, "is damaged")
    made = file.parents[1] if file.parent.name not in LEFT else file.parent
    assert line.startswith(f"{file} {what}")
    assert line.endswith(f"remove {made} and run `make {made.name} RECIPE=...` for that run again")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(("parent", "name", "overrides"), SUCCESSORS, ids=named)
def test_a_successor_names_the_damaged_file_of_its_parent(here, parent, name, overrides, kind):
    folder = Path("runs/tiny") / parent
    for file in [folder / file for file in LEFT[parent] if file not in UNREAD]:
        before = file.read_bytes()
        DAMAGES[kind](file)
        assert_named(refusal(name, *overrides), file, kind)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(
    ("name", "overrides", "file"),
    [
        ("ppo", ("ppo.reward_model=runs/other/reward/model-1",), "reward/model-1"),
        ("ppo", ("ppo.start=runs/other/sft/policy",), "sft/policy"),
        ("reward", ("reward.start=runs/other/pmp/model",), "pmp/model"),
        ("pmp", (*PMP, "pmp.start=runs/other/pmp/model"), "pmp/model"),
        ("sft", (*SFT, "sft.start=runs/other/distill/policy"), "distill/policy"),
        ("distill", (*DISTILL, "distill.start=runs/other/sft/policy"), "sft/policy"),
        ("distill", (*DISTILL, "distill.teacher=runs/other/ppo/policy"), "ppo/policy"),
        ("card", ("card.model=runs/other/reward/model",), "reward/model"),
        ("card", ("card.against=runs/other/reward/model",), "reward/model"),
        ("evaluate", ("evaluate.judge=reward", JUDGE), "reward/model"),
        ("evaluate", ("ppo.reward_model=runs/other/reward/model",), "reward/model"),
        ("evaluate", ("ppo.start=runs/other/sft/policy",), "sft/policy"),
        ("tax", (*TAX, "tax.models={mine: runs/other/ppo/policy}"), "ppo/policy"),
        (
            "tax",
            (*TAX, TOXICITY,
             "tax.toxicity.judge=runs/other/reward/model"),
            "reward/model",
        ),
    ],
    ids=named,
)  # fmt: skip
def test_a_folder_that_the_recipe_names_is_compared_with_its_manifest(here, name, overrides, file, kind):
    for each in (WEIGHTS, SETTINGS):
        damaged = Path("runs/other") / file / each
        before = damaged.read_bytes()
        DAMAGES[kind](damaged)
        assert_named(refusal(name, *overrides), damaged, kind)
        if damaged.is_dir():
            damaged.rmdir()
        damaged.write_bytes(before)


def test_a_data_file_of_another_run_is_compared_with_its_manifest(here):
    file = Path("runs/other/comparisons/held_out.jsonl")
    flipped(file)
    assert_named(refusal("card", f"card.comparisons={file}"), file, "flipped")
    assert_named(refusal("pmp", f"pmp.sources=[{{files: {file}}}]"), file, "flipped")


def test_only_what_is_read_is_looked_at(here):
    for file in ("distill/teacher/shard-00000.npy", f"ppo/value/{WEIGHTS}", "sft/recipe.yaml"):
        flipped(Path("runs/tiny") / file)
    shutil.rmtree("runs/tiny/card")
    recipe = tiny_recipe()
    for name in ("distill", "ppo", "sft"):
        check_place(f"runs/tiny/{name}/policy")
    assert open_stage(recipe, "card", parents=tuple(READ)) is not None


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "flipped", "folder"])
def test_a_damaged_manifest_is_one_line_for_the_stage_and_its_successors(here, content):
    file = Path("runs/tiny/comparisons") / MANIFEST
    if content == "flipped":
        file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))
    elif content == "folder":
        replaced(file)
    else:
        file.write_text(content)
    lines = [] if content == "folder" else [refusal("ppo")]  # which is as if it were not there
    with pytest.raises(UserError) as caught:
        open_stage(tiny_recipe(), "comparisons")
    for line in (*lines, str(caught.value)):
        assert line.startswith(f"{file} is damaged; remove runs/tiny/comparisons and run `make comparisons")


def test_a_manifest_without_a_checksum_is_one_of_an_earlier_version(here):
    file = Path("runs/tiny/comparisons") / MANIFEST
    file.write_text(json.dumps({key: x for key, x in read_json(file).items() if key != "checksum"}))
    assert open_stage(tiny_recipe(), "comparisons") is None
    assert fault_of(file.parent) is None


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", LEFT)
def test_a_stage_is_done_already_only_if_its_files_are_whole(here, capsys, name, kind):
    file = Path("runs/tiny", name, LEFT[name][-1])
    assert open_stage(tiny_recipe(), name) is None
    assert "done already" in capsys.readouterr().out
    DAMAGES[kind](file)
    with pytest.raises(UserError) as caught:
        open_stage(tiny_recipe(), name)
    assert str(caught.value).startswith(f"{file} is")
    assert "done already" not in capsys.readouterr().out


def test_folders_that_no_stage_made_pass(inside):
    for name, content in {
        "web": '{"name": "x"}',
        "files": '{"files": {"a": "b"}}',
        "text": "nothing",
    }.items():
        (inside / name / "model").mkdir(parents=True)
        (inside / name / MANIFEST).write_text(content)
        check_place(f"{name}/model")
    check_place("owner/name")
    check_place("web")
    check_place("files")


def test_the_weights_of_the_base_model_are_looked_at_by_every_stage(here):
    model = Path("models/tiny")
    model.mkdir(parents=True)
    for name in ("model.safetensors", "chat_template.jinja"):
        (model / name).write_text("made by make model")
    write_manifest(model, {"source": "random"})
    (model / "chat_template.jinja").write_text("edited")
    check_place(model)
    flipped(model / "model.safetensors")
    line = refusal("ppo")
    assert line.startswith("models/tiny/model.safetensors is damaged: ")
    assert line.endswith("remove models/tiny and run `make model RECIPE=...` again")


# --- make verify -----------------------------------------------------------------------------------------


def verified(capsys, *overrides):
    """Exit status of the command, and its lines by stage."""
    status = 0
    try:
        stage(verify.main, *overrides)
    except SystemExit as end:
        status = end.code
    return status, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_a_whole_run_is_verified_with_one_line_a_stage(here, capsys):
    status, lines = verified(capsys)
    assert status == 0
    assert list(lines) == list(LEFT) == [name for name in STAGES if name != "tax"]
    assert all(line.startswith("whole (") for line in lines.values())
    assert lines["comparisons"].startswith("whole (6 files")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", LEFT)
def test_verify_names_what_is_damaged_in_any_stage(here, capsys, name, kind):
    file = Path("runs/tiny", name, LEFT[name][-1])
    DAMAGES[kind](file)
    status, lines = verified(capsys)
    assert status == 2
    assert [stage for stage, line in lines.items() if not line.startswith("whole")] == [name]
    assert_named(lines[name].removeprefix("damaged: "), file, kind)


def test_verify_names_what_is_missing_and_what_was_made_from_something_else(here, capsys):
    shutil.rmtree("runs/tiny/reward")
    (Path("runs/tiny/ppo") / MANIFEST).unlink()
    shutil.rmtree("runs/tiny/pmp")  # not in this recipe
    made = open_stage(tiny_recipe("name=late"), "comparisons")
    made.finish({})
    child = open_stage(tiny_recipe("name=late"), "reward", parents=("comparisons",))
    child.finish({})
    status, lines = verified(capsys)
    assert status == 2
    assert "pmp" not in lines
    assert lines["reward"] == "missing: runs/tiny/reward is not there: run `make reward RECIPE=...`"
    assert lines["ppo"] == "missing: runs/tiny/ppo is begun and not finished: run `make ppo RECIPE=...`"
    (made.folder / "train.jsonl").write_text("{}\n")
    noted_anew(made.folder)
    _, lines = verified(capsys, "name=late")
    assert lines["reward"].startswith("outdated: runs/late/reward was made from another comparisons stage; ")
