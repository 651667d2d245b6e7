"""StackExchange: dumps and hub rows become rankings by score; faults have a place, losses a reason."""

import gzip
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from source_rows import REMEDY, dropped, hub, jsonl, read, refusal, scored, user

from rlhf.data.comparisons import Comparison, Counts
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import stream_comparisons
from rlhf.data.readers.stackexchange import score

FEW, TIED = "fewer than 2 answers", "all answers have the same score"
LOST, OTHER = (
    "answers to a question that is not in the file",
    "a post that is neither a question nor an answer",
)


def question(number, accepted=None, title="Title", body="<p>body</p>"):
    return {"Id": number, "PostTypeId": 1, "Title": title, "Body": body, "AcceptedAnswerId": accepted}


def answer(number, parent, votes=0, body="text"):
    return {"Id": number, "PostTypeId": 2, "ParentId": parent, "Score": votes, "Body": body}


def row(fields):
    return (
        "  <row " + " ".join(f"{k}={quoteattr(str(v))}" for k, v in fields.items() if v is not None) + " />\n"
    )


def posts(folder, *rows, root="posts", head="\ufeff<?xml version='1.0' encoding='utf-8'?>\n"):
    folder.mkdir(exist_ok=True)
    path = folder / "Posts.xml"
    path.write_text(f"{head}<{root}>\n" + "".join(map(row, rows)) + f"</{root}>", encoding="utf-8")
    return str(path)


# --- scores and rankings ---------------------------------------------------------------------------------


def test_the_score_grows_by_one_where_the_votes_double():
    first = {0: 0, 1: 1, 2: 2, 5: 3, 11: 4, 22: 5, 45: 6, 90: 7}  # the fewest upvotes that reach a score
    expected = [max(s for least, s in first.items() if least <= votes) for votes in range(100)]
    assert [score(votes, False) for votes in range(100)] == expected
    assert [score(votes, True) for votes in range(100)] == [s + 1 for s in expected]


def test_negative_votes_are_the_worst_even_for_an_accepted_answer():
    assert {score(votes, accepted) for votes in (-1, -50) for accepted in (True, False)} == {-1}
    assert score(0, False) == 0


def test_a_question_becomes_one_ranking_with_ties(tmp_path):
    votes = {2: 3, 3: 0, 4: 1, 5: -2, 6: 4}  # scores 2, 0 + 1, 1, -1, 2
    path = posts(
        tmp_path / "beer",
        question(1, accepted=3, title=" Which & why? ", body="<p>a &lt; b</p><p>c</p>"),
        *(answer(n, 1, v, f"<p>answer <b>{n}</b></p>") for n, v in votes.items()),
    )
    comparisons, counts = read(path)
    texts = tuple(f"answer {n}" for n in votes)
    assert comparisons == [
        Comparison((user("Which & why?\n\na < b\n\nc"),), texts, (0, 1, 1, 2, 0), "beer", None)
    ]
    assert (counts.read, counts.kept) == (1, 1)


def test_answers_find_their_question_wherever_they_stand(tmp_path):
    rows = [
        answer(7, 2, 1, "x"),
        question(9, title="nine"),
        question(2, title="two"),
        answer(8, 9, 0, "a"),
        answer(10, 2, 8, "y"),
        answer(11, 9, 5, "b"),
    ]
    comparisons, _ = read(posts(tmp_path, *rows))
    assert [(c.prompt[0].content, c.responses, c.ranks) for c in comparisons] == [
        ("two\n\nbody", ("x", "y"), (1, 0)),
        ("nine\n\nbody", ("a", "b"), (1, 0)),
    ]


small_dumps = st.lists(
    st.tuples(st.integers(0, 6), st.integers(-2, 6), st.booleans()), max_size=25
)  # parent (0: the post is a question), votes, accepted


@settings(deadline=None, max_examples=60)
@given(small_dumps)
def test_a_dump_gives_what_a_loop_over_the_whole_tree_gives(tmp_path_factory, posted):
    rows = [
        question(n, body=f"q{n}") if not parent else answer(n, parent, votes, f"a{n}")
        for n, (parent, votes, _) in enumerate(posted, 1)
    ]
    for n, (parent, _, accepted) in enumerate(posted, 1):
        if parent and accepted and parent <= len(rows):
            rows[parent - 1]["AcceptedAnswerId"] = n
    path = posts(tmp_path_factory.mktemp("dump"), *rows)
    counts = Counts()
    comparisons = list(stream_comparisons([path], on_bad_rows="stop", counts=counts))
    expected, reasons = loop_over_tree(path)
    assert [(c.prompt[0].content, c.responses, c.ranks) for c in comparisons] == expected
    assert dropped(counts) == reasons


