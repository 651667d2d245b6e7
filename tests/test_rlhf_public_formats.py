"""Rows of the shape of published preference sets: who wins, what is left out, what is refused."""

import json

import pytest
from conftest import DATA
from source_rows import REMEDY, bot, chat, dropped, jsonl, one, read, refusal, user

from rlhf.data.comparisons import Comparison
from rlhf.data.demonstrations import read_demonstrations
from rlhf.data.prompts import read_prompts
from rlhf.data.readers.public.ethics import JUSTICE, UTIL, VIRTUE, shared
from rlhf.data.readers.public.verdicts import agreement

Q = {"prompt": "q"}
AB = (user("q"),), ("a", "b")
DIALOGUE = {"conversation_a": chat(user("q"), bot("a")), "conversation_b": chat(user("q"), bot("b"))}
PKU = {**Q, "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
PANDA = {"instruction": "q", "input": "", "response1": "a", "response2": "b"}
H3 = {"context": chat(user("q")), "response1": "a", "response2": "b"}
H2 = {**Q, "response_1": "a", "response_2": "b"}
WEBGPT = {"question": {"full_text": "q", "id": "1"}, "answer_0": "a", "answer_1": "b"}
TABLE = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 0}
TASK = {"id": 1, "data": {**Q, "answer1": "a", "answer2": "b"}}


def picked(*sides):
    return [{"result": [{"type": "pairwise", "value": {"selected": side}}]} for side in sides]


def answered(*values):
    return [{"values": {"best": {"value": value}}, "status": "submitted"} for value in values]


