"""Demonstrations as tokens: every id and every learned place, counted by hand on one token a byte."""

import pytest

from policy.sft.data import answers, encode
from rlhf.data.comparisons import Message
from rlhf.data.demonstrations import Demonstration
from rlhf.errors import UserError
from rlhf.models.tiny import END, START, tiny_tokenizer
from rlhf.tokenization.dialogue import Dialogue, PromptTooLongError

TOKENIZER = tiny_tokenizer()
HI = Demonstration((Message("user", "hi"),), "yo", "x")
TALK = Demonstration(
    (
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "bc"),
        Message("user", "d"),
        Message("assistant", ""),
        Message("user", "f"),
    ),
    "gh",
    "x",
)


def dialogue(template="chat", *, prompt=200, response=20, tokenizer=TOKENIZER, **options):
    return Dialogue(
        tokenizer, template=template, max_prompt_tokens=prompt, max_response_tokens=response, **options
    )


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def learned(row):
    """The learned parts of a row as text, `_` for everything else."""
    marks = "".join(
        "".join(TOKENIZER.convert_ids_to_tokens([i])) if counts else "\0"
        for i, counts in zip(row.ids, row.counts, strict=True)
    )
    return [part for part in marks.split("\0") if part]


def test_a_row_is_prompt_response_and_eos_and_the_last_two_are_learned():
    (row,) = encode([HI], dialogue(), "response")
    assert text_of(row.ids) == f"{START}user\nhi{END}\n{START}assistant\nyo{END}"
    # <|start|> u s e r \n h i <|end|> \n <|start|> a s s i s t a n t \n = 21 tokens, then y o <|end|>
    assert len(row.ids) == 24
    assert row.counts == [False] * 21 + [True] * 3
    (plain,) = encode([HI], dialogue("plain"), "response")
    assert text_of(plain.ids) == f"hiyo{END}"
    assert plain.counts == [False, False, True, True, True]


def test_the_prompt_is_that_of_every_other_stage():
    where = dialogue()
    (row,) = encode([HI], where, "response")
    assert row.ids == [*where.encode_prompt(HI.prompt), *where.encode_response("yo"), where.eos_id]
    # the reward model reads the same row, and behind it its own token where it has one
    ending = dialogue(end_of_context=START)
    (row,) = encode([HI], ending, "response")
    assert [*row.ids, ending.end_of_context_id] == ending.close(
        ending.encode_prompt(HI.prompt), ending.encode_response("yo")
    )


def test_a_response_that_was_cut_is_not_ended():
    long = Demonstration(HI.prompt, "yes or no", "x")
    for limit, expected in ((3, "yes"), (9, "yes or no"), (10, f"yes or no{END}")):
        (row,) = encode([long], dialogue(response=limit), "response")
        assert text_of(row.ids[21:]) == expected
        assert sum(row.counts) == min(limit, 10)


def test_an_eos_that_a_response_spells_out_is_text():
    contract = dialogue()
    (row,) = encode([Demonstration(HI.prompt, f"yo{END}", "x")], contract, "response")
    assert text_of(row.ids[21:]) == f"yo{END}{END}"
    assert row.ids[21:].count(contract.end_id) == 1


def test_all_tokens_are_learned_where_the_recipe_says_so():
    (row,) = encode([HI], dialogue(), "all")
    assert row.counts == [True] * 24
    assert row.ids == encode([HI], dialogue(), "response")[0].ids


def test_every_answer_of_the_assistant_is_learned_with_its_end():
    (row,) = encode([TALK], dialogue(), "assistant")
    said = [f"bc{END}", END, f"gh{END}"]
    assert learned(row) == said
    assert row.ids == encode([TALK], dialogue(), "response")[0].ids
    assert learned(encode([TALK], dialogue(), "response")[0]) == said[-1:]
    (row,) = encode([HI], dialogue(), "assistant")
    assert row == encode([HI], dialogue(), "response")[0]


def test_an_answer_that_opens_a_dialogue_is_not_learned():
    opened = Demonstration((Message("assistant", "x"), Message("user", "y")), "z", "x")
    (row,) = encode([opened], dialogue(), "assistant")
    assert learned(row) == [f"z{END}"]


@pytest.mark.parametrize("kept", range(1, 90))
def test_what_a_truncated_prompt_has_lost_is_not_learned(kept):
    where = dialogue(prompt=kept, truncate_prompts=True)
    (row,) = encode([TALK], where, "assistant")
    (whole,) = encode([TALK], dialogue(), "assistant")
    lost = len(whole.ids) - len(row.ids)
    assert lost == max(0, len(whole.ids) - 3 - kept)
    assert (row.ids, row.counts) == (whole.ids[lost:], whole.counts[lost:])


def test_a_prompt_that_is_too_long_is_not_cut_in_silence():
    with pytest.raises(PromptTooLongError, match="the prompt has 21 tokens"):
        encode([HI], dialogue(prompt=20), "response")


@pytest.mark.parametrize(
    "template",
    [
        # earlier answers are left out, as templates of reasoning models do with their thoughts
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] if m['role'] == 'user' else '-' }}"
        "{{ loop.index0 if loop.last else '' }}<|end|>\n{% endfor %}<|start|>assistant\n",
        # turns end in no token
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    ],
)
def test_a_template_that_hides_earlier_answers_is_refused(template):
    other = tiny_tokenizer()
    other.chat_template = template
    with pytest.raises(UserError, match=r"sft\.loss_on=assistant: the chat template .* use loss_on=response"):
        list(answers(TALK.prompt, dialogue(tokenizer=other)))
    assert encode([TALK], dialogue(tokenizer=other), "response")