def loop_over_tree(path):
    """The same by brute force: all posts in memory, scores in place."""
    found = [post.attrib for post in ElementTree.parse(path).getroot()]
    questions = {post["Id"]: post for post in found if post["PostTypeId"] == "1"}
    expected, reasons = [], Counter()
    for number, asked in sorted(questions.items(), key=lambda item: int(item[0])):
        answers = [post for post in found if post.get("ParentId") == number]
        scores = []
        for post in answers:
            votes = int(post["Score"])
            bonus = post["Id"] == asked.get("AcceptedAnswerId")
            k = (1 + votes).bit_length() - 1  # rounded up above 2**(k + 1/2)
            scores.append(-1 if votes < 0 else k + ((1 + votes) ** 2 > 2 ** (2 * k + 1)) + bonus)
        if len(answers) < 2:
            reasons[FEW] += 1
        elif len(set(scores)) == 1:
            reasons[TIED] += 1
        else:
            ranks = tuple(len({s for s in scores if s > own}) for own in scores)
            texts = tuple(post["Body"] for post in answers)
            expected.append((f"Title\n\n{asked['Body']}", texts, ranks))
    parents = {post["ParentId"] for post in found if "ParentId" in post} - set(questions)
    if parents:
        reasons[LOST] = len(parents)
    return expected, reasons


# --- what is left out by rule ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_what_a_rule_leaves_out_is_counted_and_stops_nothing(tmp_path, mode):
    rows = [
        *(question(1), answer(2, 1, 5, "good"), answer(3, 1, 0, "bad")),
        *(question(4), answer(5, 4, 9)),
        question(6),
        *(question(7), answer(8, 7, 2), answer(9, 7, 4)),  # 2 and 4 votes are one score
        *(answer(10, 99), answer(11, 99), answer(12, 98)),
        {"Id": 13, "PostTypeId": 5, "Body": "about a tag"},
    ]
    comparisons, counts = read(posts(tmp_path, *rows), on_bad_rows=mode)
    assert [c.responses for c in comparisons] == [("good", "bad")]
    assert dropped(counts) == {OTHER: 1, FEW: 2, TIED: 1, LOST: 2}
    assert counts.read == 7


def test_posts_of_deleted_users_are_posts_like_others(tmp_path):
    asked = {**question(1), "OwnerDisplayName": "user99"}
    rows = [asked, {**answer(2, 1, 5, "a"), "OwnerUserId": 7}, answer(3, 1, 0, "b")]
    assert len(read(posts(tmp_path, *rows))[0]) == 1


def test_a_question_without_text_is_its_title(tmp_path):
    rows = [question(1, body=None), answer(2, 1, 5, "a"), answer(3, 1, 0, "b")]
    assert read(posts(tmp_path, *rows))[0][0].prompt == (user("Title"),)


def test_a_question_with_one_answer_is_still_a_prompt(tmp_path):
    path = posts(tmp_path, question(1), answer(2, 1), question(3, title="Other"), answer(4, 99))
    prompts, counts = read_prompts([path], on_bad_rows="stop")
    assert prompts == [(user("Title\n\nbody"),), (user("Other\n\nbody"),)]
    assert dropped(counts) == {LOST: 1}


# --- bad input -------------------------------------------------------------------------------------------

