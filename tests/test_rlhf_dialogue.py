"""The token contract: what a prompt, a response and a closed sequence are made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.tiny import END, PAD, START, tiny_tokenizer
from rlhf.tokenization.dialogue import Dialogue, PromptTooLongError, load_tokenizer

TALK = (Message("user", "Hello there"), Message("assistant", "Good day."), Message("user", "How are you?"))
EOS, PAD_ID, START_ID = 1, 0, 2
IDS = st.lists(st.integers(0, 258), max_size=12)


def dialogue(template="chat", *, tokenizer=None, prompt=200, response=8, **options):
    return Dialogue(
        tokenizer or tiny_tokenizer(),
        template=template,
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        **options,
    )


CHAT = dialogue()
READ_BEHIND = dialogue(end_of_context=START)


@given(prompt=IDS, response=IDS)
def test_a_closed_sequence_is_prompt_response_and_exactly_one_eos(prompt, response):
    closed = CHAT.close(prompt, response)
    assert closed[: len(prompt)] == prompt
    said = closed[len(prompt) :]
    assert said[-1] == EOS
    assert said.count(EOS) == 1
    assert said[:-1] == response[: len(said) - 1]
    assert len(said) - 1 == len(response) or response[len(said) - 1] == EOS
    assert CHAT.close(prompt, said) == closed  # closing twice is closing once


@given(prompt=IDS, response=IDS)
def test_a_token_behind_eos_closes_every_sequence_and_nothing_else_changes(prompt, response):
    closed = READ_BEHIND.close(prompt, response)
    assert closed == [*CHAT.close(prompt, response), START_ID]
    assert READ_BEHIND.closing == [EOS, START_ID]
    assert READ_BEHIND.close(prompt, closed[len(prompt) :]) == closed  # closing twice is closing once


def test_the_token_behind_eos_must_be_one_of_its_own():
    assert (CHAT.end_of_context_id, CHAT.closing) == (None, [EOS])
    assert READ_BEHIND.encode_prompt(TALK) == CHAT.encode_prompt(TALK)
    assert READ_BEHIND.encode_response("abc") == CHAT.encode_response("abc")
    refusals = {
        "<nothing>": "not in the tokenizer",
        END: "the EOS token",
        PAD: "the padding or the EOS token",
    }
    for token, message in refusals.items():
        with pytest.raises(UserError, match=rf"dialogue\.end_of_context: .*{message}; name another token"):
            dialogue(end_of_context=token)
    with pytest.raises(UserError, match=r"dialogue\.end_of_context"):
        dialogue(end_of_context=START, pad_token=START)


def test_the_chat_prompt_is_the_tokenizers_own_chat_template():
    tokenizer = tiny_tokenizer()
    turns = [{"role": m.role, "content": m.content} for m in TALK]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.endswith(f"How are you?{END}\n{START}assistant\n")
    assert CHAT.encode_prompt(TALK) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert CHAT.encode_prompt(TALK) == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


def test_the_plain_prompt_is_the_text_as_it_is():
    ids = dialogue("plain").encode_prompt((Message("user", "ab"),))
    assert ids == tiny_tokenizer()("ab")["input_ids"]
    assert len(ids) == 2


def test_a_long_prompt_loses_its_beginning_or_is_refused():
    whole = CHAT.encode_prompt(TALK)
    assert dialogue(prompt=len(whole)).encode_prompt(TALK) == whole
    with pytest.raises(PromptTooLongError, match=rf"{len(whole)} tokens.*{len(whole) - 1}"):
        dialogue(prompt=len(whole) - 1).encode_prompt(TALK)
    cut = dialogue(prompt=20, truncate_prompts=True).encode_prompt(TALK)
    assert cut == whole[-20:]


def test_a_response_loses_its_end():
    assert dialogue(response=8).encode_response("abcdefghijk") == dialogue(response=8).encode_response(
        "abcdefgh"
    )
    assert len(dialogue(response=8).encode_response("abcdefghijk")) == 8


@given(st.text(max_size=20))
def test_a_response_comes_back_as_it_was(text):
    wide = dialogue(response=200)
    if not any(special in text for special in (PAD, END, START)):
        assert wide.decode(wide.encode_response(text)) == text


def test_decoding_stops_at_eos_and_leaves_specials_out():
    a, b, c = CHAT.encode_response("abc")
    assert CHAT.decode([a, b, EOS, c, PAD_ID]) == "ab"
    assert CHAT.decode([a, START_ID, b, PAD_ID, c]) == "abc"
    assert CHAT.decode([EOS, a]) == ""


def test_padding_is_never_eos():
    assert CHAT.pad_id == PAD_ID != CHAT.eos_id == EOS
    shared = tiny_tokenizer()
    shared.pad_token = END  # as many tokenizers come
    built = dialogue(tokenizer=shared)
    assert built.pad_id not in (built.eos_id, None)
    assert shared.pad_token_id == built.pad_id
    none = tiny_tokenizer()
    none.pad_token = None
    assert dialogue(tokenizer=none).pad_id != EOS


def test_a_padding_token_can_be_named_and_must_fit():
    assert dialogue(pad_token=START).pad_id == START_ID
    with pytest.raises(UserError, match="not in the tokenizer"):
        dialogue(pad_token="<nothing>")
    with pytest.raises(UserError, match="is the EOS token"):
        dialogue(pad_token=END)


def test_a_tokenizer_that_cannot_keep_the_contract_is_refused(tmp_path):
    for attribute, template, message in (
        ("eos_token", "plain", "no EOS"),
        ("chat_template", "chat", "no chat template"),
    ):
        tokenizer = tiny_tokenizer()
        setattr(tokenizer, attribute, None)
        with pytest.raises(UserError, match=message):
            dialogue(template, tokenizer=tokenizer)
    with pytest.raises(UserError, match="make model"):
        load_tokenizer(tmp_path / "nothing")


def test_the_fingerprint_tells_contracts_apart_and_nothing_else():
    same = CHAT.fingerprint()
    assert dialogue(prompt=10, response=3).fingerprint() == same
    rewritten, ended, grown = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    rewritten.chat_template += " "
    ended.eos_token = START
    grown.add_tokens(["<new>"])
    prints = [
        same,
        dialogue("plain").fingerprint(),
        dialogue(pad_token=START).fingerprint(),
        READ_BEHIND.fingerprint(),
        dialogue(end_of_context="a").fingerprint(),
        dialogue(end_of_turn=START).fingerprint(),
        dialogue("plain", tokenizer=ended).fingerprint(),
        dialogue(template_arguments={"a": False}).fingerprint(),
        *(dialogue(tokenizer=t).fingerprint() for t in (rewritten, grown)),
    ]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_survives_saving(tmp_path):
    used = dialogue()
    before = used.fingerprint()
    used.encode_prompt(TALK)
    used.tokenizer.save_pretrained(tmp_path)
    assert dialogue(tokenizer=load_tokenizer(tmp_path)).fingerprint() == before
