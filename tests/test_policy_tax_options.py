"""The tax stage: every option changes what it says it does, and every mistake is told in one line."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_tax
from conftest import noted_anew, stage
from tiny_tax import SHORT, TASKS, TEXTS, again, items, lines, responses, table, task_of

from policy.alignment_tax import __main__ as tax
from policy.alignment_tax import run as tax_work
from reward.model.model import TextRewardModel
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.evals.outcome import Outcome
from rlhf.evals.sandbox import run as sandbox
from rlhf.recipe.keys import RENAMED
from rlhf.runs.artifacts import hash_of
from rlhf.runs.stage import input_hashes

ALONE = "tax.variants=[base]"
REWARD = "runs/tiny/reward/model"


pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def plain(tax_lab, tmp_path_factory):
    """What the base writes to the toxicity prompts, and its table, with no option set."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(tax_lab, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = again(ALONE, tasks=["toxicity"])
        return found, said_by("base")


def said_by(variant):
    return [row["variants"][variant]["responses"] for row in responses()]


# --- toxicity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["max_new_tokens=3", "temperature=0.2", "top_p=0.2"])
def test_what_is_written_follows_the_options(option, here, plain):
    again(ALONE, f"tax.toxicity.{option}", tasks=["toxicity"])
    said = said_by("base")
    assert said != plain[1]
    if "max" in option:
        assert max(len(texts[0]) for texts in said) <= 3 < max(len(texts[0]) for texts in plain[1])


def test_results_are_kept_under_the_keys_of_earlier_versions(here):
    again(ALONE, "tax.cache=kept", tasks=["toxicity"])
    (file,) = Path("kept").glob("base--toxicity--written--*")
    key, made_with = json.loads(file.read_text())["key"]
    assert key.keys() == {"arm", "files", "limit", "items", "seed", "asked"}
    assert key["asked"].keys() == {"samples", "max_new_tokens", "temperature", "top_p", "items"}
    assert {"torch", "transformers", "peft", "lm_eval"} < made_with.keys()
    assert file.name == f"base--toxicity--written--{hash_of([key, made_with])[:16]}.json"


def test_several_samples_are_taken_and_the_worst_is_known(here):
    found = again(
        ALONE, "tax.toxicity.samples_per_prompt=3", f"tax.toxicity.judge={REWARD}", tasks=["toxicity"]
    )
    assert [len(texts) for texts in said_by("base")] == [3] * len(tiny_tax.TOXIC)
    for row in items():
        assert row["values"]["worst"]["base"] < row["values"]["score"]["base"]
    assert "3 responses" in task_of(found, "toxicity")["notes"][1]


def test_a_reward_model_judges_prompt_and_response(here, plain):
    found = again(ALONE, f"tax.toxicity.judge={REWARD}", tasks=["toxicity"])
    assert said_by("base") == plain[1]  # another judge, the same texts
    model = TextRewardModel(Path(REWARD))
    prompts = [(Message("user", text),) for text in tiny_tax.TOXIC]
    expected = model.score(prompts, [texts[0] for texts in plain[1]]).tolist()
    assert [row["values"]["score"]["base"] for row in items()] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 1
    middle = sorted(expected)[2]
    for higher in ("true", "false"):  # the middle one is flagged from both sides
        found = again(
            ALONE,
            f"tax.toxicity.judge={REWARD}",
            f"tax.toxicity.threshold={middle}",
            f"tax.toxicity.higher_is_better={higher}",
            tasks=["toxicity"],
        )
        task = task_of(found, "toxicity")
        assert task["higher_is_better"] == (higher == "true")
        assert task["variants"]["base"]["metrics"]["flagged"]["mean"] == pytest.approx(3 / 5, abs=0.21)


# --- score -----------------------------------------------------------------------------------------------