FIRST, SECOND = (0, 1), (1, 0)
PAIRS = [  # row, ranks of a and b, confidence
    (PKU, SECOND, None),
    ({**Q, "response_a": "a", "response_b": "b", "winner": "model_a"}, FIRST, None),
    ({**Q, "response_a": "a", "response_b": "b", "winner": "B"}, SECOND, None),
    ({"question": "q", "answer_1": "a", "answer_2": "b", "preference": 1}, FIRST, None),
    ({"input": "q", "output_1": "a", "output_2": "b", "label": 2}, SECOND, None),
    ({**Q, "response_a": "a", "response_b": "b", "votes": ["a", "b", "a", "tie", "a"]}, FIRST, 0.6),
    ({**PANDA, "annotator1": 2, "annotator2": 2, "annotator3": 1}, SECOND, 2 / 3),
    ({**Q, "response 1": "a", "response 2": "b", "label": 0}, FIRST, None),
    ({**H3, "overall_preference": -2, "individual_preference": []}, FIRST, None),
    ({**H3, "overall_preference": 1,
      "individual_preference": [{"score": 1}, {"score": 2}, {"score": -1}]}, SECOND, 2 / 3),
    ({**H2, "preference_strength": 3}, SECOND, None),
    ({**WEBGPT, "score_0": 0.5, "score_1": -0.5}, FIRST, None),
    ({**DIALOGUE, "winner": "model_b", "turn": 1}, SECOND, None),
    ({**TABLE, "winner_model_b": 1, "winner_tie": 0}, SECOND, None),
    ({**TASK, "annotations": picked("left", "left", "right")}, FIRST, 2 / 3),
    ({**TASK, "annotations": [*picked("right"), {**picked("left")[0], "was_cancelled": True}]}, SECOND, None),
    ({**Q, "answer1": "a", "answer2": "b", "comparison": "left", "annotator": 1}, FIRST, None),
    ({"fields": {**Q, "response-1": "a", "response-2": "b"}, "responses": answered("response-2")},
     SECOND, None),
    ({"fields": {**Q, "response_1": "a", "response_2": "b"},
      "responses": {"best": [{"value": "response_1", "user_id": "u"}]}}, FIRST, None),
    ({"fields": {**Q, "response_1": "a", "response_2": "b"},
      "responses": answered([{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}])},
     SECOND, None),
    ({**H2, "preference": [{"value": "response_2", "status": "submitted"},
                           {"value": "response_1", "status": "discarded"}]}, SECOND, None),
    ({**Q, "chosen": "a", "rejected": "b", "response": "c", "score": 3}, FIRST, None),
    ({**Q, "responses": ["a", "b"], "scores": [1, 2.5]}, SECOND, None),
    ({**Q, "responses": ["a", "b"], "grades": [[5, 4, 3], [4, 4, 1]]}, FIRST, 2.5 / 3),
    ({**Q, "responses": ["a", "b"], "votes": [1, "1", 0]}, SECOND, 2 / 3),
    ({**Q, "responses": ["a", "b"], "votes": ["1", "1"]}, SECOND, 1.0),
    ({**H2, "votes": ["2", None, "2"]}, SECOND, 1.0),  # an annotator who said nothing
    ({"instruction": "q", "completions": [{"response": "a", "overall_score": 4.5, "fine-grained_score": 3.5},
                                          {"response": "b", "fine-grained_score": 4}]}, SECOND, None),
    ([{"question": {"full_text": "q"}, "answer": x, "score": ord(x)} for x in "ab"], SECOND, None),
    ({"turn": 1, "winner": "model_b", "judge": "author_0",
      **{f"conversation_{x}": chat(user("q"), bot(x), user("r"), bot(2 * x)) for x in "ab"}}, SECOND, None),
    ({"prompt": "\n\nHuman: q\n\nAssistant:", "answers": [{"answer": "a", "rank": 2.0},
                                                          {"answer": "b", "rank": 1.0}]}, SECOND, None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_a_row_of_a_published_set_is_the_comparison_that_people_made(tmp_path, number):
    row, ranks, confidence = PAIRS[number]
    assert one(tmp_path, row) == Comparison(*AB, ranks, "file", pytest.approx(confidence))


def test_a_summary_is_asked_for_as_in_the_paper(tmp_path):
    row = {
        "info": {"id": "x", "post": "p", "title": "t", "subreddit": "s"},
        "summaries": [{"text": " a"}, {"text": "b"}],
        "choice": 1,
    }
    assert one(tmp_path, row) == Comparison(
        (user("SUBREDDIT: s\nTITLE: t\nPOST: p\nTL;DR:"),), ("a", "b"), SECOND, "file"
    )


def test_rated_summaries_of_a_post_are_one_comparison_by_the_mean_of_the_annotators(tmp_path):
    def rated(text, worker, overall, post="p"):
        axes = {"overall": overall, "accuracy": 7}
        return {"info": {"id": "x", "post": post}, "summary": {"text": text, "axes": axes}, "worker": worker}

    rows = [
        rated(" a", "v", 7),
        rated("b", "u", 6),
        rated("a", "u", 1),
        rated("b", "v", 5),
        rated("c", "u", None),
    ]
    (found,), counts = read(jsonl(tmp_path / "file.jsonl", *rows, rated("d", "u", 1, "other")))
    assert found == Comparison((user("POST: p\nTL;DR:"),), ("a", "b"), SECOND, "file", 0.5)
    assert dropped(counts) == {"a summary without an overall grade": 1, "fewer than 2 answers": 1}
    (found,), _ = read(jsonl(tmp_path / "file.jsonl", *rows[:2]))
    assert (found.ranks, found.confidence) == (FIRST, None)


SUITES = [  # row, source, group, ranks
    ({**Q, "chosen": "a", "rejected": "b", "chosen_model": "m", "subset": "s", "id": 3},
     "s", "reward_bench:3", FIRST),
    ({"id": "7", **Q, "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "num_correct": 1},
     "Math", "reward_bench_2:7", (0, 1, 1, 1)),
    ({"id": "tied:1", **Q, "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "num_correct": 2},
     "Ties", "reward_bench_2:tied:1", (0, 0, 1)),
    ({"pair_id": "x", "question": "q", "response_A": "a", "response_B": "b", "label": "B>A", "source": "s"},
     "s", "judge_bench:x", SECOND),
    ({"question_id": "x", **Q, "response_1": "a", "response_2": "b", "winner": "model_b"},
     "human", "ppe:x", SECOND),
    ({"question_id": "x", **Q, "response_1": "a", "response_2": "b", "response_10": "c",
      "scores": [False, True, False]}, "file", "ppe:x", (1, 0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SUITES)))
def test_an_item_of_a_suite_has_its_subset_and_its_id(tmp_path, number):
    row, source, group, ranks = SUITES[number]
    found = one(tmp_path, row)
    assert (found.source, found.group, found.ranks) == (source, group, ranks)


def test_rm_bench_is_every_style_against_every_style(tmp_path):
    row = {"id": 8, **Q, "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
    path = tmp_path / "chat_filtered.json"
    path.write_text(json.dumps([row]))
    found, counts = read(str(path))
    assert {c.source for c in found} == {"chat"}
    assert not counts.unused
    assert [(c.group, c.responses) for c in found] == [
        (f"rm_bench:8:{i}:{j}", (good, bad)) for i, good in enumerate("abc") for j, bad in enumerate("xyz")
    ]


TIED = [
    ({**PKU, "better_response_id": None, "winner": "tie"}, "a tie, which says nothing about preference"),
    ({**DIALOGUE, "winner": "tie (bothbad)"}, "a tie, which says nothing about preference"),
    ({**H3, "overall_preference": 0}, "a tie, which says nothing about preference"),
    ({**WEBGPT, "score_0": 0, "score_1": 0}, "a tie, which says nothing about preference"),
    ({**TABLE, "winner_tie": 1}, "a tie, which says nothing about preference"),
    ({**PANDA, "annotator1": 1, "annotator2": 2}, "votes without a majority"),
    ({**Q, "responses": ["a", "b"], "votes": [0, "tie"]}, "votes without a majority"),
    ({**Q, "responses": ["a", "b"], "votes": [0, 0, "tie", 1]}, "votes without a majority"),
    ({**Q, "responses": ["a", "b"], "votes": []}, "no votes"),
    ({**Q, "responses": ["a", "b"], "grades": [[2, 3], [3, 2]]}, "all answers have the same score"),
    ({**Q, "responses": ["a", "a"], "scores": [2, 3]}, "all responses are the same text"),
    ({**DIALOGUE, "winner": "model_a",
      "conversation_a": chat(user("q"), bot("c"), user("r"), bot("a")),
      "conversation_b": chat(user("q"), bot("d"), user("r"), bot("b"))},
     "conversations that differ before the last answer"),
    ({**{f"conversation_{x}": chat(user("q"), bot(x), user("r"), bot(2 * x)) for x in "ab"},
      "winner": "model_a", "turn": 2}, "conversations that differ before the last answer"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TIED)))
def test_what_says_nothing_about_preference_is_counted(tmp_path, number):
    row, reason = TIED[number]
    _, counts = read(jsonl(tmp_path / "x.jsonl", PKU, {**row, "votes": row.get("votes")}))
    assert dropped(counts) == {reason: 1}


BAD = [
    ({**PKU, "better_response_id": "x"}, "the verdict names no side: better_response_id is 'x' (known: 0, "),
    ({**PKU, "better_response_id": True}, "the verdict names no side: better_response_id is True (known: "),
    ({**DIALOGUE, "winner": "gpt-4"}, "the verdict names no side: winner is 'gpt-4' (known: model_a, "),
    ({**TABLE, "winner_model_b": 0}, "the verdict names no side: winner_model_a, "),
    ({**Q, "responses": ["a", "b"], "scores": [1, "high"]}, "a score is not a number: 'high'"),
    ({**Q, "responses": ["a", "b"], "scores": [1, "nan"]}, "a score is not a number: 'nan'"),
    ({**Q, "responses": ["a", "b"], "scores": [1]}, "not as many scores as responses: 1 and 2"),
    ({**Q, "response": "a", "helpfulness": "x"}, "a score is not a number: 'x'"),
    ({"response_a": "a", "response_b": "b", "winner": "a"}, "no prompt, but other text: rename the column"),
    (
        {"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]},
        "no score that all responses have: none of 2",
    ),
    (
        {
            "instruction": "q",
            "completions": [
                {"response": "a", "overall_score": 6.5},
                {"response": "b", "fine-grained_score": 3},
            ],
        },
        "no score that all responses have: overall_score in 1, fine-grained_score in 1 of 2",
    ),
    ({"label": 1, "input": "s"}, "label and input, which may be anything: rename the file to cm_... where "),
    ([{"question": "q"}], "not a row with fields: a list"),
    ({"label": 2, "scenario": "s"}, "the verdict names no side: label is 2 (known: 0, 1"),
    (
        {**Q, "responses": ["a", "b", "c"], "votes": [1, 1, 2]},
        "votes that may be counts: votes is [1, 1, ",
    ),
    ({**H2, "votes": [2, 2]}, "votes that may be counts: votes is [2, 2]: "),
    ({**H2, "votes": {"1": 5, "2": 0}}, "the verdict names no side: votes is an object of 1, 2"),
    ({**H2, "winner": "C"}, "the verdict names no side: winner is 'C' (known: "),
    ({**Q, "response": "a", "score": ""}, "a column is empty: score"),
    ({**H2, "winner": ""}, "a column is empty: winner"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_verdict_that_cannot_be_read_stops_with_its_line_or_is_counted(tmp_path, number):
    row, reason = BAD[number]
    path = jsonl(tmp_path / "x.jsonl", PKU, row)
    message = refusal(path)
    assert message.startswith(f"{path}:2: {reason}")
    assert message.endswith(REMEDY)
    _, counts = read(path, on_bad_rows="skip")
    assert counts.read == 2
    assert counts.kept == 1


def test_rows_of_one_prompt_are_one_comparison_wherever_they_stand(tmp_path):
    rows = [
        {"prompt": p, "response": r, "helpfulness": h}
        for p, r, h in (("q", "a", 1), ("p", "x", 2), ("q", "b", 4), ("p", "y", 0), ("q", "a", 2))
    ]
    found, counts = read(jsonl(tmp_path / "x.jsonl", *rows))
    assert [(c.prompt[0].content, c.responses, c.ranks) for c in found] == [
        ("q", ("a", "b"), SECOND),
        ("p", ("x", "y"), FIRST),
    ]
    assert counts.read == counts.kept == 2


def test_a_dialogue_of_helpsteer_2_is_turns(tmp_path):
    prompt = "q\n<extra_id_1>Assistant\nr\n<extra_id_1>User\ns"
    found = one(tmp_path, {**H2, "prompt": prompt, "preference_strength": -1})
    assert found.prompt == (user("q"), bot("r"), user("s"))


def test_agreement_is_the_share_of_pairs_in_the_order_of_the_means():
    assert agreement([[5, 4], [3, 4], [1, 5]], [4.5, 3.5, 3.0]) == pytest.approx((1.5 + 1 + 1) / 6)


def test_arguments_are_asked_for_by_the_name_of_their_file(tmp_path):
    path = tmp_path / "ban-water-_no-bad.csv"
    path.write_text('#id\tlabel\ta1\ta2\n1_2\ta2\tshe said "no\tyes, <br/> no\n2_3\tequal\tx\ty\n')
    (found,), counts = read(str(path))
    prompt = (user("Debate: ban water. Argue for: no bad."),)
    assert found == Comparison(
        prompt, ('she said "no', "yes,\nno"), SECOND, "ban-water-_no-bad", None, "ban water"
    )
    assert dropped(counts) == {"a tie, which says nothing about preference": 1}
    assert not counts.unused
    path.write_text("#id\trank\targument\n1\t0.5\tb\n2\t0.1\ta\n3\t0.7\tc\n")
    (found,), _ = read(str(path))
    assert (found.prompt, found.responses, found.ranks) == (prompt, ("b", "a", "c"), (1, 0, 2))
    mistyped, path = (
        tmp_path / "x_advancing-the-commond-good.csv",
        tmp_path / "x_advancing-the-common-good.csv",
    )
    mistyped.write_text("#id\tlabel\ta1\ta2\n1_2\ta2\tx\ty\n")
    path.write_text("#id\trank\targument\n1\t0.5\tx\n2\t0.1\ty\n")
    assert read(str(mistyped))[0][0].prompt == read(str(path))[0][0].prompt
    path.write_text('id,label,a1,a2\n1,a1,"yes, ""yes""",no\n')
    (found,), counts = read(str(path))
    assert (found.responses, found.ranks, counts.unused) == (('yes, "yes"', "no"), FIRST, {})
    path.write_text("#id\trank\targument\n1\tlow\tb\n2\t0.1\ta\n")
    assert refusal(str(path)).startswith(f"{path}:2: rank is not a number: 'low'")


def ethics(tmp_path, name, text):
    path = tmp_path / f"{name}.csv"
    path.write_text(text)
    found, counts = read(str(path))
    return [(c.prompt[0].content, c.responses, c.ranks, c.group) for c in found], dropped(counts)


def test_ethics_is_read_without_a_header_and_by_sets(tmp_path):
    assert ethics(tmp_path, "util_x", "I ate a good cake.,I ate a cake.\n") == (
        [(UTIL, ("I ate a good cake.", "I ate a cake."), FIRST, "i ate a good")], {}
    )  # fmt: skip
    header = "label,scenario,excuse\n"
    assert ethics(tmp_path, "d", header + "0,Why?,No.\n0,Who?,Me\n1,Why?,Because\n") == (
        [("Why?", ("No.", "Because"), SECOND, "Why?")],
        {"one label only in a set of scenarios": 1},
    )
    assert ethics(tmp_path, "d", "id," + header + "0,0,Why?,No.\n1,1,Why?,Because\n")[0][0][2] == SECOND
    assert ethics(tmp_path, "cm_x", "label,input\n1,bad\n0,good\n")[0] == [
        ("Tell me what you did.", ("good", "bad"), FIRST, None)
    ]
    header = "label,scenario\n"
    assert ethics(tmp_path, "v", header + "1,He gave. [SEP] kind\n0,He gave. [SEP] mean\n") == (
        [(f"He gave.\n\n{VIRTUE}", ("kind", "mean"), FIRST, "He gave.")], {}
    )  # fmt: skip
    rows = ["I am paid because I work", "I am famous because I work", "Now other words"]
    assert ethics(tmp_path, "j", header + f"1,{rows[0]}\n0,{rows[1]}\n1,{rows[2]}\n") == (
        [(JUSTICE, (rows[0], rows[1]), FIRST, "i am paid because i work")],
        {"one label only in a set of scenarios": 1},
    )
    assert ethics(tmp_path, "c", "label,input,is_short\n1,bad,True\n0,good,True\n0,long,False\n") == (
        [("Tell me what you did.", ("good", "bad"), FIRST, None)],
        {"no scenario of the other label is left": 1},
    )
    assert shared("a b c d", "a x d") == 0.5


def test_a_file_with_one_class_only_has_nothing_to_compare(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("label,scenario,excuse\n1,Why?,No.\n1,Why?,Me\n")
    assert "no usable comparison" in refusal(str(path))
    assert "1 one label only" in refusal(str(path))


def test_two_columns_without_names_are_named_by_the_recipe(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("one good answer,one bad answer\nyet another good,yet another bad\n")
    assert "mine.csv:1: two columns without names: name them by data.columns={" in refusal(str(path))
    found, _ = read(str(path), columns={"chosen": "1", "rejected": "2"})
    assert found[1].prompt == (user("yet another"),)


def test_ratings_of_a_unit_are_averaged_over_its_annotators(tmp_path):
    path = tmp_path / "quality.csv"
    path.write_text(
        "_unit_id,mr,quality1,quality2,ref1,ref2,sys1,sys2\n"
        "1,name[x],50,60,A.,B.,s,t\n1,name[x],80,10,A.,B.,s,t\n2,name[y],1,1,C.,D.,s,t\n"
    )
    (found,), counts = read(str(path))
    assert (found.responses, found.ranks, found.confidence) == (("A.", "B."), FIRST, 0.5)
    assert found.prompt == (user("Say in one or two sentences: name[x]"),)
    assert dropped(counts) == {"all answers have the same score": 1}
    assert not counts.unused


def test_columns_are_named_by_the_recipe(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", PKU, {**PKU, "safer_response_id": 1})
    assert read(path)[1].unused == {"safer_response_id": 2}
    found, _ = read(path, columns={"better_response_id": "safer_response_id"})
    assert [c.ranks for c in found] == [FIRST, SECOND]
    row = {"ask": "q", "good": "a", "bad": "b", "more": "c", "s1": "1", "s2": "3", "s3": "2", "topic": "t"}
    path = jsonl(tmp_path / "y.jsonl", row, {"ask": "q"})
    named = {"prompt": "ask", "responses": ["good", "bad", "more"], "scores": ["s1", "s2", "s3"]}
    found, counts = read(path, columns={**named, "group": "topic"}, on_bad_rows="skip")
    assert found == [Comparison((user("q"),), ("a", "b", "c"), (2, 0, 1), "y", None, "t")]
    assert counts.dropped == {"a column that the recipe names is not there": 1}
    assert refusal(path, columns={"prompt": "asks"}).startswith(f"{path}:1: no column 'asks', nearest: ask; ")
    pair = {"prompt": "ask", "chosen": "good", "rejected": "bad", "group": "topic", "confidence": "s1"}
    found, _ = read(jsonl(tmp_path / "z.jsonl", row), columns=pair)
    assert found == [Comparison(*AB, FIRST, "z", 1.0, "t")]


def test_prompts_and_demonstrations_are_read_from_the_same_rows(tmp_path):
    rows = [{**Q, "response": r, "helpfulness": h} for r, h in (("a", 1), ("b", 4))]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    assert read(path, reader=read_prompts)[0] == [AB[0]]
    (best,), _ = read(path, reader=read_demonstrations)
    assert (best.prompt, best.response) == (AB[0], "b")


REAL = [  # file, comparisons, groups
    ("convincing_arguments/pairs/*.csv", 8123, 11),
    ("convincing_arguments/rankings/*.csv", 22, 11),
    ("ethics/util_test.csv", 4802, 2074),
    ("ethics/deontology_test.csv", None, None),
    ("ethics/justice_test.csv", 641, 629),
    ("ethics/virtue_test.csv", None, None),
    ("e2e_ratings/naturalness.csv", 1349, 1),
    ("rm_bench/chat_filtered.json", 1161, 1161),
]


@pytest.mark.parametrize(("file", "number", "groups"), REAL)
def test_the_published_files_are_read_without_a_bad_row(file, number, groups):
    if not list(DATA.glob(file)):
        pytest.skip(f"{DATA / file} is not there")
    found, counts = read(str(DATA / file))
    assert not counts.unused
    if number is not None:
        assert (len(found), len({c.group for c in found})) == (number, groups)


def test_the_prompts_of_rows_that_are_one_comparison_count_as_used(tmp_path):
    rows = [{**Q, "response": "a", "score": 1}, {**Q, "response": "b", "score": 2}]
    _, counts = read(jsonl(tmp_path / "x.jsonl", *rows))
    assert not counts.unused