NO_SCORE = "an answer whose Score is not a whole number: answer 5: "
BAD = {
    "no score": ([question(4), answer(5, 4, None), answer(6, 4)], NO_SCORE + "None"),
    "score word": ([question(4), answer(5, 4, "many"), answer(6, 4)], NO_SCORE + "'many'"),
    "score fraction": ([question(4), answer(5, 4, "1.5"), answer(6, 4)], NO_SCORE + "'1.5'"),
    "empty answer": ([question(4), answer(5, 4, 3, "<p> </p>"), answer(6, 4)], "empty response"),
    "no answer text": ([question(4), answer(5, 4, 3, None), answer(6, 4)], "empty response"),
    "empty question": ([question(4, title=None, body=" "), answer(5, 4, 3), answer(6, 4)], "empty prompt"),
    "no id": (
        [{**question(4), "Id": "x"}],
        "a post without PostTypeId or without a number as its Id: Id 'x'",
    ),
    "no type": ([{"Id": 4}], "a post without PostTypeId or without a number as its Id: Id '4'"),
    "twice": ([question(1)], "a question whose Id is taken by an earlier one: Id 1"),
    "no parent": (
        [answer(5, "")],
        "an answer without a number as its ParentId: Id 5, ParentId ''",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_post_stops_with_its_line_or_is_skipped_and_counted(tmp_path, kind):
    rows, message = BAD[kind]
    path = posts(tmp_path, question(1), answer(2, 1, 5, "a"), answer(3, 1, 0, "b"), *rows)
    assert refusal(path) == f"{path}:6: {message}{REMEDY}"
    comparisons, counts = read(path, on_bad_rows="skip")
    assert [c.responses for c in comparisons] == [("a", "b")]
    ((reason, number),) = dropped(counts).items()
    assert message.startswith(reason)
    assert number == 1


@pytest.mark.parametrize("cut", ["middle of a row", "end", "wrong tag", "bad character"])
def test_broken_xml_is_named_with_its_place_and_keeps_what_stands_before(tmp_path, cut):
    whole = [question(1), answer(2, 1, 5, "a"), answer(3, 1, 0, "b"), question(4, body="x" * 300)]
    path = Path(posts(tmp_path, *whole))
    text = path.read_text(encoding="utf-8-sig")
    broken = {
        "middle of a row": text[:-100],
        "end": text.replace("</posts>", ""),
        "wrong tag": text.replace("</posts>", "</post>"),
        "bad character": text.replace("xxx", "x\x01x", 1),
    }[cut]
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(ElementTree.ParseError) as caught:
        ElementTree.fromstring(broken.encode())
    line, column = caught.value.position
    words = str(caught.value).partition(":")[0]
    message = f"{path}:{line}:{column + 1}: truncated or malformed XML: {words}"
    assert refusal(str(path)) == message + REMEDY
    comparisons, counts = read(str(path), on_bad_rows="skip")
    assert [c.responses for c in comparisons] == [("a", "b")]
    assert dropped(counts)["truncated or malformed XML"] == 1


@pytest.mark.parametrize("content", ["", "{}", "<posts", "\x00\x01"])
def test_a_file_that_is_no_xml_is_named_in_both_modes(tmp_path, content):
    path = tmp_path / "a.xml"
    path.write_text(content)
    assert refusal(str(path)).startswith(f"{path}:1:")
    assert "truncated or malformed XML" in refusal(str(path), on_bad_rows="skip")


@pytest.mark.parametrize(
    ("root", "rows", "found"),
    [
        ("users", [{"Id": 1, "Reputation": 5}], ": the root element is <users>; expected <posts> of a Stack"),
        (
            "comments",
            [],
            ": the root element is <comments>; expected <posts> of a StackExchange Posts.xml or ",
        ),
        (
            "posts",
            [{"Id": 1, "UserId": 3}],
            ":3: a <row> with Id, UserId; the rows of a StackExchange Posts.xml",
        ),
        (
            "posts",
            [{}],
            ":3: a <row> with no field; the rows of a StackExchange Posts.xml have Id, PostTypeId",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_another_file_of_the_dump_is_refused_with_what_was_found(tmp_path, root, rows, found, mode):
    path = posts(tmp_path, *rows, root=root)
    assert refusal(path, on_bad_rows=mode).startswith(path + found)


def test_other_elements_are_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<posts>\n<post/></posts>")
    assert refusal(str(path)) == f"{path}:2: found <posts><post>; a StackExchange Posts.xml holds <row .../>"


# --- other ways in ---------------------------------------------------------------------------------------


def test_a_gzipped_dump_is_read_and_a_damaged_archive_is_named(tmp_path):
    whole = Path(posts(tmp_path, question(1), answer(2, 1, 5, "a"), answer(3, 1, 0, "b"))).read_bytes()
    path = tmp_path / "site.xml.gz"
    path.write_bytes(gzip.compress(whole))
    assert read(str(path))[0][0].source == "site"
    path.write_bytes(gzip.compress(whole)[:-10])
    assert refusal(str(path)).startswith(f"{path}: truncated or damaged gzip file")


def test_a_hub_row_keeps_the_score_it_has(tmp_path):
    rows = [
        hub(scored(2, "<p>a</p>"), scored(7, "b &amp; c"), scored(2, "d"), scored(-1, "e")),
        hub(scored(1, "a")),
        hub(scored(1, "a"), scored(1, "b")),
    ]
    comparisons, counts = read(jsonl(tmp_path / "stack.jsonl", *rows))
    assert comparisons == [Comparison((user("q"),), ("a", "b & c", "d", "e"), (1, 0, 1, 2), "stack")]
    assert dropped(counts) == {FEW: 1, TIED: 1}


@pytest.mark.parametrize(
    ("site", "kept", "reasons"),
    [
        ("matheducators", 289, {OTHER: 157, FEW: 86, TIED: 22}),
        ("beer", 384, {OTHER: 119, FEW: 253, TIED: 26}),
        ("quantumcomputing", 274, {OTHER: 314, FEW: 303, TIED: 35}),
    ],
)
def test_real_sites_are_read_without_a_bad_row(site, kept, reasons):
    path = DATA / "stackexchange" / site / "Posts.xml"
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    counts = Counts()
    comparisons = list(stream_comparisons([str(path)], on_bad_rows="stop", counts=counts))
    assert (len(comparisons), dropped(counts)) == (kept, reasons)
    assert [(len(c.responses), c.ranks) for c in comparisons] == [
        (len(texts), ranks) for _, texts, ranks in loop_over_tree(path)[0]
    ]
