"""HTML of posts becomes text without losing a word."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.readers.html import text_of

TAGS = [
    "p",
    "b",
    "code",
    "pre",
    "ul",
    "ol",
    "li",
    "a",
    "blockquote",
    "h2",
    "sup",
    "del",
    "table",
    "tr",
    "td",
    "x",
]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ("<p>one</p>\n\n<p>two</p>\n", "one\n\ntwo"),
        ("<p>a\n  b\tc</p>", "a b c"),
        ("<p>a <em>b</em> <strong>c</strong>d</p>", "a b cd"),
        ("<p>one<br>two<br/>\nthree</p>", "one\ntwo\nthree"),
        ("<p>a &lt; b &amp;&amp; c &#x3b1;&nbsp;&eacute;</p>", "a < b && c α\xa0é"),
        ("<p>&amp;lt;</p>", "&lt;"),
        ("<h1>Top</h1><h3>Sub</h3>text", "# Top\n\n### Sub\n\ntext"),
        ("<hr><p>a</p><hr/>b", "---\n\na\n\n---\n\nb"),
        ("<p>use <code>f(x)</code> or <code>a`b</code></p>", "use `f(x)` or `` a`b ``"),
        ('<p>see <a href="http://x.y/z">this page</a>.</p>', "see this page (http://x.y/z)."),
        ('<a href="http://x.y">http://x.y</a>', "http://x.y"),
        ("<p>an<a> b</a></p>", "an b"),
        ('<a href="/q/1"></a>', "(/q/1)"),
        ('<img src="i.png" alt="a cat"><img src="j.png">', "[image: a cat (i.png)][image: (j.png)]"),
        ("10<sup>5</sup> x<sub>i</sub> y<sub>ij</sub> 2<sup>10</sup>", "10^5 x_i y_(ij) 2^10"),
        ("<sub>small print here</sub>", "small print here"),
        ("not <del>this</del> <s>that</s>", "not ~~this~~ ~~that~~"),
        ("<blockquote>\n<p>a</p>\n<p>b</p>\n</blockquote><p>c</p>", "> a\n>\n> b\n\nc"),
        (
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
        ),
        ("<p>unclosed <b>bold", "unclosed bold"),
        ("<p>one<p>two", "one\n\ntwo"),
        ("a < b and c <3", "a < b and c <3"),
        ("</p>stray</div>", "stray"),
        ("<!-- language: lang-py --><p>x</p>", "x"),
        ("<unknown>word</unknown>", "word"),
    ],
)
def test_layout_that_carries_meaning_stays(html, text):
    assert text_of(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "- a\n- b"),
        ("<ul><li>a<li>b</ul>c", "- a\n- b\n\nc"),
        ("<ol><li>a</li><li><p>b</p><p>c</p></li></ol>", "1. a\n2. b\n\n   c"),
        ('<ol start="9"><li>a</li><li>b\n<br>c</li></ol>', "9. a\n10. b\n    c"),
        ("<ul><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ul>", "- a\n  - b\n  - c\n- d"),
    ],
)
def test_lists_keep_their_marks_numbers_and_depth(html, text):
    assert text_of(html) == text


@pytest.mark.parametrize(
    "code", ["    x = 1  \n\n  if  a <b:\n\ty &= 2  # tabs and  spaces", "```\nfenced\n```", "a\n"]
)
def test_a_block_of_code_is_verbatim_between_fences(code):
    escaped = code.replace("&", "&amp;").replace("<", "&lt;")
    text = text_of(f"<p>before</p><pre class='lang'><code>{escaped}</code></pre><p>after</p>")
    before, fence, *lines, closing, _, after = text.split("\n")[0:1] + text.split("\n")[2:]
    assert (before, after) == ("before", "after")
    assert fence == closing
    assert set(fence) == {"`"}
    assert fence not in lines
    assert "\n".join(lines) == code.rstrip()


def test_marks_inside_a_block_of_code_add_nothing():
    html = "<pre><code>a <b>bold</b> <a href='u'>link</a> <code>c</code>\n  x<sup>2</sup></code></pre>"
    assert text_of(html) == "```\na bold link c\n  x2\n```"


html_pieces = st.lists(
    st.one_of(
        st.sampled_from(TAGS).map(lambda tag: f"<{tag}>"),
        st.sampled_from(TAGS).map(lambda tag: f"</{tag}>"),
        st.sampled_from(["<br>", "<hr>", "&lt;", "&#65;", "<li><p>", '<a href="u">', "\n"]),
        st.integers(0, 999).map(lambda n: f" word{n} "),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(html_pieces)
def test_no_word_is_lost_doubled_or_moved_however_the_tags_are_nested(pieces):
    html = "".join(pieces)
    assert re.findall(r"word\d+", text_of(html)) == re.findall(r"word\d+", html)


@settings(deadline=None)
@given(st.text("<>/&;!-[]?pabli= '\"\n", max_size=60))
def test_any_input_gives_a_text_without_white_space_at_its_ends(html):
    text = text_of(html)
    assert text == text.strip()


def test_tags_nested_without_end_do_not_end_the_reading():
    assert text_of("<b>" * 5000 + "word") == "word"
    assert text_of("<ul><li>" * 5000 + "word").endswith("word")
