"""The conversation of `make chat`: what a line means, which answer it goes on with, what is saved. No torch.

A line is a message to all models, a command (``/help``), or, behind answers, a judgment of them (``2``,
``=``, ``2>1=3``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from rlhf.data.comparisons import Comparison, Message, Prompt, prompt_problem

SOURCE = "chat"  # of the comparisons, for statistics by source

HELP = """\
  a text       goes to all models; begin it with a space if it looks like a command or a judgment
  1, 2, ...    that answer is the best: saved as a comparison, and the conversation goes on with it
  =            all are as good as each other
  2>1=3        the whole order, best first
  /use N       go on with answer N, nothing is saved
  /again       the next sample of all answers; /seed N: the first one under another seed
  /system TEXT begin anew under a system message; /prompt hhh (or a file, or none): under a prompt
  /undo        take back the last message and its answers, saved comparisons stay; /new: begin anew
  /quit        or Ctrl-D, ends; Ctrl-C stops an answer"""


class Answer(NamedTuple):
    """What one model said."""

    text: str
    score: float | None = None
    """By the run's reward model; None where there is none, or the answer was stopped."""
    tokens: int = 0
    end: str = ""
    """Why it ended, where the model did not end it: ``limit`` or ``stopped``."""


class Models(Protocol):
    """The models, as a conversation needs them."""

    names: Sequence[str]
    """What each is called."""

    def fault(self, prompt: Prompt, *, saved: bool = False) -> str | None:
        """Why they cannot read a prompt, or why a comparison of it could not be trained on; or None."""

    def prompt(self, name: str) -> Prompt:
        """The turns of a prompt file, of the recipe's with ``hhh``; UserError where it is none."""

    def answer(
        self, model: int, prompt: Prompt, *, seed: int, turn: int, sample: int, say: Callable[[str], None]
    ) -> Answer:
        """One answer, said piece by piece."""


