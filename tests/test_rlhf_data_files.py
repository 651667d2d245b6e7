"""Files of any length are read in bounded memory, a row at a time."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.readers import files
from rlhf.data.readers.files import LINE_LIMIT, rows
from rlhf.data.readers.tables import delimited
from rlhf.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@pytest.fixture
def megabyte():
    """Rows of at most a megabyte."""
    token = LINE_LIMIT.set(1 << 20)
    yield
    LINE_LIMIT.reset(token)


@given(rows_=st.lists(VALUES, max_size=6), chunk=st.integers(1, 9), indent=st.sampled_from([None, 1]))
def test_a_json_list_comes_row_by_row_as_json_reads_it(rows_, chunk, indent, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.json"
    for found in (rows_, {"version": [1, {"data": 2}], "data": rows_, "examples": [7], "more": 1.5}):
        path.write_text(json.dumps(found, indent=indent))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_CHUNK", chunk)
            assert list(rows(path)) == list(enumerate(rows_, 1))


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
def test_the_memory_does_not_depend_on_the_length_of_a_file(kind, tmp_path):
    path, row = tmp_path / f"a{kind}", {"prompt": "p" * 1000, "n": 1}
    most = {}
    for number in (1_000, 20_000):
        with path.open("w") as file:
            file.write({".json": "[", ".jsonl": "", ".csv": "prompt,n\n"}[kind])
            for index in range(number):
                line = f"{row['prompt']},1\n" if kind == ".csv" else f"{json.dumps(row)}\n"
                file.write(f"{',' if kind == '.json' and index else ''}{line}")
            file.write("]" if kind == ".json" else "")
        tracemalloc.start()
        assert sum(1 for _ in rows(path)) == number
        most[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most[20_000] < most[1_000] + 200_000


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.jsonl", '{{}}\n"{}"\n', ":2: the line is longer than 1 MB"),
        ("a.json", '[1, "{}"]', ": the row is longer than 1 MB"),
        ("a.json", '{{"data": ["{}"]}}', ": the row is longer than 1 MB"),
        ("a.txt", "{}.", ":1: the line is longer than 1 MB"),
    ],
)
def test_a_longer_row_is_an_error_that_names_the_key(name, text, fault, megabyte, tmp_path):
    path = tmp_path / name
    path.write_text(text.format("x" * (1 << 20)))
    with pytest.raises(UserError) as caught:
        list(rows(path))
    assert f"{path}{fault}; mend the file, or raise data.max_line_megabytes" in str(caught.value)


LONG = "I slept all night.,I had no sleep.\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "a;b\n1,5;2\n", [("1,5", "2")]),
        ("a.csv", '#a,b\n"1,\n5",2\n', [("1,\n5", "2")]),
        ("a.csv", '#a\tb\n"1\t2\n', [('"1', "2")]),
        ("a.tsv", '"a"\t"b"\n"1\t5"\t2\n"3\n"\t4\n', [("1\t5", "2"), ("3\n", "4")]),
        ("a.tsv", 'a\tb\n"no" he said\t2\n3\t4\n', [('"no" he said', "2"), ("3", "4")]),
        ("a.tsv", 'a\tb\n"no\t2\n3\t4\n', [('"no', "2"), ("3", "4")]),
        ("a.tsv", 'a\tb\n"no\t2\nyes"\t4\n', [('"no', "2"), ('yes"', "4")]),
        ("util_x.csv", "I slept.,I had no sleep at all.\n", [("I slept.", "I had no sleep at all.")]),
        ("util_x.csv", "baseline,less_pleasant\n" + LONG, [("I slept all night.", "I had no sleep.")]),
    ],
)
def test_the_delimiter_the_quotes_and_the_header_are_found_out(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    found = [tuple(row.values()) for _, row in rows(tmp_path / name) if isinstance(row, dict)]
    assert found == expected


def test_an_open_quote_ends_after_so_many_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "_ROW_LINES", 50)
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n3,"' + "x\n" * 100)
    with pytest.raises(UserError, match=r"a\.csv:3: the row has no end within 50 lines; close its quote"):
        list(rows(path))
