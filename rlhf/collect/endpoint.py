"""A judge behind an HTTP server with OpenAI's chat completions: asked, timed, tried again, remembered.

The answer has to be one number in a given range; everything else is asked again, and then refused or left
out. Answers lie on the disk by server, model, question and sampling, so a resumed run asks nothing twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Headers
from pathlib import Path
from typing import IO, Any, NoReturn

from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError, first_line
from rlhf.recipe.types import Endpoint
from rlhf.runs.cache import remember
from rlhf.runs.processes import rank

_ANSWER = re.compile(r"\W*?(?:score|rating)?\W*?([-+]?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?\W*", re.IGNORECASE)
_MOST_BYTES = 1 << 20  # of an answer
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which it is worth another try
_LONGEST_PAUSE = 30.0  # seconds


class _TryAgain(Exception):
    """Why an answer was not one; the next may be."""


class HttpJudge:
    """A judge of responses (:data:`rlhf.collect.judges.Judge`) that asks a server.

    Args:
        section: the recipe's judge.
        key: the recipe's key that holds it, for messages.
        pause: seconds before the second try; each further one waits twice as long.
    """

    def __init__(self, section: Endpoint, key: str, *, pause: float = 1.0) -> None:
        self.section, self.key, self.pause = section, key, pause
        self._opener = urllib.request.build_opener(_NoRedirects, *([] if section.remote else [_no_proxy()]))
        self._key = ""
        if section.key_variable:
            self._key = os.environ.get(section.key_variable, "")
            if not self._key:
                raise UserError(f"{key}.key_variable: {section.key_variable} is not set in the environment")

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """One number a response, NaN for prose where the recipe lets that pass.

        Raises:
            UserError: the server is down, too slow or refuses, or an answer is no number in the range.
        """
        asked = [self._question(p, r) for p, r in zip(prompts, responses, strict=True)]
        different = list(dict.fromkeys(asked))
        with ThreadPoolExecutor(self.section.concurrency) as pool:
            jobs = [pool.submit(self._remembered, question) for question in different]
            try:
                answers = dict(zip(different, (job.result() for job in jobs), strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        scores = (answers[question] for question in asked)
        return [math.nan if score is None else float(score) for score in scores]

    def check(self) -> None:
        """Ask one question, so that a server that is not there is known at the start.

        Raises:
            UserError: as a call.
        """
        self._answer(self._question((), "Hello."))

    def _question(self, prompt: Prompt, response: str) -> str:
        said = [f"{message.role}: {message.content}" for message in prompt]
        asked = prompt[0].content if len(prompt) == 1 else "\n\n".join(said)
        parts = {"{prompt}": asked, "{response}": response}
        return re.sub(r"\{prompt\}|\{response\}", lambda match: parts[match[0]], self.section.prompt)

    def _body(self, question: str) -> dict[str, Any]:
        section = self.section
        return {
            "model": section.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": section.temperature,
            "max_tokens": section.max_tokens,
        }

    def _remembered(self, question: str) -> float | None:
        section = self.section
        if section.cache is None:
            return self._answer(question)
        key = {**self._body(question), "url": section.url, "range": [section.lowest, section.highest]}
        key |= {"prose": section.on_prose, "pattern": section.pattern}
        folder = Path(section.cache).expanduser() / str(rank())  # processes do not write each other's files
        name = re.sub(r"[^\w.-]", "-", section.model)[:60]
        found: float | None = remember(folder, name, key, lambda: self._answer(question))
        return found

    def _answer(self, question: str) -> float | None:
        """The number that the server says; None for prose that the recipe lets pass."""
        section, body = self.section, json.dumps(self._body(question)).encode()
        fault: Exception = _TryAgain()
        for attempt in range(section.tries):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                return self._number(self._reply(body))
            except _TryAgain as error:
                fault = error
        prose = isinstance(fault, _Prose)
        if prose and section.on_prose == "ignore":
            return None
        remedy = (
            "say in judge.prompt what form the answer has, find it by pattern, raise max_tokens, or set "
            "on_prose: ignore"
            if prose
            else f"start it or correct {self.key}.url, and run again"
        )
        tries = "1 try" if section.tries == 1 else f"{section.tries} tries"
        raise UserError(f"{self.key}: {section.url} {fault} in {tries}; {remedy}")

    def _number(self, text: str) -> float:
        section, match = self.section, _ANSWER.fullmatch(text)
        found = [match[1]] if match else []
        if section.pattern is not None:
            found = re.findall(section.pattern, text)
        with contextlib.suppress(ValueError):  # what the recipe's own pattern takes for a number
            if found and section.lowest <= float(found[-1]) <= section.highest:
                return float(found[-1])
        said = f"{' '.join(text.split())[:80]!r}"
        raise _Prose(f"answered {said}, no number from {section.lowest:g} to {section.highest:g},")

    def _reply(self, body: bytes) -> str:
        """The text of one answer.

        Raises:
            UserError: the server refuses the question.
            _TryAgain: it is not there, too slow or too busy.
        """
        section = self.section
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{section.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=section.timeout_seconds) as answer:
                read = answer.read(_MOST_BYTES)
            return str(json.loads(read)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read(200).decode("utf-8", "replace").split())
            line = f"answers with HTTP status {error.code} ({reason})"
            if error.code in _PASSING:
                raise _TryAgain(line) from None
            raise UserError(f"{self.key}: {section.url} {line}; correct url, model or key_variable") from None
        except (TimeoutError, urllib.error.URLError) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise _TryAgain(f"gave no answer within {section.timeout_seconds:g} s") from None
            raise _TryAgain(f"cannot be reached ({first_line(_as_error(cause))})") from None
        except (OSError, EOFError) as error:
            raise _TryAgain(f"broke off ({first_line(error)})") from None
        except (ValueError, LookupError, TypeError):
            raise _TryAgain("answers in another form than chat completions") from None


class _Prose(_TryAgain):
    """An answer that is no number."""


def _as_error(cause: object) -> BaseException:
    return cause if isinstance(cause, BaseException) else OSError(str(cause))


def _no_proxy() -> urllib.request.ProxyHandler:
    """No proxy, whatever the environment says: the server is on this machine."""
    return urllib.request.ProxyHandler({})


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is sent to one server is not sent on to another."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> NoReturn:
        """Refuse."""
        raise urllib.error.HTTPError(req.full_url, code, f"redirects to {newurl}", headers, fp)
