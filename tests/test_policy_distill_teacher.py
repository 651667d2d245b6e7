"""The teacher's words: read behind one prompt, kept in files, computed once, checked."""

import json
import os

import numpy as np
import pytest
import torch
from tiny_distill import PROMPT, dialogue_of, passage
from transformers import MistralConfig, MistralForCausalLM

from policy.distillation.data import content_hash
from policy.distillation.teacher import PromptedModel
from policy.distillation.teacher_cache import TeacherCache, record_type, shard_records
from rlhf.errors import UserError
from rlhf.models.log_probs import check_head
from rlhf.models.tiny import tiny_model, tiny_tokenizer
from rlhf.tokenization.prompt_prefix import Context

VOCABULARY = len(tiny_tokenizer())
K = 5


def model_of(seed=0):
    return tiny_model(VOCABULARY, seed=seed).requires_grad_(False).eval()


def prefix_of(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    return Context.read(file, dialogue_of("chat")).prefix_ids


def rows():
    """Passages with and without openings, of unequal lengths."""
    texts = ["one", "a longer text of it", "", "x", "the last one of them"]
    return [
        passage(text or "yes?", teacher_prefix="u:" if n % 2 else "", student_prefix="s " if n == 4 else "")
        for n, text in enumerate(texts)
    ]


def expected_states(model, prefix, one):
    """States that predict a passage's tokens, from one whole pass without a cache."""
    whole = [*prefix, *one.teacher_ids]
    hidden = model.get_decoder()(input_ids=torch.tensor([whole])).last_hidden_state[0]
    start = len(whole) - len(one.ids)
    return hidden[max(0, start - 1) : -1]


# ---- the model under the prompt


@pytest.mark.parametrize("prompted", [True, False])
@torch.no_grad()
def test_states_behind_a_cached_prompt_are_those_of_a_whole_pass(prompted, tmp_path):
    model, prefix = model_of(), prefix_of(tmp_path) if prompted else []
    teacher = PromptedModel(model, prefix)
    for batch in (rows(), rows()[::-1], rows()[:1]):  # again: the cache has not changed meanwhile
        expected = torch.cat([expected_states(model, prefix, one) for one in batch])
        torch.testing.assert_close(teacher.states(batch), expected, rtol=1e-4, atol=1e-4)
    firsts = [teacher.first_of(one) for one in rows()]
    assert firsts == ([0] * 5 if prompted else [1, 0, 1, 0, 1])


@torch.no_grad()
def test_the_prompt_is_read_once_for_all_rows(tmp_path):
    model, prefix = model_of(), prefix_of(tmp_path)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda *seen: read.append(seen[1][0].numel()))
    teacher = PromptedModel(model, prefix)
    for _ in range(3):
        teacher.states(rows())
    behind = len(rows()) * max(len(one.teacher_ids) for one in rows())
    assert read == [len(prefix), behind, behind, behind]


