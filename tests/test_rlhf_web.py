"""The loopback server: who is let in, who is refused, and how it starts and ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing

import pytest
from conftest import ROOT

from rlhf.errors import UserError
from rlhf.web.server import HOST, MOST_BYTES, RefusedError, Reply, Request, Server, json_reply, port_of


@pytest.fixture
def server():
    def fail(_: Request) -> Reply:
        raise UserError("no such answer; give another")

    def refuse(_: Request) -> Reply:
        raise RefusedError(409, "another has this name")

    routes = {
        "GET /": lambda request: Reply(f"<p>{request.query.get('a', 'page')}"),
        "POST /echo": lambda request: json_reply(request.body),
        "POST /fail": fail,
        "POST /refuse": refuse,
    }
    with closing(Server(routes)) as found:
        yield found


def ask(server, method="GET", path="", body=None, token=None, **headers):
    """(status, text, headers) of a request that is right but for what is given."""
    origin = f"http://{HOST}:{server.port}"
    given = {"Host": f"{HOST}:{server.port}"}
    if method == "POST":
        given |= {"Origin": origin, "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(HOST, server.port, timeout=10)
    connection.putrequest(method, f"/{server.token if token is None else token}/{path}", skip_host=True)
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if method == "POST":
        given.setdefault("Content-Length", str(len(content)))
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(content)
    reply = connection.getresponse()
    return reply.status, reply.read().decode(), reply.headers


def test_a_page_and_a_post_go_to_their_routes(server):
    status, text, headers = ask(server, path="?a=b")
    assert (status, text) == (200, "<p>b")
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "POST", "echo", {"text": "é"})[:2] == (200, '{"text": "é"}')
    assert ask(server, path="echo")[0] == 404
    assert ask(server, path="../etc/passwd")[0] == 404


def test_who_does_not_know_the_address_is_refused(server):
    for token in ("", "x", server.token[:-1], server.token + "x", "é"):
        try:
            assert ask(server, token=token)[0] == 403, token
        except UnicodeEncodeError:
            assert token == "é"  # which no request can hold
    assert ask(server, token="%C3%A9")[0] == 403
    assert ask(server, token=f"x/../{server.token}")[0] == 403


def test_another_host_is_refused(server):
    for host in ("evil.example", f"evil.example:{server.port}", HOST, None):
        assert ask(server, Host=host)[0] == 403, host
    assert ask(server, Host=f"localhost:{server.port}")[0] == 200


def test_a_post_of_another_page_is_refused(server):
    for origin in ("http://evil.example", "null", None, f"http://{HOST}:{server.port + 1}"):
        assert ask(server, "POST", "echo", {}, Origin=origin)[0] == 403, origin
    # a form of another page can send no JSON without asking before
    assert ask(server, "POST", "echo", {}, Content_Type="text/plain")[0] == 415


def test_too_large_and_senseless_bodies_are_refused(server):
    assert ask(server, "POST", "echo", b"x" * (MOST_BYTES + 1))[0] == 413
    assert ask(server, "POST", "echo", b"", Content_Length="9" * 40)[0] == 413
    assert ask(server, "POST", "echo", b"", Content_Length=None)[0] == 411
    assert ask(server, "POST", "echo", b"", Content_Length="-1")[0] == 411
    for body in (b"{", b"[1]", b"[" * 100_000, b"\xff"):
        assert ask(server, "POST", "echo", body)[0] == 400


def test_faults_are_a_line_and_the_server_goes_on(server):
    assert ask(server, "POST", "fail", {})[:2] == (500, '{"error": "no such answer; give another"}')
    assert ask(server, "POST", "refuse", {})[:2] == (409, '{"error": "another has this name"}')
    assert ask(server)[0] == 200


def test_it_listens_on_loopback_only(server):
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection(("127.0.0.2", server.port), timeout=2)


def test_a_port_in_use_is_one_line(server):
    with pytest.raises(UserError, match=rf"port {server.port} .* is in use: give another one \(PORT=\d+\)"):
        Server({}, server.port)
    for text in ("x", "0", "65536", "-1", "8e3"):
        with pytest.raises(UserError, match="a port is a number"):
            port_of(text)
    assert (port_of(""), port_of("8123")) == (0, 8123)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_cleanly(number):
    code = (
        "from rlhf.web.server import Server; s = Server({}); print(s.url, flush=True); s.run(); print('bye')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith(f"http://{HOST}:")
        time.sleep(0.2)
        os.kill(process.pid, number)
        assert process.communicate(timeout=20) == ("bye\n", "")
    assert process.returncode == 0
