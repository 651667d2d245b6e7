"""Who is asked what: a session of ranking, kept in a file of answers. No web here.

Nobody is asked the same twice; a prompt goes to as many people as the recipe says; each sees its responses
in an order of their own, and not who wrote them. All that counts is in the file, so a killed server goes on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.comparisons import Comparison, Prompt
from rlhf.rank.store import Answer, Store, answer
from rlhf.web.server import RefusedError

SEAT_SECONDS = 30.0  # without a sign of a page, after which its name is free
HELD_SECONDS = 1800.0  # that a prompt waits for the one who has it on the page
LONGEST_NAME, LONGEST_REASON = 40, 2000  # characters
OUTCOMES = ("ranked", "skipped", "all_bad")


@dataclass(frozen=True)
class Item:
    """A prompt and what is to be ranked. writers: who wrote each response; nobody who ranks sees it."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    writers: tuple[str, ...]


class Session:
    """A ranking session over some items.

    Args:
        items: in the order in which they are asked.
        store: where answers are kept, and those of earlier starts are found.
        overlap: people who rank each item.
        seed: of the orders of the responses.
        clock: seconds.
    """

    def __init__(
        self,
        items: Sequence[Item],
        store: Store,
        *,
        overlap: int = 1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.items, self.store, self.overlap, self.seed = {x.id: x for x in items}, store, overlap, seed
        self._clock, self._lock = clock, threading.RLock()
        self._seats: dict[str, tuple[str, float]] = {}  # name -> seat, last sign
        self._held: dict[str, tuple[str, float]] = {}  # name -> item, since
        self._names: dict[str, str] = {}  # as first written, by the folded one
        self.answers: dict[str, dict[str, Answer]] = {item: {} for item in self.items}
        """By item and annotator."""
        for row in store.rows():
            item, name = row.get("item"), row.get("annotator")
            if item in self.answers and isinstance(name, str):
                self.answers[item][self._names.setdefault(name.casefold(), name)] = row

    def next(self, name: str, seat: str) -> dict[str, Any]:
        """What a person is to rank now, without who wrote it; ``item`` is None where nothing is left.

        Raises:
            RefusedError: the name cannot be used, or is in use in another window.
        """
        with self._lock:
            name = self._enter(name, seat)
            item = self._held_by(name) or self._choose(name)
            if item is not None:
                self._held.setdefault(name, (item.id, self._clock()))
            return self._task(name, item)

    def save(self, name: str, seat: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Keep an answer, then give the next task; an answer that is kept already is not kept twice.

        said: ``item``, ``outcome``, ``ranks`` in the order shown (of "ranked"), ``reason``, ``seconds``.

        Raises:
            RefusedError: as :meth:`next`; or what is said is no answer.
        """
        with self._lock:
            name = self._enter(name, seat)
            item = self.items.get(str(said.get("item")))
            if item is None:
                raise RefusedError(400, "this prompt is not of this session: reload the page")
            if name not in self.answers[item.id]:
                row = self._row(name, item, said)
                self.store.append(row)
                self.answers[item.id][name] = row
            self._held.pop(name, None)
            return self.next(name, seat)

    def undo(self, name: str, seat: str) -> dict[str, Any]:
        """Take the person's last answer back, and ask for it again, filled in."""
        with self._lock:
            name = self._enter(name, seat)

            def own(row: Answer) -> bool:
                known = row.get("item") in self.items
                return known and str(row.get("annotator")).casefold() == name.casefold()

            row = self.store.take_back(own)
            if row is None:
                raise RefusedError(409, "there is no answer of yours to take back")
            item = self.items[row["item"]]
            self.answers[item.id].pop(name, None)
            self._held[name] = (item.id, self._clock())
            shown = [row["ranks"][place] for place in self._order(name, item)]
            whole = not (row.get("skipped") or row.get("all_bad"))
            former = {"ranks": shown if whole else None, "reason": row.get("reason", "")}
            return {**self._task(name, item), "former": former}

    def leave(self, name: str, seat: str) -> dict[str, Any]:
        """Give the name, and the prompt on the page, back."""
        with self._lock:
            name = self._name(name)
            if self._seats.get(name, ("",))[0] == seat:
                self._seats.pop(name)
                self._held.pop(name, None)
            return {}

    def alive(self, name: str, seat: str) -> dict[str, Any]:
        """A sign that the page is still there."""
        with self._lock:
            self._enter(name, seat)
            return {}

    def _name(self, name: str) -> str:
        clean = " ".join(name.split())
        if not clean or len(clean) > LONGEST_NAME or not clean.isprintable():
            raise RefusedError(400, f"a name has 1 to {LONGEST_NAME} letters")
        return self._names.setdefault(clean.casefold(), clean)

    def _enter(self, name: str, seat: str) -> str:
        name, now = self._name(name), self._clock()
        if not 8 <= len(seat) <= 64:
            raise RefusedError(400, "the page has no number of its own: reload it")
        other, seen = self._seats.get(name, (seat, now))
        if other != seat and now - seen < SEAT_SECONDS:
            raise RefusedError(
                409,
                f"{name} is ranking in another window: choose another name, or close that window; "
                f"one that was killed is free after {SEAT_SECONDS:.0f} seconds",
            )
        self._seats[name] = (seat, now)
        return name

    def _held_by(self, name: str) -> Item | None:
        item, _ = self._held.get(name, (None, 0.0))
        if item is None or name in self.answers[item]:
            self._held.pop(name, None)
            return None
        return self.items[item]

    def _choose(self, name: str) -> Item | None:
        now = self._clock()
        held = [item for item, since in self._held.values() if now - since < HELD_SECONDS]
        for item in self.items.values():
            given = self.answers[item.id]
            ranked = sum(not row.get("skipped") for row in given.values())
            if name not in given and ranked + held.count(item.id) < self.overlap:
                return item
        return None

    def _order(self, name: str, item: Item) -> list[int]:
        """Places of the responses as this person sees them."""
        order = list(range(len(item.responses)))
        random.Random(f"{self.seed}:{name}:{item.id}").shuffle(order)
        return order

    def _task(self, name: str, item: Item | None) -> dict[str, Any]:
        mine = sum(name in given for given in self.answers.values())
        open_ = sum(
            name not in given and sum(not row.get("skipped") for row in given.values()) < self.overlap
            for given in self.answers.values()
        )
        counts = {"name": name, "done": mine, "left": open_}
        if item is None:
            return {**counts, "item": None}
        return {
            **counts,
            "item": item.id,
            "prompt": [{"role": m.role, "content": m.content} for m in item.prompt],
            "responses": [item.responses[place] for place in self._order(name, item)],
        }

    def _row(self, name: str, item: Item, said: Mapping[str, Any]) -> Answer:
        number = len(item.responses)
        outcome, reason, seconds = said.get("outcome"), said.get("reason", ""), said.get("seconds")
        if outcome not in OUTCOMES or not isinstance(reason, str) or len(reason) > LONGEST_REASON:
            raise RefusedError(400, f"no answer: {OUTCOMES} and a reason of up to {LONGEST_REASON} letters")
        ranks = [0] * number
        if outcome == "ranked":
            shown = said.get("ranks")
            if not (
                isinstance(shown, list)
                and len(shown) == number
                and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < number for x in shown)
            ):
                raise RefusedError(400, f"the ranks are not {number} numbers from 0 to {number - 1}")
            dense = {rank: place for place, rank in enumerate(sorted(set(shown)))}
            for place, rank in zip(self._order(name, item), shown, strict=True):
                ranks[place] = dense[rank]
        timed = isinstance(seconds, int | float) and 0 < seconds < 1e6
        return answer(
            Comparison(item.prompt, item.responses, tuple(ranks), source="people"),
            name,
            item=item.id,
            reason=reason.strip(),
            skipped=outcome == "skipped",
            all_bad=outcome == "all_bad",
            seconds=round(float(seconds), 1) if timed and seconds else None,
            writers=list(item.writers),
        )