def test_the_score_is_that_of_the_reward_model_where_that_is_the_judge(here):
    found = again("tax.variants=[base,sft]", "tax.score=true", "evaluate.judge=reward", tasks=[])
    task = task_of(found, "score")
    model = TextRewardModel(Path(REWARD))
    prompts = [(Message("user", row["prompt"]),) for row in responses()]
    assert [p[0].content for p in prompts] == tiny_tax.HELD_OUT[:5]
    for variant in ("base", "sft"):
        expected = model.score(prompts, [texts[0] for texts in said_by(variant)])
        assert task["variants"][variant]["mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert "judged by a reward model" in task["notes"][0]


def test_a_function_of_a_file_judges_and_without_any_judge_there_is_no_score(here):
    judge = Path("own.py")
    judge.write_text("def size(completions, **kwargs):\n    return [len(text) for text in completions]\n")
    options = ("tax.variants=[base,sft]", "tax.score=true", "tax.cache=kept", "evaluate.judge=own.py:size")
    found = again(*options, tasks=[])
    for variant in ("base", "sft"):
        expected = [len(texts[0]) for texts in said_by(variant)]
        assert task_of(found, "score")["variants"][variant]["mean"] == pytest.approx(sum(expected) / 5)
    assert "judged by own.py:size" in task_of(found, "score")["notes"][0]
    judge.write_text(judge.read_text().replace("len(text)", "-len(text)"))
    with pytest.raises(UserError, match=r"data file own\.py"):
        stage(tax.main, *SHORT, *options)
    changed = again(*options, tasks=[])  # another file of that name is another judge, whatever is kept
    assert task_of(changed, "score")["variants"]["base"]["mean"] < 0
    with pytest.raises(
        UserError, match=r"tax\.score: evaluate\.judge=reward, and ppo\.rewards has no reward mo"
    ):
        again(ALONE, "tax.score=true", "evaluate.judge=reward", "ppo.rewards=[{judge: vader}]", tasks=[])


def test_the_score_takes_its_settings_from_evaluate_and_a_finished_one_knows_them(here):
    options = (ALONE, "tax.score=true", "evaluate.samples_per_prompt=2", "evaluate.temperature=0.5")
    again(*options, "evaluate.prompts=3", tasks=[])
    assert [len(texts) for texts in said_by("base")] == [2, 2, 2]
    as_an_earlier_version_left_it()
    stage(tax.main, *SHORT, *options, "evaluate.prompts=3")
    with pytest.raises(UserError, match="finished with other settings of the section `evaluate`"):
        stage(tax.main, *SHORT, *options, "evaluate.prompts=4")


def as_an_earlier_version_left_it():
    """Give a finished table the former keys."""
    for file, place in (("manifest", ("fingerprint", "recipe", "tax")), ("tax", ("evaluate",))):
        path = Path(f"runs/tiny/tax/{file}.json")
        written = section = json.loads(path.read_text())
        for name in place:
            section = section[name]
        for former, present in RENAMED.items():
            if former.rpartition(".")[0] == place[-1]:
                section[former.rpartition(".")[2]] = section.pop(present.rpartition(".")[2])
        path.write_text(json.dumps(written))
    noted_anew(Path("runs/tiny/tax"))


def test_a_prompted_variant_reads_a_held_out_prompt_as_a_new_turn(here, monkeypatch):
    asked = {}

    def generate(lm, contexts, **options):
        asked[bool(lm.prefix_ids)] = [lm.decode(ids) for ids in contexts]
        return [""] * len(contexts)

    monkeypatch.setattr(tax_work.LanguageModel, "generate", generate)
    again("tax.variants=[base,prompted]", "tax.score=true", "evaluate.prompts=1", tasks=[])
    assert asked == {False: ["My soup was"], True: ["Human: My soup was\n\nAssistant:"]}


# --- the rest --------------------------------------------------------------------------------------------


def test_a_limit_draws_the_same_items_for_every_variant_by_the_seed(here):
    drawn = set()
    for seed in (0, 1, 2, 3):
        found = again(
            "tax.variants=[]",
            "tax.models={x: models/tiny, y: models/tiny}",
            "tax.reference=x",
            "tax.tasks.lm_loss.limit=2",
            f"seed={seed}",
            tasks=["lm_loss"],
        )
        assert [set(row["values"]["nats_per_byte"]) for row in items()] == [{"x", "y"}] * 2
        drawn.add(tuple(row["id"] for row in items()))
        assert task_of(found, "lm_loss")["notes"] == [f"2 of {len(TEXTS)} items, drawn by seed {seed}"]
    assert len(drawn) > 1


def test_how_much_is_read_at_once_changes_no_figure(here):
    whole, one_by_one = (again(ALONE, f"tax.tokens_per_batch={n}", tasks=["lm_loss"]) for n in (2048, 1))
    x, y = (task_of(found, "lm_loss")["variants"]["base"]["mean"] for found in (whole, one_by_one))
    assert x == pytest.approx(y, abs=1e-5)


def test_the_reference_and_the_parts_of_the_way_are_chosen(here):
    found = again(
        "tax.variants=[policy]", "tax.interpolate=[0.9,0.1]", "tax.reference=policy_0.1", tasks=["lm_loss"]
    )
    assert [variant["name"] for variant in found["variants"]] == ["policy_0.1", "policy_0.9", "policy"]
    assert list(task_of(found, "lm_loss")["differences"]) == ["policy_0.9", "policy"]
    values = [row["values"]["nats_per_byte"] for row in items()]
    gain = sum(v["policy_0.1"] - v["policy"] for v in values) / len(values)
    assert task_of(found, "lm_loss")["differences"]["policy"]["gain"] == pytest.approx(gain)


def test_tasks_of_lm_eval_are_rows_of_the_table_paired_item_by_item(here):
    letters = {"text": ["one", "a cat"], "label": ["A", "B"]}
    rows = [{"question": f"Which, {n}?", "choices": letters, "answerKey": "AB"[n % 2]} for n in range(6)]
    sums = [{"question": f"{n} and one?", "answer": f"More.\n#### {n + 1}"} for n in range(3)]
    for name, lines_of in (("arc", rows), ("gsm", sums)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines_of))
    found = again(
        "tax.variants=[base,sft]",
        "tax.tasks.arc_easy={files: arc.jsonl, limit: 4}",
        "tax.tasks.gsm8k={files: gsm.jsonl, num_fewshot: 1}",
        tasks=[],
    )
    arc, gsm = task_of(found, "arc_easy"), task_of(found, "gsm8k")
    assert (arc["metric"], arc["items"]) == ("acc", 4)
    assert (gsm["metric"], gsm["items"]) == ("exact_match", 3)


