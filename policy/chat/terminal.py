"""The terminal of `make chat`: lines in, texts out, and Ctrl-C, which stops an answer and not the program."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator

_KEPT = "\n\t\u200c\u200d"  # of what is not printable: joiners belong to letters and emoji
_PROMPT = "\n> "


def shown(text: str) -> str:
    """A text that a terminal shows and does not obey: without escape sequences and control characters, nor
    those that reverse the direction of what follows."""
    return "".join(c if c.isprintable() or c in _KEPT else "\ufffd" for c in text)


def say(text: str) -> None:
    """Print a piece of text at once."""
    print(shown(text), end="", flush=True)


class Pieces:
    """Says a text that grows, from its beginning each time, piece by piece.

    Args:
        say: prints a piece.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.said = say, ""

    def grow(self, text: str, *, whole: bool = False) -> None:
        """Say what is new; half a letter at the end waits for its other half, unless the text is whole."""
        stable = text if whole else text.rstrip("\ufffd")
        if stable.startswith(self.said):
            self.say(stable[len(self.said) :])
            self.said = stable
        elif whole:  # the tokenizer has changed what was said
            self.say(f"\n{stable}")


class Interrupts:
    """Notes Ctrl-C instead of dying of it."""

    def __init__(self) -> None:
        self.asked = False
        """Whether it was pressed; whoever obeys sets it back."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, Ctrl-C sets ``asked`` and does nothing else."""
        self.asked = False
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "asked", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, line by line, until it ends; Ctrl-C empties the line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = input(_PROMPT if typed else "")
        except EOFError:
            say("\n" if typed else "")
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit ends)\n")
            continue
        if not typed and line:
            say(f"{_PROMPT}{line}\n")
        yield line
