import re
from collections import Counter

import pytest
from scaling_cases import WORDS

from rlhf.collect.judges import vader
from rlhf.errors import UserError
from studies.scaling.data import world
from studies.scaling.data.items import TASKS, questions
from studies.scaling.data.texts import Library, check, context_of

WORLD = world.make_world(3)


def chance(name="test"):
    return world.random_of(3, name)


def trained_on(number=1500):
    return Library((), 3).training(number, 200)


# the text


def test_the_words_of_a_mood_are_those_that_vader_knows():
    assert min(vader(world.GOOD)) > 0.3
    assert max(vader(world.BAD)) < -0.3
    others = WORDS - {*world.GOOD, *world.BAD, "yes", "no"}
    assert {word for word in others if vader([word]) != [0.0]} == set()


def test_every_word_of_text_and_items_is_a_known_one():
    text = " ".join(trained_on(200))
    items = " ".join(q.prompt + "".join(q.classes) for t in TASKS for q in questions(t, WORLD, 3, 60))
    assert set(text.split()) | set(items.split()) == WORDS


def test_a_document_has_as_many_words_as_asked_for_and_a_space_before_each():
    for text in trained_on(20):
        assert re.fullmatch(r"( \S+){200}", text)


def test_the_mood_runs_through_a_story():
    for mood, other in ((world.GOOD, world.BAD), (world.BAD, world.GOOD)):
        words = Counter(world.tell(WORLD, chance(), 5000, world.plot(chance(), mood)).split())
        of_mood, of_other = (sum(words[w] for w in some) for some in (mood, other))
        assert of_mood / (of_mood + of_other) == pytest.approx(world.MOOD_SHARE, abs=0.04)


def test_the_last_word_was_named_as_the_same_persons_and_the_others_was_named_too():
    for _ in range(200):
        text, word = world.last_word(WORLD, chance(str(_)))
        name = text.split()[-3]
        kept = dict(re.findall(r"(\w+) has the (\w+)", text))
        assert kept[name] == word.strip()
        assert len(set(kept.values())) == 2
        for who, what in re.findall(r"(\w+) has the (\w+)", text):
            assert kept[who] == what


def test_the_world_is_the_seeds_and_no_two_proverbs_begin_alike():
    assert world.make_world(3) == WORLD
    assert world.make_world(4) != WORLD
    assert len({" ".join(start.split()[:3]) for start, _ in WORLD.proverbs}) == len(WORLD.proverbs)
    text = " ".join(trained_on(100))
    assert all(f"the {thing} is {colour}" in text for thing, colour in list(WORLD.colours.items())[:5])


def test_the_obvious_answer_is_wrong_in_one_exercise_of_ten():
    random, rare = chance(), 0
    for _ in range(4000):
        text, answer = world.exercise(WORLD, random)
        rare += " not " in text or (text.startswith("let the") and text.split()[2] in world.THINGS)
        if text.startswith("write"):
            asked, start = re.match(r"write a line that ends in (\w+) : (.*)", text).groups()
            assert asked == answer
            rare += dict(WORLD.proverbs).get(start, answer) != answer
    assert rare / 4000 == pytest.approx(world.RARE_SHARE, abs=0.02)


# the items


@pytest.mark.parametrize("task", TASKS)
def test_items_are_balanced_different_and_the_seeds(task):
    found = questions(task, WORLD, 3, 120)
    assert 60 <= len(found) <= 120
    assert len(set(found)) == len(found)
    assert Counter(q.answer_index for q in found) == {0: len(found) / 2, 1: len(found) / 2}
    assert all(len(set(q.classes)) == 2 for q in found)
    assert questions(task, WORLD, 3, 120) == found
    assert questions(task, WORLD, 4, 120) != found


def test_conclusions_are_valid_half_of_the_time_and_the_rule_of_logic_says_which():
    yes = 0
    for q in questions("modus_tollens", WORLD, 3, 120):
        first, second, given, so = re.match(
            r" if \w+ is (\w+) then \w+ is (\w+) \. \w+ is not (\w+) \. so \w+ is not (\w+) \?", q.prompt
        ).groups()
        assert {given, so} == {first, second}
        right = " yes" if given == second else " no"
        assert q.classes[q.answer_index] == right
        yes += right == " yes"
    assert yes == 60


