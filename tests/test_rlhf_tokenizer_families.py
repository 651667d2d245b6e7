"""The token contract over twelve families of tokenizers, with the shapes of their real templates."""

import pytest
import torch
from tokenizer_families import FAMILIES, SPM, ZEPHYR, byte_level, family, sentence_piece

from policy.ppo.rollout import close
from policy.sft.data import encode
from rlhf.data.comparisons import Message
from rlhf.data.demonstrations import Demonstration
from rlhf.errors import UserError
from rlhf.generation.sampling import Sampled
from rlhf.models.masks import ended
from rlhf.tokenization.contract import describe
from rlhf.tokenization.dialogue import Dialogue
from rlhf.tokenization.prompt_prefix import Context
from rlhf.tokenization.special_tokens import setting

ASKED = (Message("user", "Hi there?"),)
LONGER = (*ASKED, Message("assistant", "Hello you."), Message("user", "And then?"))
TEXTS = ("Hello", "Good  day.\nHello [x] é", "a <b> c", " leading")


def dialogue_of(name, *, tokenizer=None, **options):
    built, template, pad = family(name)
    options = {"template": template, "pad_token": pad} | options
    return Dialogue(tokenizer or built, max_prompt_tokens=400, max_response_tokens=200, **options)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def test_the_end_of_a_turn_and_the_padding_are_the_familys(name):
    dialogue, (_, end, pad) = dialogue_of(name), FAMILIES[name]
    words = dialogue.tokenizer.convert_ids_to_tokens([dialogue.end_id, dialogue.pad_id])
    assert words == [end, pad]
    assert dialogue.closing == [dialogue.end_id]
    assert dialogue.end_ids[0] == dialogue.end_id
    assert set(dialogue.end_ids) == {dialogue.end_id, dialogue.eos_id}


def test_prompt_response_and_closing_decode_to_what_was_written(name):
    dialogue = dialogue_of(name)
    prompt = dialogue.encode_prompt(LONGER)
    for text in TEXTS:
        response = dialogue.encode_response(text)
        assert dialogue.decode(response) == text
        assert not set(response) & set(dialogue.end_ids)
        whole = dialogue.close(prompt, response)
        assert whole == [*prompt, *response, dialogue.end_id]
        written = dialogue.tokenizer.decode(whole)
        assert text.strip() in written
        assert written.endswith(FAMILIES[name][1])
    assert prompt[-1] not in dialogue.end_ids


def test_a_response_has_the_tokens_that_stand_behind_its_prompt(name):
    dialogue = dialogue_of(name)
    if dialogue.template == "plain":
        pytest.skip("nothing is written behind the prompt")
    text = dialogue.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": "Hello"}], tokenize=False
    )
    if name == "qwen-3":  # it writes an empty thought before an answer, but thinks where it is asked for one
        text = text.replace("<think>\n\n</think>\n\n", "")
    whole = dialogue.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [*dialogue.encode_prompt(ASKED), *dialogue.encode_response("Hello")]
    assert whole[: len(said)] == said


def test_a_prompt_has_the_same_tokens_alone_and_in_a_longer_dialogue(name):
    dialogue = dialogue_of(name)
    first = dialogue.encode_prompt(ASKED)
    if dialogue.template == "plain":
        assert dialogue.encode_prompt(LONGER)[: len(first)] == first
        return
    assert dialogue.encode_prompt(LONGER)[: len(first)] == first
    context = Context.none(dialogue)
    assert [*context.prefix_ids, *context.after_dialogue(ASKED, reply=True)][-len(first) :] == first


def sampled(responses, pad):
    width = max(map(len, responses))
    rows = torch.tensor([[*row, *[pad] * (width - len(row))] for row in responses])
    prompt = torch.ones(len(responses), 2, dtype=torch.long)
    return Sampled(prompt, prompt.bool(), rows, rows * 0.0, torch.tensor([*map(len, responses)]), None)


def test_every_token_that_ends_a_turn_ends_a_sampled_response(name):
    dialogue = dialogue_of(name)
    a, b = dialogue.encode_text("ab")[-2:]
    for end in dialogue.end_ids:
        assert dialogue.decode([a, end, b]) == dialogue.decode([a])
        assert dialogue.close([], [a, end, b]) == [a, dialogue.end_id]
    rows = [[a, b, a, b], *([a, end] for end in dialogue.end_ids)]
    given = sampled(rows, dialogue.pad_id)
    assert ended(given.response_ids_BR, dialogue.end_ids).tolist() == [False, *[True] * len(dialogue.end_ids)]
    ids_BT, mask_BT, actions_BR = close(given, 2, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id)
    assert actions_BR.sum(-1).tolist() == [4, *[2] * len(dialogue.end_ids)]
    for row, ids, mask in zip(rows, ids_BT, mask_BT, strict=True):
        assert ids[mask].tolist() == dialogue.close([1, 1], row)  # what the reward reads
        assert ids[2 : 2 + len(row)].tolist() == row  # what was sampled is what is learned from


