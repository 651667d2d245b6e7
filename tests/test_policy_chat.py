"""What a line of a chat does, what is saved, and what a terminal gets."""

import pytest

from policy.chat.session import Answer, Conversation
from policy.chat.terminal import Pieces, shown
from rlhf.data.comparisons import Message
from rlhf.errors import UserError


class Parrots:
    """Models that repeat what they were asked and how."""

    def __init__(self, names=("base", "ppo"), answers=None):
        self.names, self.answers, self.asked = list(names), answers or {}, []

    def fault(self, prompt, *, saved=False):
        if len(prompt) > 5:
            return "too long"
        return "not trained on that" if saved and "long" in prompt[-1].content else None

    def prompt(self, name):
        if name == "gone":
            raise UserError("gone: no such file")
        return (Message("system", "be good"), Message("user", "a"), Message("assistant", "b"))

    def answer(self, model, prompt, *, seed, turn, sample, say):
        self.asked.append((model, [m.content for m in prompt], seed, turn, sample))
        text = self.answers.get(model, f"{self.names[model]} to {prompt[-1].content} ({seed}, {sample})")
        say(text)
        return text if isinstance(text, Answer) else Answer(text, 0.5, 3)


@pytest.fixture
def talk():
    """A conversation that keeps what it says and saves."""

    def start(models=None, **options):
        said, kept = [], []
        conversation = Conversation(
            models or Parrots(), said.append, lambda c: kept.append(c) or "the file", **options
        )
        conversation.kept_ones = kept

        def tell(*lines):
            said.clear()
            goes_on = [conversation.hear(line) for line in lines]
            assert all(goes_on[:-1])
            return "".join(said)

        return conversation, tell

    return start


def test_both_answer_and_a_digit_saves_which_is_better_and_goes_on_with_it(talk):
    conversation, tell = talk()
    text = tell("hello")
    assert "[1] base: base to hello (0, 0)\n" in text
    assert "[2] ppo: ppo to hello (0, 0)\n    (score +0.50, 3 tokens)" in text
    assert "saved in the file; the conversation goes on with base" in tell("1")
    (kept,) = conversation.kept_ones
    assert kept.prompt == (Message("user", "hello"),)
    assert kept.responses == ("base to hello (0, 0)", "ppo to hello (0, 0)")
    assert (kept.ranks, kept.source) == ((0, 1), "chat")
    tell("and now?")
    assert conversation.models.asked[-1][1:] == (["hello", "base to hello (0, 0)", "and now?"], 0, 1, 0)
    assert "have been judged" not in tell("2")


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("3", (1, 1, 0)),
        ("=", (0, 0, 0)),
        ("2>1=3", (1, 0, 1)),
        ("3 > 2 > 1", (2, 1, 0)),
        ("1=2=3", (0, 0, 0)),
        ("2>1", None),
        ("2>2>1", None),
        ("4", None),
        (" 2", None),
        ("2 of them", None),
    ],
)
def test_a_judgment_is_a_number_or_an_order_of_all_else_a_message(line, ranks, talk):
    conversation, tell = talk(Parrots(("base", "ppo", "dpo")))
    tell("hello", line)
    assert [c.ranks for c in conversation.kept_ones] == ([ranks] if ranks else [])
    assert conversation.question.content == ("hello" if ranks else line.strip())


def test_before_an_answer_a_number_is_a_message(talk):
    conversation, tell = talk()
    tell("2")
    assert conversation.question.content == "2"


@pytest.mark.parametrize(
    ("answers", "question", "why"),
    [
        ({0: "same", 1: " same"}, "x", "the answers are the same"),
        ({0: "  "}, "x", "an answer is empty"),
        ({1: Answer("half", None, 2, "stopped")}, "x", "an answer was stopped"),
        ({}, "long", "not trained on that"),
    ],
)
def test_what_could_not_be_trained_on_is_not_saved(answers, question, why, talk, monkeypatch):
    models = Parrots(answers=answers)
    monkeypatch.setattr(models, "answer", lambda *a, say, **o: stopped(Parrots.answer, models, *a, **o))

    def stopped(answer, *arguments, **options):
        found = answer(*arguments, say=lambda text: None, **options)
        return found.text if isinstance(found.text, Answer) else found

    conversation, tell = talk(models)
    assert why in tell(question, "1")
    assert conversation.kept_ones == []