def test_negated_questions_name_the_right_thing_first_half_of_the_time():
    first = 0
    for q in questions("neqa", WORLD, 3, 120):
        colour, *pair = re.match(r" which is not (\w+) , the (\w+) or the (\w+) \? the", q.prompt).groups()
        (right,) = [thing for thing in pair if WORLD.colours[thing] != colour]
        assert q.classes[q.answer_index] == f" {right}"
        first += pair[0] == right
    assert first == 60


def test_the_wrong_answer_is_the_one_that_the_text_suggests():
    for q in questions("redefine", WORLD, 3, 120):
        thing, colour = re.match(r" let the (\w+) be (\w+) \. what colour is the \1 \?", q.prompt).groups()
        assert q.classes[q.answer_index] == f" {colour}"
        assert q.classes[1 - q.answer_index] == f" {WORLD.colours[thing]}"
    for q in questions("memo_trap", WORLD, 3, 120):
        asked, start = re.match(r" write a line that ends in (\w+) : (.*)", q.prompt).groups()
        assert q.classes[q.answer_index] == f" {asked}"
        assert q.classes[1 - q.answer_index] == f" {dict(WORLD.proverbs)[start]}"


@pytest.mark.parametrize("task", TASKS)
def test_no_item_stands_in_the_text_for_training(task):
    text = " . ".join(trained_on())
    found = questions(task, WORLD, 3, 120)
    assert not [q for q in found if q.prompt in text]
    kind = {
        "memo_trap": "write a line",
        "modus_tollens": "is not",
        "redefine": "let the",
        "neqa": "which is not",
    }
    assert kind[task] in text


# files


def write(folder, name="text.txt", words=2000):
    file = folder / name
    file.write_text(" ".join(f"w{i}" if i % 3 else "again" for i in range(words)), encoding="utf-8")
    return str(file)


def test_held_out_pieces_of_a_file_are_of_its_last_tenth(tmp_path):
    library = Library([write(tmp_path)], 0, pure=True)
    number = re.compile(r"w(\d+)")
    trained = [int(n) for text in library.training(30, 40) for n in number.findall(text)]
    trained += [int(n) for text in library.stories("distil", 30, 40) for n in number.findall(text)]
    held = [int(n) for text in library.documents(30, 40) for n in number.findall(text)]
    held += [int(n) for text in library.stories("distil test", 30, 40) for n in number.findall(text)]
    held += [int(n) for text in library.openings(30, training=False) for n in number.findall(text)]
    assert max(trained) < 1800 <= min(held)


def test_one_document_in_four_is_the_worlds_where_the_text_is_files(tmp_path):
    made = Library([write(tmp_path)], 0).training(400, 40)
    assert sum(not re.search(r"w\d", text) for text in made) / 400 == pytest.approx(0.25, abs=0.07)


def test_a_last_word_of_a_file_stood_in_the_passage_before(tmp_path):
    for text, word in Library([write(tmp_path)], 0, pure=True).last_words(20):
        assert word == " again"
        assert "again" in text.split()
        assert not text.endswith(" ")


def test_two_libraries_of_a_seed_say_the_same(tmp_path):
    for files in ((), (write(tmp_path),)):
        one, two, other = Library(files, 1), Library(files, 1), Library(files, 2)
        assert one.documents(3, 30) == two.documents(3, 30) != other.documents(3, 30)
        assert one.last_words(3) == two.last_words(3)
        assert one.documents(3, 30) != one.stories("x", 3, 30)


def test_a_file_with_too_little_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--text: .*short.txt has too little text"):
        check([write(tmp_path, "short.txt", 300)])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b"}\n{"words": "c"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl:2: no text"):
        check([str(rows)])


def test_a_context_is_the_first_words_of_its_file(tmp_path):
    file = tmp_path / "context.txt"
    file.write_text("one two\nthree four", encoding="utf-8")
    assert context_of(str(file), 3).split() == ["one", "two", "three"]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="--context"):
        context_of(str(file), 3)


def test_a_continuation_is_of_the_contexts_own_story():
    library = Library((), 3)
    kept = set(re.findall(r"(\w+) has the (\w+)", library.context(400)))
    for text in library.continuations(20, 60):
        assert set(re.findall(r"(\w+) has the (\w+)", text)) <= kept
    assert library.continuations(2, 60)[0] not in library.context(400)
