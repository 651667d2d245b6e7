"""Wikipedia: revisions that were undone become pairs of excerpts around the difference."""

import io
import itertools
import re
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_rows import REMEDY, dropped, jsonl, read, refusal, user

from rlhf.data.comparisons import Comparison
from rlhf.data.readers import wikipedia
from rlhf.data.readers import xml_dumps as xml
from rlhf.data.readers.rows import LeftOut

BLANK, SPACE = "a blank page", "an edit without a difference of words in its excerpt"
WAR, TALK = "a text brought back that had been undone itself", "a page outside the name space of articles"
LOST = "a revision whose text is not in the file"


def page(*texts, title="Harbour", ns="<ns>0</ns>"):
    revisions = "\n".join(
        f"<revision><id>{n}</id><parentid>{n - 1}</parentid><timestamp>2020-01-01T00:00:00Z</timestamp>"
        f"<contributor><username>u</username><id>77</id></contributor><comment>c</comment>"
        + (text if text.startswith("<text") else f'<text xml:space="preserve">{escape(text)}</text>')
        + "<sha1>x</sha1></revision>"
        for n, text in enumerate(texts)
    )
    return f"<page>\n<title>{title}</title>{ns}<id>5</id>\n{revisions}\n</page>"


def export(*pages, version="0.11", info=""):
    name = f"http://www.mediawiki.org/xml/export-{version}/"
    return (
        f'<mediawiki xmlns="{name}" version="{version}" xml:lang="en">\n{info}'
        + "".join(pages)
        + "</mediawiki>"
    )


def save(folder, *pages, **options):
    path = folder / "wiki.xml"
    path.write_text(export(*pages, **options), encoding="utf-8")
    return str(path)


def found(*texts):
    """(number of the undone revision, restored text), in the order of finding; None for an edit war."""
    rows = [row for _, row in xml.rows(io.BytesIO(export(page(*texts)).encode()), "a.xml")]
    assert all(texts[int(row["revision"])] == row["undone"] for row in rows if isinstance(row, dict))
    return [(int(row["revision"]), row["restored"]) if isinstance(row, dict) else None for row in rows]


# --- what was undone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        ("AB", []),
        ("ABC", []),
        ("AAA", []),
        ("ABA", [(1, "A")]),
        ("ABCA", [(1, "A"), (2, "A")]),
        ("ABAB", [(1, "A"), None]),
        ("ABABA", [(1, "A"), None]),
        ("ABACA", [(1, "A"), (3, "A")]),
        ("ABCBA", [(2, "B"), (1, "A"), (3, "A")]),
        ("ABAACAD", [(1, "A"), (4, "A")]),
    ],
)
def test_what_a_later_revision_brings_back_is_better_than_what_it_undoes(texts, rows):
    assert found(*texts) == rows


def test_a_revision_is_undone_within_the_window_or_not_at_all():
    window = xml.UNDONE_WITHIN
    bad = [f"bad {n}" for n in range(window + 1)]
    assert found("A", *bad[:window], "A") == [(n + 1, "A") for n in range(window)]
    assert found("A", *bad, "A") == []


@settings(deadline=None)
@given(st.text("ABC", max_size=xml.UNDONE_WITHIN + 1))
def test_no_text_is_called_both_better_and_worse_than_another(texts):
    pairs = {(good, texts[number]) for number, good in filter(None, found(*texts))}
    assert not any((bad, good) in pairs or good == bad for good, bad in pairs)
    for number, good in filter(None, found(*texts)):
        assert good in texts[:number]
        assert good in texts[number + 1 :]


