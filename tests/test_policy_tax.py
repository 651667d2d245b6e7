"""The tax stage: its numbers against direct computations, a stage that was killed, and other models."""

import functools
import json
import os
import shutil
import statistics
import weakref
from pathlib import Path

import pytest
import tiny_tax
import torch
from conftest import noted_anew, stage
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_tax import HHH, PROMPT, SHORT, TASKS, TEXTS, again, items, responses, table, task_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from policy.alignment_tax import __main__ as tax
from policy.alignment_tax import models as variants
from policy.alignment_tax import run as tax_work
from reward.model.model import TextRewardModel
from rlhf.collect.judges import vader
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model, write_tiny_model

VARIANTS = ["base", "prompted", "sft", "policy_0.5", "policy"]
WHOLE = ("tax.variants=[base,prompted,sft,policy]", "tax.score=true", "tax.reward_model_hhh=true")


@pytest.fixture(scope="module")
def done(tax_lab, tmp_path_factory):
    """The lab with a whole tax table. Do not change it."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(tax_lab, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        again(*WHOLE)
    return folder


@pytest.fixture
def at(done, monkeypatch):
    """The finished table's folder as the current one."""
    monkeypatch.chdir(done)
    return done


# --- numbers ---------------------------------------------------------------------------------------------


def model_of(variant):
    """A variant's model by peft's own merging, and what stands before every text."""
    base = AutoModelForCausalLM.from_pretrained("models/tiny").eval()
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
    before = tokenizer(f"{PROMPT.strip()}\n\n-----\n\n")["input_ids"] if variant == "prompted" else []
    stage_of = {"sft": "sft", "policy": "ppo", "policy_0.5": "ppo"}.get(variant)
    if stage_of is None:
        return base, before
    with torch.no_grad():
        start = {name: weight.clone() for name, weight in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, f"runs/tiny/{stage_of}/policy").merge_and_unload().eval()
        if variant == "policy_0.5":
            for name, weight in merged.state_dict().items():
                if name != "lm_head.weight":  # it is the embedding
                    weight.copy_((weight + start[name]) / 2)
    return merged, before


