"""Demonstrations to token rows: the one template of all stages, and which tokens are learned."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from rlhf.data.comparisons import Prompt
from rlhf.data.demonstrations import Demonstration
from rlhf.errors import UserError
from rlhf.models.packing import Row
from rlhf.tokenization.dialogue import Dialogue

LossOn = Literal["response", "assistant", "all"]


def encode(demonstrations: Sequence[Demonstration], dialogue: Dialogue, loss_on: LossOn) -> list[Row]:
    """Token ids of demonstrations, ``prompt + response + end`` each, with a mask over the learned tokens.

    A response that was cut at ``max_response_tokens`` was not ended there by its writer: it has no end.

    Args:
        demonstrations: prompts and answers.
        dialogue: the token contract.
        loss_on: learn the last answer and its EOS, every answer of the assistant with the EOS that ends it,
            or everything from the second token on.

    Raises:
        PromptTooLongError: a prompt has too many tokens and is not to be truncated.
        UserError: an earlier answer is not to be found in the prompt.
    """
    rows = []
    for shown in demonstrations:
        prompt = dialogue.encode_prompt(shown.prompt)
        response = dialogue.until_end(dialogue.encode_response(shown.response))
        if len(response) < dialogue.max_response_tokens:
            response = [*response, dialogue.end_id]
        before = [loss_on == "all"] * len(prompt)
        if loss_on == "assistant":
            for begin, end in answers(shown.prompt, dialogue):
                before[begin:end] = [True] * (end - begin)
        rows.append(Row([*prompt, *response], [*before, *[True] * len(response)]))
    return rows


def answers(prompt: Prompt, dialogue: Dialogue) -> Iterator[tuple[int, int]]:
    """Where the assistant's earlier answers stand in an encoded prompt, each with the EOS that ends it.

    An answer is what follows the turns before it, made ready to be answered, up to the next EOS. One that
    opens the dialogue answers nobody. What a truncated prompt has lost is left out.

    Raises:
        UserError: the template writes earlier turns otherwise than the last one, or ends them without EOS.
    """
    whole = copy.copy(dialogue)
    whole.max_prompt_tokens = sys.maxsize
    ids = whole.encode_prompt(prompt)
    lost = len(ids) - len(dialogue.encode_prompt(prompt))
    for number, message in enumerate(prompt):
        if message.role != "assistant" or number == 0:
            continue
        before = whole.encode_prompt(prompt[:number])
        begin = len(before)
        if ids[:begin] != before or dialogue.end_id not in ids[begin:]:
            raise UserError(
                "sft.loss_on=assistant: the chat template writes earlier answers otherwise than the last, or "
                "does not end them with EOS; use loss_on=response"
            )
        end = ids.index(dialogue.end_id, begin) + 1
        if end > lost:
            yield max(begin - lost, 0), end - lost