def test_a_history_becomes_pairs_with_their_lines(tmp_path):
    path = save(tmp_path, page("The harbour is old.", "The harbour is STUPID.", "The harbour is old."))
    assert read(path)[0] == [
        Comparison(
            (user("Wikipedia article: Harbour"),),
            ("The harbour is old.", "The harbour is STUPID."),
            (0, 1),
            "wiki",
        )
    ]
    lines = [line for line, _ in xml.rows(io.BytesIO(export(page("a", "b", "a")).encode()), "a.xml")]
    assert lines == [5]  # of the undone revision


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_what_a_rule_leaves_out_is_counted_and_stops_nothing(tmp_path, mode):
    path = save(
        tmp_path,
        page("talk a", "talk b", "talk a", title="Talk:X", ns="<ns>1</ns>"),
        page("a", "", "a", "b"),
        page("x y", "x  y", "x y"),
        page("c", '<text deleted="deleted" />', "d", "c", '<text id="8" bytes="90" />'),
        page("e", "f", "e", "f"),
    )
    comparisons, counts = read(path, on_bad_rows=mode)
    assert [c.responses for c in comparisons] == [("c", "d"), ("e", "f")]
    assert dropped(counts) == {TALK: 1, BLANK: 1, SPACE: 1, LOST: 2, WAR: 1}


def test_old_exports_tell_the_name_space_by_the_title(tmp_path):
    names = '<namespace key="0" /><namespace key="1">Talk</namespace>'
    info = f"<siteinfo><namespaces>{names}</namespaces></siteinfo>"
    pages = [page("a", "b", "a", title=title, ns="") for title in ("Talk:X", "Star: a film", "Talk")]
    comparisons, counts = read(save(tmp_path, *pages, version="0.3", info=info))
    assert [c.prompt[0].content for c in comparisons] == [
        "Wikipedia article: Star: a film",
        "Wikipedia article: Talk",
    ]
    assert dropped(counts) == {TALK: 1}


def test_a_truncated_export_keeps_what_stands_before(tmp_path):
    path = tmp_path / "wiki.xml"
    text = export(page("a", "b", "a"), page("c", "d", "c"))
    path.write_text(text[: text.rindex("<text")])
    line = text[: text.rindex("<text")].count("\n") + 1
    message = refusal(str(path))
    assert message.startswith(f"{path}:{line}:")
    assert message.endswith("truncated or malformed XML: no element found" + REMEDY)
    comparisons, counts = read(str(path), on_bad_rows="skip")
    assert [c.responses for c in comparisons] == [("a", "b")]
    assert dropped(counts) == {"truncated or malformed XML": 1}


def test_names_with_a_prefix_are_the_same_names(tmp_path):
    text = re.sub(r"<(/?)(?=[a-z])", r"<\1mw:", export(page("a", "b", "a"))).replace("xmlns=", "xmlns:mw=")
    (tmp_path / "a.xml").write_text(text)
    assert "<mw:revision>" in text
    assert read(str(tmp_path / "a.xml"))[0][0].responses == ("a", "b")


def test_rows_of_undone_edits_are_read_from_other_files_too(tmp_path):
    path = jsonl(tmp_path / "edits.jsonl", {"page": "T", "restored": "a b", "undone": "a c"})
    assert read(path)[0][0].responses == ("a b", "a c")


# --- excerpts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "excerpts"),
    [
        ("a\nb\nc\nd", "a\nX\nc\nd", ("", "a\nb\nc", "a\nX\nc")),
        ("a\nb\nc c\nd", "a\nb\nc x\nd", ("a\nb", "c c\nd", "c x\nd")),
        ("a\nb\nc", "a\nb", ("a", "b\nc", "b")),
        ("b\nc", "a\nb\nc", ("", "b", "a\nb")),
        ("a\n\nb\n\nc", "a\n\nc", ("", "a\n\nb\n\nc", "a\n\nc")),
        ("one two three", "one three", ("", "one two three", "one three")),
    ],
)
def test_an_excerpt_is_the_lines_of_the_difference_with_one_around(good, bad, excerpts):
    assert wikipedia.excerpts(good, bad) == excerpts


texts = st.lists(st.text("ab \n", max_size=6), max_size=12).map("".join)


@settings(deadline=None, max_examples=300)
@given(texts, texts, texts, texts)
def test_good_becomes_bad_where_one_excerpt_is_put_for_the_other(start, good, bad, end):
    good, bad = start + good + end, start + bad + end
    before, a, b = wikipedia.excerpts(good, bad)
    places = [place for place in range(len(good) + 1) if good.startswith(a, place)]
    assert any(
        [*good[:place].split(), *b.split(), *good[place + len(a) :].split()] == bad.split()
        and good[:place].rstrip().endswith(before)
        for place in places
    )