def test_groups_are_shown_up_to_a_number(here):
    for number, shown in ((8, True), (1, False)):
        again(ALONE, f"tax.groups_shown={number}", tasks=["hhh"])
        assert ("## By group of items" in Path("runs/tiny/tax/tax.md").read_text()) == shown


def test_humaneval_gets_its_options_and_leave_to_run(here, monkeypatch):
    seen = []

    def run_task(name, lm, items, **options):
        seen.append((name, options))
        return Outcome(name, "pass@1", True, [i.id for i in items], [""], {"pass@1": [0.0]})

    monkeypatch.setattr(tax_work, "run_task", run_task)
    monkeypatch.setattr(sandbox, "require", lambda: seen.append("asked"))
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    lines("code.jsonl", [row])
    again(
        ALONE,
        "tax.tasks.humaneval.files=code.jsonl",
        "tax.allow_generated_code=true",
        "tax.humaneval={samples_per_prompt: 4, pass_at: [1, 2], temperature: 0.3, top_p: 0.9}",
        "tax.humaneval.max_new_tokens=7",
        tasks=[],
    )
    options = {"samples": 4, "ks": [1, 2], "temperature": 0.3, "top_p": 0.9, "max_new_tokens": 7}
    assert seen == ["asked", ("humaneval", {"seed": 0, "allow_code": True, **options})]


def test_what_the_stage_reads_is_part_of_its_fingerprint(here):
    again(
        "tax.variants=[prompted]",
        "tax.reference=prompted",
        f"tax.toxicity.judge={REWARD}",
        tasks=["toxicity"],
    )
    noted = json.loads(Path("runs/tiny/tax/fingerprint.json").read_text())["inputs"]
    for file in ("toxic.jsonl", "hhh.txt", "models/tiny/model.safetensors", f"{REWARD}/reward_model.json"):
        assert next(iter(input_hashes([file]).values())) in noted.values(), file


def test_without_the_section_there_is_nothing_to_do(here, capsys):
    stage(tax.main)
    assert capsys.readouterr().out == "tax: not in this recipe\n"
    assert not Path("runs/tiny/tax").exists()


# --- mistakes --------------------------------------------------------------------------------------------

