"""LAMBADA and held-out text: what is context, what is scored, and figures by plain passes."""

import gzip
import math

import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from tiny_evaluate import TOKENIZER, ids_of, language_model, log_prob, write_rows

from rlhf.errors import UserError
from rlhf.evals.tasks import lambada, lm_loss

PASSAGES = ["She gave him the ring and he gave her a kiss", "one two three two", "said:\nIt is\nso, he said"]


def test_the_last_word_takes_the_space_before_it():
    assert lambada.split_last_word("one two  three") == ("one two ", " three")
    assert lambada.split_last_word("is it\nso he\nsaid") == ("is it\nso", " he\nsaid")
    items = lambada.Item("x", *lambada.split_last_word("a b")), "a b"
    assert items[0].context + items[0].target == items[1]


def test_accuracy_and_perplexity_equal_plain_passes(tmp_path):
    lm = language_model()
    items = lambada.read([write_rows(tmp_path / "l.jsonl", [{"text": text} for text in PASSAGES])])
    outcome = lambada.run(lm, items)
    wanted = [log_prob(lm.model, ids_of(item.context), ids_of(item.target)) for item in items]
    assert outcome.values["nll"] == pytest.approx([-lp for lp, _ in wanted], abs=1e-4)
    assert outcome.values["acc"] == [float(best) for _, best in wanted]
    mean = sum(-lp for lp, _ in wanted) / len(wanted)
    assert outcome.aggregate["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert outcome.ids == ["l:1", "l:2", "l:3"]


def test_what_the_model_would_say_is_right_and_anything_else_is_wrong():
    lm = language_model()
    (said,) = lm.generate([ids_of("one two")], max_new_tokens=3, temperature=0)
    assert len(said) == 3
    other = said[:2] + ("a" if said[2] != "a" else "b")
    items = [lambada.Item(word, "one two", word) for word in (said, other)]
    assert lambada.run(lm, items).values["acc"] == [1.0, 0.0]


def test_a_model_that_is_lost_has_a_large_perplexity_and_no_overflow():
    assert lambada.perplexity([1e6]) == math.exp(700)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a b"}, 'no "text": the fields are txt'),
        ({"text": ["a b"]}, '"text" is no text'),
        ({"text": "word"}, "no last word behind other words"),
        ({"text": "a word "}, "no last word behind other words"),
        ({"text": " word"}, "no last word behind other words"),
        ({"text": ""}, 'an empty "text"'),
    ],
)
def test_a_passage_that_cannot_be_used_is_named(tmp_path, row, message):
    file = write_rows(tmp_path / "l.jsonl", [{"text": "a b"}, row])
    with pytest.raises(UserError, match=message) as caught:
        lambada.read([file])
    assert str(caught.value).startswith(f"{file}:2: ")


def test_broken_json_is_named_by_its_line(tmp_path):
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "a b"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"l\.jsonl:2: not valid JSON.*expected"):
        lambada.read([str(file)])


def test_two_files_of_one_name_keep_their_items_apart(tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(write_rows(tmp_path / folder / "l.jsonl", [{"text": "a b"}]))
    assert [item.id for item in lambada.read(files)] == ["l:1", "l(2):1"]


# --- held-out text ---------------------------------------------------------------------------------------


@given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 20))
def test_windows_are_the_text_and_no_longer_than_asked(text, size):
    pieces = list(lm_loss.windows(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_windows_end_before_white_space_where_there_is_some():
    text = "the quick brown fox jumps over the lazy dog"
    assert list(lm_loss.windows(text, 14)) == ["the quick", " brown fox", " jumps over", " the lazy dog"]
    assert list(lm_loss.windows("a" * 5, 2)) == ["aa", "aa", "a"]


def test_the_loss_is_that_of_plain_passes_a_token_and_a_byte(tmp_path):
    lm = language_model()
    text = "Some plain text of no meaning, with\nlines. " * 6
    file = tmp_path / "t.txt"
    file.write_text(text, encoding="utf-8")
    items = lm_loss.read([str(file)], window=60)
    outcome = lm_loss.run(lm, items)
    assert "".join(item.text for item in items) == text
    nats = [-log_prob(lm.model, [TOKENIZER.eos_token_id], ids_of(item.text))[0] for item in items]
    sizes = [len(item.text) for item in items]
    assert outcome.values["nats_per_byte"] == pytest.approx(
        [n / s for n, s in zip(nats, sizes, strict=True)], abs=1e-5
    )
    assert outcome.values["nats_per_token"] == pytest.approx(
        outcome.values["nats_per_byte"]
    )  # a letter a token
    assert outcome.aggregate["nats_per_token"] == pytest.approx(sum(nats) / sum(sizes))
    assert outcome.aggregate["perplexity"] == pytest.approx(math.exp(sum(nats) / sum(sizes)), rel=1e-4)
    assert outcome.aggregate["bytes"] == len(text)
    assert not outcome.higher_is_better


def test_bytes_are_counted_and_not_letters(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("ab é", encoding="utf-8")
    (item,) = lm_loss.read([str(file)])
    assert lm_loss.run(language_model(), [item]).aggregate["bytes"] == 5


def test_texts_are_read_from_rows_and_files_and_archives(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"three"))
    rows = write_rows(tmp_path / "r.jsonl", [{"text": "four"}, {"text": "  "}, {"text": "five", "x": 1}])
    items = lm_loss.read([str(tmp_path / "*.txt*"), rows])
    assert [(item.id, item.text) for item in items] == [
        ("t:1", "one\ntwo"),
        ("z:1", "three"),
        ("r:1:1", "four"),
        ("r:3:1", "five"),
    ]
    assert [item.group for item in items] == ["t", "z", "r", "r"]
    twice = lm_loss.read([rows, rows])
    assert len({item.id for item in twice}) == len(twice) == 4


def test_texts_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match=r"r\.jsonl:2: no text; expected"):
        lm_loss.read([write_rows(tmp_path / "r.jsonl", [{"text": "a"}, {"content": "b"}])])
    (tmp_path / "b.txt").write_bytes(b"good\n\xff\xfe")
    with pytest.raises(UserError, match=r"b\.txt:2: not UTF-8"):
        lm_loss.read([str(tmp_path / "b.txt")])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three")[:-4])
    with pytest.raises(UserError, match=r"c\.txt\.gz: cannot be read"):
        lm_loss.read([str(tmp_path / "c.txt.gz")])
    with pytest.raises(UserError, match="cannot be read"):
        lm_loss.read([str(tmp_path / "missing.txt")])
    (tmp_path / "e.txt").write_text(" \n ")
    with pytest.raises(UserError, match="no text in"):
        lm_loss.read([str(tmp_path / "e.txt")])
    with pytest.raises(UserError, match="no text in no file"):
        lm_loss.read([])


@pytest.mark.skipif(not (DATA / "lambada").is_dir(), reason=f"{DATA} is not there")
def test_the_published_files_are_read():
    assert len(lambada.read([str(DATA / "lambada" / "lambada_test.jsonl")])) == 5153
    items = lm_loss.read(
        [str(DATA / "text" / "wikitext2" / "test.txt"), str(DATA / "text" / "c4" / "*.jsonl")]
    )
    assert {item.group for item in items} == {"test", "c4_demo"}
