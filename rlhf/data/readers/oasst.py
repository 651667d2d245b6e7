"""Conversation trees of OpenAssistant (Köpf et al. 2023, arXiv:2304.07327), one tree a row.

Volunteers ranked the replies to one message; ``rank`` 0 is the best. Every prompter message with two or more
ranked assistant replies gives one k-way comparison, so a row gives several, or none. Deleted messages and
everything below them are left out; replies that a model wrote (``synthetic``) were ranked by people like the
others and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.data.readers.rows import BadRow, Reader, Row, is_text

_ROLES = {"prompter": "user", "assistant": "assistant"}


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The ranked sets of a tree, parents before children. Raises BadRow for a malformed message."""
    open_nodes: list[tuple[Mapping, Prompt]] = [(row["prompt"], ())]
    while open_nodes:
        node, path = open_nodes.pop()
        message = _message(node)
        if node.get("deleted"):
            continue
        here = (*path, message)
        replies = _replies(node)
        ranked = [reply for reply in replies if reply.get("rank") is not None and not reply.get("deleted")]
        ranked = [reply for reply in ranked if _message(reply).role == "assistant"]
        if message.role == "user" and len(ranked) >= 2:
            texts = tuple(_message(reply).content for reply in ranked)
            yield Comparison(here, texts, tuple(reply["rank"] for reply in ranked), source)
        open_nodes.extend((reply, here) for reply in reversed(replies))


def _message(node: Mapping) -> Message:
    if not is_text(node, "text", "role") or node["role"] not in _ROLES:
        raise BadRow("a message of the tree without text or without the role prompter or assistant")
    return Message(_ROLES[node["role"]], node["text"])


def _replies(node: Mapping) -> list[Mapping]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise BadRow("the replies of a message are not a list of messages")
    return replies


READER = Reader(
    'OpenAssistant tree {"prompt": {"text", "role", "replies"}}',
    lambda row: isinstance(row.get("prompt"), Mapping) and {"text", "role"} <= row["prompt"].keys(),
    parse,
)