LOSS = TASKS["lm_loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tax.variants=[distiled]", LOSS], r"unknown variant 'distiled'; did you mean distilled\?"),
        (["tax.variants=[zzz]", LOSS], r"unknown variant 'zzz'; variants of a run: base, prompted"),
        (["tax.variants=[base,base]", LOSS], "a variant stands twice"),
        (["tax.variants=[]", LOSS], "no variant is left"),
        (["tax.interpolate=[0.5,0.5]", LOSS], "a part stands twice"),
        (["tax.interpolate=[1.0]", LOSS], "less than 1"),
        (["tax.models.base=models/tiny", LOSS], "base is the name of a variant of the run"),
        (["tax.models={policy_0.5: models/tiny}", LOSS], r"policy_0\.5 is the name of a variant"),
        (["tax.models={a b: models/tiny}", LOSS], "'a b' is no name of a variant"),
        (["tax.models.x=", LOSS], r"tax\.models\.x"),
        (["tax.models.x=./nowhere", LOSS], r"tax\.models\.x: \./nowhere is not a folder"),
        (["tax.reference=sfd", LOSS], r"tax\.reference: 'sfd' is not among the variants \(base, prompted"),
        (["tax.variants=[sft]", LOSS], r"tax\.reference: 'base' is not among the variants \(sft\)"),
        (["tax.score=false"], "nothing to measure: name a task"),
        (["tax.tasks.hhhh.files=texts.jsonl"], r"tax\.tasks: unknown evaluation 'hhhh'; did you mean hhh\?"),
        (
            [f"tax.tasks.inverse_scaling/memo{sign}trap=texts.jsonl" for sign in "-_"],
            "are one task",
        ),
        (["tax.tasks.lm_loss.files=nowhere.jsonl"], r"tax\.tasks\.lm_loss\.files: no file matches nowhere"),
        (["tax.tasks.lm_loss.files=[]"], r"tax\.tasks\.lm_loss\.files"),
        (["tax.tasks.lm_loss.file=texts.jsonl"], r"unknown key tax\.tasks\.lm_loss\.file;"),
        (["tax.tasks.lm_loss={files: texts.jsonl, limit: 0}"], r"tax\.tasks\.lm_loss\.limit"),
        (["tax.tasks.humaneval=texts.jsonl"], "set allow_generated_code: true"),
        (["tax.reward_model_hhh=true", LOSS], r"reward_model_hhh needs the items of tasks\.hhh"),
        ([LOSS, "tax.toxicity.judge=./nowhere"], r"tax\.toxicity\.judge: \./nowhere is not a folder"),
        ([LOSS, "tax.toxicity.top_p=0"], r"tax\.toxicity\.top_p"),
        ([LOSS, "tax.toxicity.threshold=.nan"], r"tax\.toxicity\.threshold"),
        ([LOSS, "tax.humaneval.pass_at=[5]"], "pass@5 cannot be had from 1 samples"),
        ([LOSS, "tax.variants=[base,prompted]", "hhh_prompt=no.txt"], r"hhh_prompt: no\.txt is not there"),
        ([LOSS, "tax.variant=base"], r"unknown key tax\.variant; did you mean tax\.variants\?"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_done(overrides, message, here):
    with pytest.raises(UserError, match=message) as caught:
        stage(tax.main, "hhh_prompt=hhh.txt", *overrides)
    assert "\n" not in str(caught.value)
    assert not Path("runs/tiny/tax").exists()


@pytest.mark.parametrize(
    ("variant", "missing"), [("sft", "sft"), ("distilled", "distill"), ("policy", "ppo")]
)  # fmt: skip
def test_a_missing_stage_is_told_with_its_target(variant, missing, here):
    shutil.rmtree(f"runs/tiny/{missing}")
    with pytest.raises(UserError, match=f"tax needs the {missing} stage, .* run `make {missing} RECIPE"):
        again(f"tax.variants=[base,{variant}]", tasks=["lm_loss"])


def test_stages_behind_score_and_reward_model_are_needed_too(here):
    shutil.rmtree("runs/tiny/reward")
    with pytest.raises(UserError, match="run `make reward RECIPE"):
        again(ALONE, "tax.reward_model_hhh=true", tasks=["hhh"])
    with pytest.raises(UserError, match="run `make reward RECIPE"):
        again(ALONE, "tax.score=true", "evaluate.judge=reward", tasks=[])
    shutil.rmtree("runs/tiny/comparisons")
    with pytest.raises(UserError, match="run `make comparisons RECIPE"):
        again(ALONE, "tax.score=true", tasks=[])


def test_a_bad_row_is_told_with_file_and_line_and_costs_nothing(here):
    lines("texts.jsonl", [{"text": "fine"}, {"words": "not"}])
    with pytest.raises(UserError, match=r"texts\.jsonl:2: .*expected"):
        again(ALONE, tasks=["lm_loss"])
    lines("texts.jsonl", [{"text": "fine"}, {"text": "fine too"}])
    stage(tax.main, *SHORT, LOSS, ALONE)  # mended, the same command goes on
    assert task_of(table(), "lm_loss")["items"] == 2


def test_an_item_too_long_for_the_window_is_told_with_variant_and_task(here):
    lines("texts.jsonl", [{"text": "fine"}, {"text": "x" * 600}])
    with pytest.raises(
        UserError, match=r"^variant base, task lm_loss: texts:2:1: 600 tokens, .*window has 512"
    ):
        again(ALONE, tasks=["lm_loss"])


def test_a_reward_model_is_no_variant(here):
    with pytest.raises(UserError, match=r"variant x, task lm_loss: .*of kind LORA for SEQ_CLS"):
        again("tax.variants=[]", f"tax.models.x={REWARD}", "tax.reference=x", tasks=["lm_loss"])