class Conversation:
    """A conversation with all models at once.

    Args:
        models: the models.
        say: prints a text as it stands, without a line's end.
        save: writes a comparison.
        turns: whether earlier turns are read; else every message is a text of its own.
        seed: of the answers.
    """

    def __init__(
        self, models: Models, say: Callable[[str], None], save: Callable[[Comparison], Path], *,
        turns: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.models, self.say, self.save, self.turns, self.seed = models, say, save, turns, seed
        self.head: Prompt = ()
        self.before: list[Message] = []
        self.question: Message | None = None
        self.answers: list[Answer] = []
        self.kept = 0
        self.sample = 0
        self.saved = 0
        self._unjudged = False

    @property
    def asked(self) -> Prompt:
        """What the models were asked last."""
        assert self.question is not None
        return (*self.head, *self.before, self.question)

    def hear(self, line: str) -> bool:
        """Act on a line; False = it ends the conversation.

        Raises:
            UserError: a prompt file that is none.
        """
        if not line.strip():
            return True
        command, _, rest = line.strip().partition(" ")
        if line[0] == "/":
            return self._command(command, rest.strip())
        ranks = self._judgment(line) if self.answers else None
        if ranks is None:
            self._ask(Message("user", line.strip()))
        else:
            self._judge(ranks)
        return True

    # ---------------------------------------------------------------- asking

    def _ask(self, question: Message) -> None:
        before = self.before
        if self.question is not None and self.turns:
            before = [*before, self.question, Message("assistant", self.answers[self.kept].text)]
        prompt = (*self.head, *before, question)
        if fault := prompt_problem(prompt) or self.models.fault(prompt):
            self._tell(f"not asked: {fault}")
            return
        self.before, self.question, self.sample = list(before), question, 0
        self._answer()

    def _answer(self) -> None:
        turn, self.answers, self._unjudged = len(self.before) // 2, [], True
        for number, name in enumerate(self.models.names):
            self.say(f"\n[{number + 1}] {name}: ")
            answer = self.models.answer(
                number, self.asked, seed=self.seed, turn=turn, sample=self.sample, say=self.say
            )
            self.answers.append(answer)
            notes = [] if answer.score is None else [f"score {answer.score:+.2f}"]
            notes += [f"{answer.tokens} token{'s' * (answer.tokens != 1)}"]
            notes += {"limit": ["cut at the limit"], "stopped": ["stopped"]}.get(answer.end, [])
            self.say(f"\n    ({', '.join(notes)})\n")
        self.kept = len(self.answers) - 1

    # ---------------------------------------------------------------- judging

    def _judgment(self, line: str) -> tuple[int, ...] | None:
        """The rank of each answer by a line, None where it is no judgment."""
        number, text = len(self.answers), line.rstrip()
        if text == "=":
            return (0,) * number
        if not re.fullmatch(r"[1-9](?: *[>=] *[1-9])*", text):
            return None
        places = [int(digit) - 1 for digit in re.findall(r"\d", text)]
        if len(places) == 1 and places[0] < number:
            return tuple(int(n != places[0]) for n in range(number))
        if sorted(places) != list(range(number)):
            return None
        ranks, rank = [0] * number, 0
        for place, sign in zip(places, ["", *re.findall(r"[>=]", text)], strict=True):
            rank += sign == ">"
            ranks[place] = rank
        return tuple(ranks)

    def _judge(self, ranks: tuple[int, ...]) -> None:
        self.kept = ranks.index(0) if len(set(ranks)) > 1 else self.kept
        if fault := self._fault():
            self._tell(f"not saved: {fault}")
            return
        texts = tuple(answer.text for answer in self.answers)
        place = self.save(Comparison(self.asked, texts, ranks, SOURCE))
        self.saved, self._unjudged = self.saved + 1, False
        goes_on = f"; the conversation goes on with {self.models.names[self.kept]}" if self.turns else ""
        self._tell(f"saved in {place}{goes_on}")

    def _fault(self) -> str | None:
        """Why the answers cannot be saved as a comparison."""
        texts = [answer.text.strip() for answer in self.answers]
        if not self._unjudged:
            return "these answers have been judged; /again gives others"
        if len(texts) < 2:
            return "one model has nothing to be compared with (chat.models)"
        if any(answer.end == "stopped" for answer in self.answers):
            return "an answer was stopped; /again gives whole ones"
        if not all(texts):
            return "an answer is empty; /again gives others"
        if len(set(texts)) < 2:
            return "the answers are the same; /again gives others"
        return self.models.fault(self.asked, saved=True)

    # ---------------------------------------------------------------- commands

    def _command(self, command: str, rest: str) -> bool:
        if command == "/quit":
            return False
        if command == "/help":
            self._tell(HELP)
        elif command in ("/new", "/system", "/prompt"):
            self._begin(command, rest)
        elif command == "/undo":
            self._undo()
        elif command == "/seed" and re.fullmatch(r"\d{1,18}", rest):
            self.seed, self.sample = int(rest), 0
            self._again(f"seed {self.seed}")
        elif command == "/again" and not rest:
            self.sample += self.question is not None
            self._again("")
        elif command == "/use" and rest.isdecimal() and 0 < int(rest) <= len(self.answers):
            self.kept = int(rest) - 1
            self._tell(f"goes on with {self.models.names[self.kept]}")
        else:
            self._tell(f"{command} {rest}".strip() + ": no such command here; /help lists them")
        return True

    def _again(self, told: str) -> None:
        if self.question is not None:
            self._answer()
        else:
            self._tell(told or "nothing was asked yet")

    def _begin(self, command: str, rest: str) -> None:
        head: Prompt = ()
        if command == "/system" and rest:
            head = (Message("system", rest),)
        elif command == "/prompt" and rest not in ("", "none"):
            head = self.models.prompt(rest)
        if head and not self.turns:
            self._tell(f"{command} needs turns, and this recipe has dialogue.template=plain")
            return
        if head and (fault := self.models.fault((*head, Message("user", "?")))):
            self._tell(f"not taken: {fault}")
            return
        kept = command == "/new"
        self.head, self.before = self.head if kept else head, []
        self.question, self.answers = None, []
        self._tell("begun anew" + (", under the same prompt" if kept and self.head else ""))

    def _undo(self) -> None:
        if self.question is None and not self.before:
            self._tell("nothing to take back")
            return
        if self.question is None:
            self.before = self.before[:-2]
        self.question, self.answers = None, []
        self._tell(f"taken back; messages left: {len(self.before) // 2}")

    def _tell(self, line: str) -> None:
        self.say(f"{line}\n")