def nats(model, before, text):
    """-log P(text) behind token ids, and its number of tokens."""
    ids = AutoTokenizer.from_pretrained("models/tiny")(text)["input_ids"]
    whole = torch.tensor([[*(before or [1]), *ids]])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=whole).logits[0, :-1], -1)
    return -float(log_probs.gather(-1, whole[0, 1:, None])[-len(ids) :].sum()), len(ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_s_loss_is_that_of_a_direct_computation(variant, at):
    model, before = model_of(variant)
    rows = [row for row in items() if row["task"] == "lm_loss"]
    assert len(rows) == len(TEXTS)
    for row, text in zip(rows, TEXTS, strict=True):
        loss, tokens = nats(model, before, text)
        assert row["values"]["nats_per_byte"][variant] == pytest.approx(loss / len(text.encode()), abs=1e-4)
        assert row["values"]["nats_per_token"][variant] == pytest.approx(loss / tokens, abs=1e-4)


@pytest.mark.parametrize("variant", ["base", "prompted", "policy"])
def test_every_variant_s_preferences_are_those_of_a_direct_computation(variant, at):
    model, before = model_of(variant)
    rows = {row["id"]: row for row in items() if row["task"] == "hhh"}
    assert len(rows) == 5
    for name, examples in HHH.items():
        for number, (question, *answers) in enumerate(examples, 1):
            context = AutoTokenizer.from_pretrained("models/tiny")(f"\n\nHuman: {question}\n\nAssistant:")
            behind = [*before, *context["input_ids"]]
            sums = [-nats(model, behind, f" {answer}")[0] for answer in answers]
            alone = [-nats(model, before, f" {answer}")[0] for answer in answers]
            row = rows[f"hhh_{name}:{number}"]
            assert row["group"] == name
            assert row["values"]["acc_sum"][variant] == float(sums[0] > sums[1])
            assert row["values"]["acc_mi"][variant] == float(sums[0] - alone[0] > sums[1] - alone[1])


def test_the_table_is_made_of_the_items(at):
    found = table()
    assert [variant["name"] for variant in found["variants"]] == VARIANTS
    assert [task["task"] for task in found["tasks"]] == ["hhh", "lm_loss", "toxicity", "score"]
    for task in found["tasks"]:
        values = [r["values"][task["metric"]] for r in items() if r["task"] == task["task"]]
        assert task["items"] == len(values)
        assert {variant for row in values for variant in row} == set(VARIANTS)  # the same items for all
        for variant in VARIANTS:
            mean = statistics.fmean(row[variant] for row in values)
            assert task["variants"][variant]["mean"] == pytest.approx(mean)
        for variant in VARIANTS[1:]:
            change = [row[variant] - row["base"] for row in values]
            sign = 1 if task["higher_is_better"] else -1
            got = task["differences"][variant]
            assert got["gain"] == pytest.approx(sign * statistics.fmean(change))
            assert got["wins"] == sum(sign * c > 0 for c in change)
            assert got["losses"] == sum(sign * c < 0 for c in change)
            assert got["ties"] == sum(c == 0 for c in change)
    loss = task_of(found, "lm_loss")
    assert not loss["higher_is_better"]
    assert len({figures["mean"] for figures in loss["variants"].values()}) == len(VARIANTS)


def test_what_was_written_is_kept_with_the_judge_s_scores(at):
    said = responses()
    assert {row["task"] for row in said} == {"toxicity", "score"}
    for row in said:
        assert set(row["variants"]) == set(VARIANTS)
        for found in row["variants"].values():
            assert found["score"] == pytest.approx(vader(found["responses"])[0])
    values = [r["variants"]["policy"]["score"] for r in said if r["task"] == "score"]
    assert len(values) == 5
    assert task_of(table(), "score")["variants"]["policy"]["mean"] == pytest.approx(statistics.fmean(values))


def test_the_reward_model_judges_the_items_too(at):
    model = TextRewardModel(Path("runs/tiny/reward/model"))
    wins = []
    for name in sorted(HHH):  # as the glob is
        for question, good, bad in HHH[name]:
            prompt = (Message("user", question),)
            x, y = model.score([prompt, prompt], [good, bad]).tolist()
            wins.append(float(x > y))
    found = table()["reward_model_hhh"]
    assert found["figures"]["mean"] == pytest.approx(statistics.fmean(wins))
    assert found["items"] == 5


def test_the_page_is_printed_and_the_picture_is_there(at, capsys):
    stage(tax.main, *SHORT, *TASKS.values(), *WHOLE)  # finished: it only prints
    page = capsys.readouterr().out
    assert "tax: done already" in page
    for word in ("# What alignment cost: tiny, seed 0", "| policy_0.5 |", "nats_per_byte", "hhh.txt"):
        assert word in page, word
    assert Path("runs/tiny/tax/tax.png").stat().st_size > 1000
    assert not Path("runs/tiny/tax/parts").exists()
    results = json.loads(Path("runs/tiny/tax/manifest.json").read_text())["results"]
    assert set(results["verdicts"]) == set(VARIANTS[1:])


# --- resuming --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had been."""


def stirred(file):
    """Change the weights in a file, as another run of its stage would."""
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    noted_anew(file.parents[1])


class Counting:
    """Calls of a function, the n-th of which never returns."""

    def __init__(self, function, last=None):
        self.function, self.last, self.calls = function, last, []

    def __call__(self, *args, **options):
        if len(self.calls) == self.last:
            raise Killed
        self.calls.append(args[0])
        return self.function(*args, **options)

    def __get__(self, instance, kind=None):
        return functools.partial(self, instance)


def test_what_was_done_before_a_kill_is_not_done_again(here, monkeypatch, no_picture):
    run, write, judge = tax_work.run_task, tax_work.ToxicityTask.respond, tax_work.ToxicityTask.outcome
    options = (*SHORT, *TASKS.values(), "tax.variants=[base,sft]", "tax.score=true")
    stage(tax.main, *options)
    whole = {name: Path("runs/tiny/tax", name).read_text() for name in ("items.jsonl", "responses.jsonl")}
    expected = table()
    shutil.rmtree("runs/tiny/tax")
    calls = {"run": 0, "write": 0, "judge": 0}
    # 2 variants x 2 tasks without a judge, then twice what is written, then judged
    for limit in ({"run": 1}, {"write": 1}, {"judge": 1}, {}):
        counting = {
            "run": Counting(run, limit.get("run")),
            "write": Counting(write, limit.get("write")),
            "judge": Counting(judge, limit.get("judge")),
        }
        monkeypatch.setattr(tax_work, "run_task", counting["run"])
        monkeypatch.setattr(tax_work.ToxicityTask, "respond", counting["write"])
        monkeypatch.setattr(tax_work.ToxicityTask, "outcome", counting["judge"])
        try:
            stage(tax.main, *options)
            assert not limit
        except Killed:
            assert limit
            assert not Path("runs/tiny/tax/tax.json").exists()
        for name, counted in counting.items():
            calls[name] += len(counted.calls)
    assert calls == {"run": 4, "write": 2, "judge": 2}
    assert table() | {"cost": 0} == expected | {"cost": 0}
    assert {name: Path("runs/tiny/tax", name).read_text() for name in whole} == whole


def test_pieces_that_are_kept_cost_nothing_in_the_next_table(here, monkeypatch, no_picture):
    options = ("tax.cache=kept", "tax.score=true", "evaluate.judge=reward")
    again("tax.variants=[base]", *options)
    done = {
        "run": Counting(tax_work.run_task),
        "write": Counting(tax_work.HeldOutScore.respond),
        "judge": Counting(tax_work.HeldOutScore.outcome),
    }
    monkeypatch.setattr(tax_work, "run_task", done["run"])
    monkeypatch.setattr(tax_work.HeldOutScore, "respond", done["write"])
    monkeypatch.setattr(tax_work.HeldOutScore, "outcome", done["judge"])

    def counts():
        found = {name: len(counting.calls) for name, counting in done.items()}
        for counting in done.values():
            counting.calls.clear()
        return found

    together = again("tax.variants=[base,sft]", *options)
    assert counts() == {"run": 2, "write": 1, "judge": 1}  # sft alone
    assert together | {"cost": 0} == again("tax.variants=[base,sft]", *options) | {"cost": 0}
    assert counts() == {"run": 0, "write": 0, "judge": 0}
    stirred(Path("runs/tiny/reward/model/adapter_model.safetensors"))  # another judge of the same name
    again("tax.variants=[base,sft]", *options)
    assert counts() == {"run": 0, "write": 0, "judge": 2}
    stirred(Path("runs/tiny/sft/policy/adapter_model.safetensors"))
    again("tax.variants=[base,sft]", *options)
    assert counts() == {"run": 2, "write": 1, "judge": 1}


def test_a_changed_prompt_is_refused_where_there_is_work_to_lose(here, monkeypatch):
    counting = Counting(tax_work.run_task, last=2)
    monkeypatch.setattr(tax_work, "run_task", counting)
    options = (*SHORT, TASKS["lm_loss"], "tax.variants=[base,prompted,sft]")
    with pytest.raises(Killed):
        stage(tax.main, *options)
    Path("hhh.txt").write_text(PROMPT.replace("Hello", "Good day"))
    with pytest.raises(UserError, match=r"was begun with another recipe or data \(data file hhh\.txt"):
        stage(tax.main, *options)


def test_one_model_is_in_memory_at_a_time_and_the_judge_comes_last(here, monkeypatch, no_picture):
    alive, order = [], []
    load, judge = tax_work.load_variant, tax_work.ToxicityTask.judge

    def loading(variant, recipe, *, same, **options):
        order.append((variant.name, [ref() for ref in alive if ref() is not None]))
        loaded = load(variant, recipe, same=same, **options)
        alive.append(weakref.ref(loaded.model))
        return loaded

    def judging(self):
        order.append(("judge", [ref() for ref in alive if ref() is not None]))
        return judge(self)

    monkeypatch.setattr(tax_work, "load_variant", loading)
    monkeypatch.setattr(tax_work.ToxicityTask, "judge", judging)
    again("tax.variants=[base,sft]", tasks=["lm_loss", "toxicity"])
    assert order == [("base", []), ("sft", []), ("judge", [])]


def test_a_prompt_needs_no_second_loading(here, monkeypatch, no_picture):
    loaded = []
    load = variants._load
    monkeypatch.setattr(
        variants, "_load", lambda variant, recipe: loaded.append(variant.name) or load(variant, recipe)
    )
    again("tax.variants=[base,prompted,policy,policy_prompted]", "tax.interpolate=[]", tasks=["lm_loss"])
    assert loaded == ["base", "policy"]


# --- other models ----------------------------------------------------------------------------------------


def pairing_tokenizer():
    """As the tiny one, but `th` and `he` are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<|pad|>", "<|end|>", *alphabet, "th", "he"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def test_before_and_after_are_any_two_models_without_any_stage(inside, capsys, no_picture):
    write_tiny_model(Path("one"), seed=1)
    other = pairing_tokenizer()
    other.save_pretrained("two")
    tiny_model(len(other), seed=2).save_pretrained("two")
    tiny_tax.lines("texts.jsonl", [{"text": text} for text in TEXTS])
    tiny_tax.lines("toxic.jsonl", [{"prompt": text} for text in tiny_tax.TOXIC])
    stage(
        tax.main,
        TASKS["lm_loss"],
        TASKS["toxicity"],
        "tax.variants=[]",
        "tax.models.before=one",
        "tax.models.after=two",
        "tax.reference=before",
        "model.path=nowhere",
    )
    found = table()
    assert [variant["name"] for variant in found["variants"]] == ["before", "after"]
    assert list(task_of(found, "lm_loss")["differences"]) == ["after"]
    assert task_of(found, "lm_loss")["differences"]["after"]["n"] == len(TEXTS)
    assert any(
        note.startswith("after: another tokenizer than before; figures per token") for note in found["notes"]
    )
    tokens = {
        variant: f["aggregate"]["tokens"] for variant, f in task_of(found, "lm_loss")["variants"].items()
    }
    assert tokens["after"] < tokens["before"] == sum(len(t.encode()) for t in TEXTS)
    assert os.listdir("runs/tiny") == ["tax"]
    assert "## Difference to before" in capsys.readouterr().out


def test_an_adapter_of_another_run_is_a_variant_and_can_be_the_reference(here, no_picture):
    shutil.copytree("runs/tiny/sft/policy", "elsewhere")
    found = again("tax.variants=[sft]", "tax.models.copy=elsewhere", "tax.reference=copy", tasks=["lm_loss"])
    difference = task_of(found, "lm_loss")["differences"]["sft"]
    assert (difference["gain"], difference["ties"], difference["verdict"]) == (0.0, len(TEXTS), "open")
    assert not any("another tokenizer" in note for note in found["notes"])


def test_the_way_starts_where_ppo_started(here, no_picture):
    recipe = tiny_tax.tiny_recipe()
    tiny_tax.adapter(recipe, Path("start"), 9)
    ppo = Path("runs/tiny/ppo")
    shutil.rmtree(ppo)
    started = tiny_tax.tiny_recipe("ppo.start=start")
    run = tax.open_stage(started, "ppo", section="ppo", inputs=["start/adapter_model.safetensors"])
    tiny_tax.adapter(started, run.folder / "policy", 3)
    run.finish({})
    found = again("ppo.start=start", "tax.variants=[policy]", "tax.reference=policy", tasks=["lm_loss"])
    assert found["variants"][0]["adapters"] == [["start", 0.5], ["runs/tiny/ppo/policy", 0.5]]
    tiny_tax.adapter(recipe, Path("start"), 10)
    with pytest.raises(UserError, match="was trained from another start"):
        again("ppo.start=start", "tax.variants=[policy]", "tax.reference=policy", tasks=["lm_loss"])