@torch.no_grad()
def test_a_model_with_a_sliding_window_reads_the_prompt_too(tmp_path):
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    prefix = prefix_of(tmp_path)
    assert len(prefix) > 32
    teacher = PromptedModel(model, prefix)
    for _ in range(2):
        expected = torch.cat([expected_states(model, prefix, one) for one in rows()])
        torch.testing.assert_close(teacher.states(rows()), expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_logits_are_not_its_heads_is_refused():
    model = model_of()
    check_head(model)
    model.lm_head.register_forward_hook(lambda *seen: seen[2])  # harmless
    check_head(model)
    forward = model.forward

    def capped(*args, **options):
        out = forward(*args, **options)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits behind the vocabulary head"):
        check_head(model)


# ---- the file


def file_of(folder, passages, *, shard=2, key=None, k=K, vocabulary=VOCABULARY):
    return TeacherCache(
        folder, key or {"sequences": content_hash(passages)}, [len(p.ids) for p in passages],
        k=k, vocabulary=vocabulary, shard=shard,
    )  # fmt: skip


def fill(file, passages, teacher):
    for number in file.missing():
        some = [passages[row] for row in file.sequences_of(number)]
        file.write(number, shard_records(teacher, some, file, 50))


def test_a_record_is_small():
    assert record_type(50, 49152).itemsize == 2 + 4 + 50 * (2 + 4) + 4
    assert record_type(50, 2**16).itemsize == 310
    assert record_type(50, 2**16 + 1).itemsize == 310 + 2 + 100
    assert record_type(50, 2**16 + 1)["index"].subdtype[0] == np.uint32


@pytest.mark.parametrize("prompted", [True, False])
@torch.no_grad()
def test_what_is_kept_is_what_the_model_says_of_each_token(prompted, tmp_path):
    model, prefix = model_of(), prefix_of(tmp_path) if prompted else []
    teacher, passages = PromptedModel(model, prefix), rows()
    fill(file_of(tmp_path / "words", passages), passages, teacher)
    file = file_of(tmp_path / "words", passages)  # from the files alone
    assert file.missing() == []
    assert file.shards == 3
    for row, one in enumerate(passages):
        kept = file.records(row)
        assert isinstance(kept.base if kept.base is not None else kept, np.memmap)
        assert kept["token"].tolist() == one.ids.tolist()
        first = teacher.first_of(one)
        log_p = model.lm_head(expected_states(model, prefix, one)).double().log_softmax(-1).numpy()
        assert len(log_p) == len(one.ids) - first
        order = np.argsort(-log_p, axis=-1)
        np.testing.assert_allclose(
            kept["log_prob"][first:], np.take_along_axis(log_p, order, -1)[:, :K], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            np.exp(kept["log_rest"][first:]), 1 - np.exp(kept["log_prob"][first:]).sum(-1), atol=1e-4
        )
        np.testing.assert_allclose(
            kept["log_prob"][first:],
            np.take_along_axis(log_p, kept["index"][first:].astype(int), -1), rtol=1e-3, atol=1e-3,
        )  # fmt: skip
        targets = one.ids[first:].astype(int)
        np.testing.assert_allclose(
            kept["log_prob_of_token"][first:], log_p[np.arange(len(targets)), targets], rtol=1e-3, atol=1e-3
        )
        assert not kept[:first]["log_prob"].any()


def test_words_do_not_depend_on_what_is_read_beside(tmp_path):
    teacher, passages = PromptedModel(model_of(), prefix_of(tmp_path)), rows()
    found = []
    for shard in (1, 5):
        file = file_of(tmp_path / str(shard), passages, shard=shard)
        fill(file, passages, teacher)
        found.append([file.records(row) for row in range(len(passages))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one["log_prob"], other["log_prob"], rtol=1e-3, atol=1e-3)


def test_a_kill_loses_one_shard_at_most_and_a_second_start_computes_only_what_is_missing(tmp_path):
    teacher, passages, folder = PromptedModel(model_of(), prefix_of(tmp_path)), rows(), tmp_path / "words"
    file = file_of(folder, passages)
    assert file.missing() == [0, 1, 2]
    fill(file, passages, teacher)
    before = {p.name: p.read_bytes() for p in folder.glob("*.npy")}
    index = json.loads((folder / "index.json").read_text())
    del index["shards"]["shard-00002.npy"]  # killed between the shard and the index
    (folder / "index.json").write_text(json.dumps(index))
    os.remove(folder / "shard-00000.npy")
    again = file_of(folder, passages)
    assert again.missing() == [0, 2]
    fill(again, passages, teacher)
    assert {p.name: p.read_bytes() for p in folder.glob("*.npy")} == before


def test_a_damaged_shard_is_named_and_only_that_is_computed_again(tmp_path, capsys):
    teacher, passages, folder = PromptedModel(model_of(), prefix_of(tmp_path)), rows(), tmp_path / "words"
    fill(file_of(folder, passages), passages, teacher)
    shard = folder / "shard-00001.npy"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    assert file_of(folder, passages).missing() == [1]
    said = capsys.readouterr().out
    assert f"warning: {shard} is damaged: its content hash differs; it is computed again" in said
    (folder / "shard-00002.npy").unlink()
    assert file_of(folder, passages).missing() == [1, 2]
    assert "shard-00002.npy is missing" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_index_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        file_of(tmp_path, rows())


def test_records_that_do_not_fit_are_not_written(tmp_path):
    passages = rows()
    file = file_of(tmp_path / "words", passages)
    with pytest.raises(ValueError, match="shard 0 wants"):
        file.write(0, np.zeros(1, dtype=file.type))
    assert file.missing() == [0, 1, 2]