def test_an_answer_is_judged_once(talk):
    conversation, tell = talk()
    assert "have been judged" in tell("hello", "1", "2")
    assert "saved" in tell("/again", "2")
    assert [c.ranks for c in conversation.kept_ones] == [(0, 1), (1, 0)]


def test_one_model_alone_can_be_talked_to(talk):
    _, tell = talk(Parrots(("base",)))
    assert "nothing to be compared with" in tell("hello", "1")


def test_again_takes_the_next_sample_and_a_seed_begins_anew(talk):
    conversation, tell = talk()
    tell("hello", "/again", "/again", "/seed 7", "/again")
    drawn = [(seed, sample) for model, _, seed, _, sample in conversation.models.asked if model == 0]
    assert drawn == [(0, 0), (0, 1), (0, 2), (7, 0), (7, 1)]
    assert {turn for *_, turn, _ in conversation.models.asked} == {0}


def test_use_goes_on_with_an_answer_and_saves_nothing(talk):
    conversation, tell = talk()
    assert "goes on with base" in tell("hello", "/use 1")
    tell("more")
    assert conversation.models.asked[-1][1][1] == "base to hello (0, 0)"
    tell("again more")  # without a choice: the last of the models
    assert conversation.models.asked[-1][1][3] == "ppo to more (0, 0)"
    assert conversation.kept_ones == []


def test_undo_takes_back_the_last_message_and_what_came_before(talk):
    conversation, tell = talk()
    tell("one", "two")
    assert "messages left: 1" in tell("/undo")
    tell("three")
    assert conversation.models.asked[-1][1] == ["one", "ppo to one (0, 0)", "three"]
    tell("/undo", "/undo")
    assert "nothing to take back" in tell("/undo")
    assert "nothing was asked" in tell("/again")
    assert "no such command" in tell("/use 1")


def test_a_system_message_or_a_prompt_begins_anew_and_new_keeps_it(talk):
    conversation, tell = talk()
    tell("hello", "/system be brief", "hi")
    assert conversation.models.asked[-1][1] == ["be brief", "hi"]
    tell("/prompt hhh", "hi", "/new", "ho")
    assert conversation.models.asked[-1][1] == ["be good", "a", "b", "ho"]
    tell("/prompt none", "hi")
    assert conversation.models.asked[-1][1] == ["hi"]


def test_a_message_that_is_too_long_leaves_all_as_it_was(talk):
    conversation, tell = talk()
    tell("one", "two", "three")
    before = conversation.asked
    assert "not asked: too long" in tell("four")
    assert conversation.asked == before
    assert "not asked: text that is not valid Unicode" in tell("/new", "\ud800")


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_is_nothing(line, talk):
    conversation, tell = talk()
    assert tell(line) == ""
    assert conversation.models.asked == []


@pytest.mark.parametrize("line", ["/x", "/seed", "/seed x", "/seed -1", "/again 3", "/use 3", "/use", "//"])
def test_a_mistyped_command_says_so(line, talk):
    conversation, tell = talk()
    tell("hello")
    number = len(conversation.models.asked)
    assert "no such command here; /help lists them" in tell(line)
    assert len(conversation.models.asked) == number


def test_help_and_quit(talk):
    conversation, tell = talk()
    assert "/undo" in tell("/help")
    assert conversation.hear("/quit") is False


def test_without_turns_every_message_is_a_text_of_its_own(talk):
    conversation, tell = talk(turns=False)
    tell("one", "two")
    assert conversation.models.asked[-1][1] == ["two"]
    assert "dialogue.template=plain" in tell("/system x")
    assert "goes on" not in tell("1")


# --- the terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\u202eevil", "\x08"])
def test_a_terminal_does_not_obey_an_answer(hostile):
    clean = shown(hostile)
    assert "\ufffd" in clean
    assert all(c.isprintable() or c == "\ufffd" for c in clean)


def test_letters_emoji_and_lines_come_through():
    text = "für\n\tहिन्दी 👩\u200d🔬 中文"
    assert shown(text) == text


def test_pieces_wait_for_the_other_half_of_a_letter():
    said = []
    pieces = Pieces(said.append)
    for text in ("a", "a\ufffd", "aé", "aéb\ufffd"):
        pieces.grow(text)
    pieces.grow("aéb\ufffd", whole=True)
    assert [s for s in said if s] == ["a", "é", "b", "\ufffd"]
    pieces.grow("another", whole=True)
    assert said[-1] == "\nanother"
