"""Pages for the people at this machine, served on loopback to who knows the address.

The address holds a random token, so no other user of the machine and no other page in the browser can guess
it. The Host header is checked against DNS rebinding, the Origin of a POST against forged requests of other
pages, and bodies are bounded. Routes are plain functions.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import signal
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlhf.errors import STOP_SIGNALS, UserError, refused_by_system

HOST = "127.0.0.1"
MOST_BYTES = 1 << 20  # of a request's body
SECONDS = 30  # that a client may take for one request
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DRAINED = 16 << 20  # bytes of a refused body that are read, so that the client gets to read the answer


@dataclass(frozen=True)
class Request:
    """What a route gets: the query's last value by name, and the JSON object of a POST's body."""

    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a route gives back. policy: the Content-Security-Policy of this reply."""

    content: str | bytes
    kind: str = "text/html"
    status: int = 200
    policy: str = POLICY


Routes = Mapping[str, Callable[[Request], Reply]]
"""By method and path below the token: {"GET /": page, "POST /answer": take}."""


class RefusedError(Exception):
    """A request that cannot be served: an HTTP status and a line for who sent it."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


def json_reply(value: object, status: int = 200) -> Reply:
    """A value as JSON."""
    return Reply(json.dumps(value, ensure_ascii=False), "application/json", status)


class Server:
    """A server of some routes, on a port of loopback, in threads of its own.

    Args:
        routes: what it serves.
        port: 0 for a free one.
        token: the part of the address that is not to be guessed; empty for a new one.

    Raises:
        UserError: the port is in use, or may not be opened.
    """

    def __init__(self, routes: Routes, port: int = 0, token: str = "") -> None:
        self.token = token or secrets.token_urlsafe(24)
        served, known = dict(routes), self.token

        class Handler(_Handler):
            routes, token = served, known

        try:
            self._server = _Listener((HOST, port), Handler)
        except OverflowError:
            raise UserError(f"PORT={port}: a port is a number from 1 to 65535") from None
        except OSError as error:
            remedies = {errno.EADDRINUSE: "is in use", errno.EACCES: "may not be opened by you"}
            if error.errno not in remedies:
                raise
            other = f"PORT={port % 50000 + 10001}"
            raise UserError(
                f"port {port} of {HOST} {remedies[error.errno]}: give another one ({other}) or none"
            ) from None
        self.port = int(self._server.server_address[1])
        self.url = f"http://{HOST}:{self.port}/{self.token}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def run(self) -> None:
        """Serve until Ctrl-C or another signal to stop; the caller then says goodbye."""
        stop = threading.Event()
        former = {number: signal.signal(number, lambda *_: stop.set()) for number in STOP_SIGNALS}
        try:
            while not stop.wait(1.0):
                pass
        finally:
            self.close()
            for number, handler in former.items():
                signal.signal(number, handler)


def port_of(text: str) -> int:
    """The port that PORT names, 0 for none.

    Raises:
        UserError: it is no number of a port.
    """
    if text and not (text.isdecimal() and 0 < int(text) < 65536):
        raise UserError(f"PORT={text}: a port is a number from 1 to 65535")
    return int(text or 0)


class _Listener(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False  # a slow client must not hold up the end

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server who this is
        self.server_name = HOST

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    routes: Routes
    token: str
    timeout = SECONDS
    server_version, sys_version = "pages", ""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the address holds the token."""

    def _answer(self, method: str) -> None:
        try:
            reply = self._routed(method)
        except RefusedError as error:
            reply = json_reply({"error": str(error)}, error.status)
        except (TimeoutError, ConnectionError):  # the client went away
            self.close_connection = True
            return
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else refused_by_system(error)
            if line is None:
                traceback.print_exc()
                line = f"{type(error).__name__}; the terminal of the server says more"
            else:
                print(f"error: {line}", file=sys.stderr, flush=True)
            reply = json_reply({"error": line}, 500)
        self._send(reply)

    def _routed(self, method: str) -> Reply:
        port = self.connection.getsockname()[1]
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in hosts:
            raise RefusedError(403, "this server answers on this machine only")
        address = urlsplit(self.path)
        token, _, path = address.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            raise RefusedError(403, "open the whole address that the terminal shows")
        body: Mapping[str, Any] = {}
        if method == "POST":
            if self.headers.get("Origin") not in {f"http://{host}" for host in hosts}:
                raise RefusedError(403, "a request of another page")
            body = self._body()
        route = self.routes.get(f"{method} /{path}")
        if route is None:
            raise RefusedError(404, "nothing here")
        return route(Request({key: values[-1] for key, values in parse_qs(address.query).items()}, body))

    def _body(self) -> Mapping[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise RefusedError(411, "the length of the request is not said")
        if len(length) > 12 or int(length) > MOST_BYTES:
            self._drain(min(_DRAINED, int(length[:12])))
            raise RefusedError(413, f"more than {MOST_BYTES:,} bytes")
        content = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "not application/json")
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RefusedError(400, "not a JSON object")
        return value

    def _drain(self, left: int) -> None:
        self.connection.settimeout(1.0)
        with contextlib.suppress(OSError):
            while left > 0 and (block := self.rfile.read(min(left, 1 << 16))):
                left -= len(block)

    def _send(self, reply: Reply) -> None:
        content = (
            reply.content.encode("utf-8", "replace") if isinstance(reply.content, str) else reply.content
        )
        text = reply.kind.startswith("text/") or reply.kind.endswith(("json", "javascript"))
        self.send_response(reply.status)
        for name, value in (
            ("Content-Type", reply.kind + ("; charset=utf-8" if text else "")),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", reply.policy),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
