"""Reddit: SHP pairs keep their label, trees of comments become rankings by score."""

import pytest
from source_rows import SHP, comment, dropped, jsonl, one, read, user

from rlhf.data.comparisons import Comparison

GONE, HIDDEN = "a deleted or removed comment", "a comment without a score"
TIED = "all answers have the same score"


def test_label_1_prefers_a_and_label_0_prefers_b(tmp_path):
    expected = ((user("How do I salt water?"),), ("With salt.", "Slowly."))
    assert one(tmp_path, SHP) == Comparison(*expected, (0, 1), "file", None)
    for label in (0, "0"):
        assert one(tmp_path, {**SHP, "labels": label}) == Comparison(*expected, (1, 0), "file", None)


def test_the_label_counts_not_the_time_or_the_scores(tmp_path):
    row = {**SHP, "score_A": 1, "score_B": 9, "created_at_utc_A": 1}
    assert one(tmp_path, row).ranks == (0, 1)


def test_a_deleted_comment_of_a_pair_is_left_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", SHP, {**SHP, "human_ref_B": "[removed]"})
    assert dropped(read(path)[1]) == {GONE: 1}


def test_every_set_of_replies_in_a_tree_is_one_ranking(tmp_path):
    deep = comment("deep", 1, comment("x", -3), comment("y", 7), comment("z", 7))
    row = {
        "title": "Title ",
        "selftext": " text",
        "comments": [
            comment("first", 5, comment("p", 9), comment("q", 1)),
            comment("second", 8, deep, comment("other", 2)),
        ],
    }
    comparisons, counts = read(jsonl(tmp_path / "r.jsonl", row))
    post = "Title\n\ntext"
    assert comparisons == [
        Comparison((user(post),), ("first", "second"), (1, 0), "r"),
        Comparison((user(f"{post}\n\nfirst"),), ("p", "q"), (0, 1), "r"),
        Comparison((user(f"{post}\n\nsecond"),), ("deep", "other"), (1, 0), "r"),
        Comparison((user(f"{post}\n\nsecond\n\ndeep"),), ("x", "y", "z"), (1, 0, 0), "r"),
    ]
    assert (counts.read, counts.kept) == (4, 4)


@pytest.mark.parametrize("names", [("body", "replies"), ("body", "comments"), ("selftext", "replies")])
def test_the_fields_of_a_post_have_two_names_each(tmp_path, names):
    text, replies = names
    row = {"title": "t", text: "b", replies: [comment("x", 1), {"body": "y", "score": 2, "replies": ""}]}
    assert one(tmp_path, row) == Comparison((user("t\n\nb"),), ("x", "y"), (1, 0), "file")


def test_a_post_without_text_is_its_title(tmp_path):
    row = {"title": "t", "selftext": None, "comments": [comment("x", 1), comment("y", 2)]}
    assert one(tmp_path, row).prompt == (user("t"),)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_what_a_rule_leaves_out_is_counted_and_stops_nothing(tmp_path, mode):
    pair = [comment("a", 1), comment("b", 2)]
    tree = {
        "title": "t",
        "comments": [
            comment("[deleted]", 50, *pair),  # nothing below is read: nobody knows what it answers
            comment("c", 3, comment(" [Removed] ", 1), comment("d", 4), comment("e", 4)),
            comment("f", 2),
            comment("hidden", None, *pair),
        ],
    }
    path = jsonl(
        tmp_path / "r.jsonl",
        tree,
        {"title": "t", "selftext": "[removed]", "comments": pair},
        {"title": "no comments", "comments": []},
    )
    comparisons, counts = read(path, on_bad_rows=mode)
    assert [(c.prompt[0].content, c.responses) for c in comparisons] == [
        ("t", ("c", "f")),
        ("t\n\nhidden", ("a", "b")),
    ]
    assert dropped(counts) == {GONE: 2, HIDDEN: 1, TIED: 1, "a deleted or removed post": 1}