@settings(deadline=None)
@given(st.text("ab", max_size=40), st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_the_shared_beginning_is_as_long_as_it_can_be(start, left, right):
    pairs = itertools.zip_longest(start + left, start + right)
    loop = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert wikipedia._shared(start + left, start + right) == loop


def article(words):
    return "\n".join(" ".join(f"w{i}.{j}" for j in range(words)) for i in range(400))


@pytest.mark.parametrize("words", [1, 12, 30])
@pytest.mark.parametrize("place", [0, 17, 200, 399])
def test_excerpts_of_a_long_article_are_whole_lines_around_the_difference(words, place):
    lines = article(words).split("\n")
    changed = [*lines[:place], lines[place] + " STUPID", *lines[place + 1 :]]
    before, good, bad = wikipedia.excerpts("\n".join(lines), "\n".join(changed))
    assert "STUPID" in bad
    assert bad.replace(" STUPID", "") == good
    assert lines[place] in good
    assert set(good.split("\n")) <= set(lines)
    assert set(before.split("\n")) <= {*lines, ""}
    assert len(before) <= wikipedia.MAX_BEFORE
    assert place == 0 or before
    assert f"{before}\n{good}".strip() in "\n".join(lines)


def test_a_long_difference_is_cut_at_a_line_and_the_other_side_is_whole():
    lines = article(12).split("\n")
    lines[300] = "after the cut"
    _, good, bad = wikipedia.excerpts("\n".join(lines), "\n".join(lines[:100] + lines[300:]))
    assert bad == "\n".join([lines[99], lines[300]])
    assert wikipedia.MAX_EXCERPT - 100 < len(good) <= wikipedia.MAX_EXCERPT
    assert good == "\n".join(lines[99 : 99 + good.count("\n") + 1])


def test_a_short_line_before_a_very_long_one_is_not_all_that_is_left():
    long = " ".join(f"w{n}" for n in range(2000))
    _, good, bad = wikipedia.excerpts(f"intro\nold a\n{long}\nend", f"intro\nold b\n{long[::-1]}\nend")
    assert all(wikipedia.MAX_EXCERPT - 20 < len(side) <= wikipedia.MAX_EXCERPT for side in (good, bad))
    assert good.startswith("old a\nw0 w1 ")
    assert good.split()[-1] in long.split()


@pytest.mark.parametrize("place", [0, 10, 3000, 5999])
def test_in_one_long_line_excerpts_are_cut_between_words(place):
    words = [f"w{n}" for n in range(6000)]
    changed = [*words[:place], "STUPID", *words[place + 1 :]]
    before, good, bad = wikipedia.excerpts(" ".join(words), " ".join(changed))
    assert "STUPID" in bad.split()
    assert f"w{place}" in good.split()
    assert set(good.split()) <= set(words)
    assert set(before.split()) <= set(words)
    assert len(good) <= 2 * wikipedia.MAX_CONTEXT + 10
    assert len(before) <= wikipedia.MAX_BEFORE
    assert f"{before} {good}".strip() in " ".join(words)


@pytest.mark.parametrize("character", ["x", " "])
def test_without_words_and_lines_the_lengths_still_hold(character):
    long = character * 9000
    before, good, bad = wikipedia.excerpts(f"{long}a{long}b{long}", f"{long}c{long}d{long}")
    assert max(len(good), len(bad)) <= wikipedia.MAX_EXCERPT
    assert len(before) <= wikipedia.MAX_BEFORE
    assert good != bad


def test_the_text_before_the_excerpt_is_in_the_prompt(tmp_path):
    path = save(tmp_path, page("intro\nline\na b\nend", "intro\nline\na X\nend", "intro\nline\na b\nend"))
    ((comparison,), _) = read(path)
    assert comparison.prompt == (user("Wikipedia article: Harbour\n\nintro\nline"),)
    assert comparison.responses == ("a b\nend", "a X\nend")


def test_a_blank_page_is_left_out_with_its_prompt():
    (left,) = wikipedia.parse({"page": "T", "restored": "a", "undone": " \n"}, "s")
    assert isinstance(left, LeftOut)
    assert left.prompt == (user("Wikipedia article: T"),)
