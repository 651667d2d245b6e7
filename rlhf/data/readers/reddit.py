"""Posts and comments of Reddit, in two forms.

A row of SHP (Ethayarajh et al. 2022; hub: stanfordnlp/SHP) is {"history", "human_ref_A", "human_ref_B",
"labels"}: two comments on one post, ``labels`` 1 = A is preferred, 0 = B. In that data the preferred comment
has the higher score although it was written later; the rows are taken as they are.

A tree of comments is a post {"title", "selftext" or "body", "comments" or "replies": [{"body", "score",
"replies": [...]}]}. The post and every comment with two or more scored replies give one k-way comparison,
ranked by score (Askell et al. 2021, arXiv:2112.00861, section 4.1). The prompt is one user message: title and
text of the post, then the comments on the way down, separated by blank lines. "[deleted]" and "[removed]"
comments are left out with everything below them, comments without a score (hidden) are not ranked; each is
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_list, is_text, ranked_by_score

_GONE = frozenset(("[deleted]", "[removed]", "[ deleted ]", "[ removed by reddit ]"))


def parse(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    """The row's comparisons, parents before children. Raises BadRow for labels or scores of another type."""
    if "human_ref_A" in row:
        yield _pair(row, source)
    else:
        yield from _tree(row, source)


def _pair(row: Row, source: str) -> Comparison | LeftOut:
    label = row.get("labels")
    if label not in (0, 1, "0", "1") or isinstance(label, bool):
        raise BadRow("labels is neither 0 nor 1", f"{label!r}"[:80])
    prompt = (Message("user", row["history"]),)
    responses = (row["human_ref_A"], row["human_ref_B"])
    if any(map(_is_gone, responses)):
        return LeftOut("a deleted or removed comment", prompt)
    return Comparison(prompt, responses, (0, 1) if int(label) == 1 else (1, 0), source)


def _tree(post: Row, source: str) -> Iterator[Comparison | LeftOut]:
    text = post.get("selftext") or post.get("body") or ""
    if not isinstance(text, str):
        raise BadRow("the text of a post is not a text", f"a {type(text).__name__}")
    if _is_gone(post["title"]) or _is_gone(text):
        raise LeftOut("a deleted or removed post")
    top = f"{post['title'].strip()}\n\n{text.strip()}".strip()
    open_nodes: list[tuple[Mapping[str, Any], str]] = [(post, top)]
    while open_nodes:
        node, above = open_nodes.pop()
        prompt = (Message("user", above),)
        texts, scores, below = [], [], []
        for reply in _replies(node):
            if not is_text(reply, "body"):
                raise BadRow("a comment without text in body")
            if _is_gone(reply["body"]):
                yield LeftOut("a deleted or removed comment", prompt)
                continue
            below.append((reply, f"{above}\n\n{reply['body'].strip()}"))
            if reply.get("score") is None:
                yield LeftOut("a comment without a score", prompt)
            elif not isinstance(reply["score"], int) or isinstance(reply["score"], bool):
                raise BadRow("the score of a comment is not a whole number", f"{reply['score']!r}"[:80])
            else:
                texts.append(reply["body"].strip())
                scores.append(reply["score"])
        if len(texts) >= 2:
            yield ranked_by_score(prompt, texts, scores, source)
        open_nodes.extend(reversed(below))


def _is_gone(text: str) -> bool:
    return text.strip().lower() in _GONE


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies = node.get("comments") or node.get("replies") or []  # Reddit writes "" for none
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise BadRow("the replies of a comment are not a list of comments")
    return replies


READER = Reader(
    'Reddit: SHP {"history", "human_ref_A", "human_ref_B", "labels"} or {"title", "selftext", "comments"}',
    lambda row: (
        is_text(row, "history", "human_ref_A", "human_ref_B")
        or (is_text(row, "title") and is_list(row, "comments" if "comments" in row else "replies"))
    ),
    parse,
)