def test_supervised_learning_learns_the_end_of_the_turn(name):
    dialogue = dialogue_of(name)
    (row,) = encode([Demonstration(ASKED, "Hello", "x")], dialogue, "response")
    learned = [i for i, counts in zip(row.ids, row.counts, strict=True) if counts]
    assert learned == [*dialogue.encode_response("Hello"), dialogue.end_id]


def test_special_tokens_in_a_text_stay_text(name):
    dialogue = dialogue_of(name)
    tokens = [t.content for t in dialogue.tokenizer.added_tokens_decoder.values() if t.special]
    tokens += [FAMILIES[name][1]]
    text = " and ".join(["a", *tokens, "b"])
    special = {*dialogue.tokenizer.convert_tokens_to_ids(tokens)}
    assert dialogue.decode(dialogue.encode_response(text)) == text
    assert not special & {*dialogue.encode_response(text)}
    said, plain = (dialogue.encode_prompt((Message("user", t),)) for t in (text, "a and b"))
    assert [i for i in said if i in special] == [i for i in plain if i in special]
    assert text in dialogue.tokenizer.decode(said)


def test_three_lines_say_what_a_model_reads(name):
    lines = describe(dialogue_of(name), [(ASKED, "Hello"), (LONGER, "Good day.")])
    assert [line.split(":")[0] for line in lines] == ["tokens", "turn", "padding"]
    assert f"closing '{FAMILIES[name][1]}'" in lines[0]
    assert lines[1].startswith(f"turn:     '{FAMILIES[name][1]}' ends it")
    assert lines[2] == f"padding:  '{FAMILIES[name][2]}'"


def test_what_does_not_hold_is_a_line_of_its_own():
    dialogue = dialogue_of("qwen-2.5")
    lines = describe(dialogue, [(ASKED, "Hello <|im_end|>")])
    assert lines[3:] == [
        "warning: 2 texts of 2 rows looked at spell out a special token, as <|im_end|>; it is read as text"
    ]


def test_the_dummy_prefix_is_where_the_prompt_has_it():
    def tokens(name, text):
        dialogue = dialogue_of(name)
        return dialogue.tokenizer.convert_ids_to_tokens(dialogue.encode_response(text))

    assert tokens("llama-2", "Ha") == ["▁H", "a"]  # the template writes a space there
    for name in ("zephyr", "phi-3", "mistral", "gemma-2"):
        assert tokens(name, "Ha") == ["H", "a"], name
    plain = dialogue_of("llama-2", template="plain")
    assert plain.encode_response("Ha") == plain.tokenizer.convert_tokens_to_ids(["H", "a"])
    assert plain.decode(plain.tokenizer.convert_tokens_to_ids(["▁H", "a"])) == " Ha"


def test_a_prompt_has_one_bos_and_no_eos_behind_it():
    for template in ("plain", "chat"):
        tokenizer = sentence_piece(SPM, "{{ bos_token }}" + ZEPHYR, add_eos=True)
        dialogue = dialogue_of("zephyr", tokenizer=tokenizer, template=template)
        ids = dialogue.encode_prompt(ASKED)
        assert (ids[0], ids.count(1)) == (1, 1)
        assert ids[-1] != dialogue.eos_id
    bytewise = byte_level(["<e>"], add_eos=True, eos_token="<e>", pad_token=None)
    dialogue = dialogue_of("gpt-2", tokenizer=bytewise)
    assert dialogue.tokenizer.decode(dialogue.encode_prompt(ASKED)) == "Hi there?"


def test_the_end_of_a_turn_can_be_named():
    dialogue = dialogue_of("qwen-2.5", end_of_turn="<|endoftext|>", pad_token="<|im_start|>")
    assert (dialogue.end_id, dialogue.end_token) == (dialogue.eos_id, None)
    assert dialogue.fingerprint() != dialogue_of("qwen-2.5").fingerprint()
    with pytest.raises(UserError, match=r"dialogue\.end_of_turn: '<x>' is not in the tokenizer"):
        dialogue_of("qwen-2.5", end_of_turn="<x>")
    with pytest.raises(UserError, match=r"dialogue\.pad_token: '<\|im_end\|>' ends a turn"):
        dialogue_of("qwen-2.5", pad_token="<|im_end|>")


def test_template_arguments_reach_the_template_and_the_fingerprint():
    thinks = dialogue_of("qwen-3")
    answers = dialogue_of("qwen-3", template_arguments={"enable_thinking": False})
    text = answers.tokenizer.decode(answers.encode_prompt(ASKED))
    assert text == thinks.tokenizer.decode(thinks.encode_prompt(ASKED)) + "<think>\n\n</think>\n\n"
    assert answers.fingerprint() != thinks.fingerprint()
    assert dialogue_of("qwen-3", template_arguments={}).fingerprint() == thinks.fingerprint()


def test_advice_on_padding_survives_the_shell():
    with pytest.raises(UserError, match=r"""for example SET="dialogue\.pad_token='ÿ'"$"""):
        dialogue_of("gpt-2", pad_token=None)
    assert setting("k", "<|x|>") == "SET=\"k='<|x|>'\""
