"""The judge over HTTP against a stand-in server on the loopback: asked, tried again, remembered, refused."""

import math
import threading
import time

import pytest
from conftest import tiny_recipe
from stand_in_server import StandIn, length

from rlhf.collect.endpoint import HttpJudge
from rlhf.collect.judges import check_judge
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.types import Endpoint

PROMPTS = [(Message("user", "name {response}"),), (Message("user", "a"), Message("assistant", "b"))]


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody: the loopback is asked without a proxy
    running = []

    def start(answer):
        running.append(StandIn(answer))
        return running[-1]

    yield start
    for each in running:
        each.stop()


def judge(url, **options):
    return HttpJudge(Endpoint(url=url, model="m", **options), "evaluate.judge", pause=0.01)


def test_every_response_is_asked_about_once_and_remembered(serve):
    server = serve(length)
    asked = judge(server.url)
    assert asked([PROMPTS[0]] * 3, ["four", "ten", "four"]) == [4.0, 3.0, 4.0]
    assert len(server.asked) == 2
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert {k: body[k] for k in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 16,
    }
    assert "Authorization" not in server.headers[0]
    # another start reads the disk; another prompt or range is another question
    assert judge(server.url)([PROMPTS[0]], ["four"]) == [4.0]
    assert len(server.asked) == 2
    assert judge(server.url, highest=9)([PROMPTS[0]], ["four"]) == [4.0]
    assert judge(server.url)([PROMPTS[1]], ["four"]) == [4.0]
    assert judge(server.url, cache=None)([PROMPTS[0]], ["four"]) == [4.0]
    assert len(server.asked) == 5


def test_the_question_holds_the_texts_as_they_are(serve):
    server = serve(lambda *_: "1")
    ask = judge(server.url, prompt="{prompt}|{response}|{other}")
    ask([PROMPTS[0]], ["say {prompt} {"])
    ask([PROMPTS[1]], ["c"])
    said = [body["messages"][0]["content"] for _, body in server.asked]
    assert said == ["name {response}|say {prompt} {|{other}", "user: a\n\nassistant: b|c|{other}"]


@pytest.mark.parametrize(
    ("said", "number"),
    [("7", 7.0), (" 7.5\n", 7.5), ("Score: 3", 3.0), ("**8**", 8.0), ("8/10", 8.0), ("rating 0.", 0.0)],
)
def test_a_number_is_read_however_it_is_dressed(serve, said, number):
    assert judge(serve(lambda *_: said).url)([PROMPTS[0]], ["x"]) == [number]


@pytest.mark.parametrize("said", ["I would give it 7 of 10 points", "11", "-1", "", "seven", "nan"])
def test_prose_is_asked_again_and_then_refused_or_passed_over(serve, said):
    server = serve(lambda *_: said)
    with pytest.raises(
        UserError, match=r"answered .*, no number from 0 to 10, in 3 tries; say in judge\.prompt"
    ):
        judge(server.url)([PROMPTS[0]], ["x"])
    assert len(server.asked) == 3
    assert math.isnan(judge(server.url, on_prose="ignore")([PROMPTS[0]], ["x"])[0])
    assert judge(serve(lambda _, n: said if n < 3 else "5").url)([PROMPTS[0]], ["y"]) == [5.0]


def test_a_pattern_of_the_recipe_finds_the_number_in_an_answer_with_reasons(serve):
    server = serve(
        lambda *_: "It names 1 river, so 10 of 10 for brevity. Grade: 4\nThat is my Grade: 6.5, all told."
    )
    assert judge(server.url, pattern=r"Grade: ([\d.]+\d)")([PROMPTS[0]], ["x"]) == [6.5]
    with pytest.raises(UserError, match=r"no number from 0 to 10, in 1 try; .* find it by pattern"):
        judge(server.url, pattern=r"(grade)", tries=1)([PROMPTS[0]], ["y"])
    with pytest.raises(UserError, match="no number from 0 to 5"):
        judge(server.url, pattern=r"Grade: ([\d.]+\d)", highest=5, tries=1)([PROMPTS[0]], ["y"])


def test_a_busy_server_is_tried_again_and_one_that_refuses_is_not(serve):
    busy = serve(lambda _, n: (503, "loading", {}) if n < 3 else "6")
    assert judge(busy.url)([PROMPTS[0]], ["x"]) == [6.0]
    refuses = serve(lambda *_: (404, "no such model", {}))
    with pytest.raises(
        UserError, match=r"HTTP status 404 \(no such model\); correct url, model or key_variable"
    ):
        judge(refuses.url)([PROMPTS[0]], ["x"])
    assert len(refuses.asked) == 1


def test_a_server_that_sends_elsewhere_is_not_followed(serve):
    other = serve(lambda *_: "9")
    server = serve(lambda *_: (302, "", {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(UserError, match="HTTP status 302"):
        judge(server.url)([PROMPTS[0]], ["x"])
    assert other.asked == []


def test_a_server_that_is_down_or_slow_is_told_with_what_to_do(serve):
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached \(.*refused.*\) in 2 tries; start"
    ):
        judge("http://127.0.0.1:9/v1", tries=2)([PROMPTS[0]], ["x"])
    slow = serve(lambda *_: time.sleep(0.5) or "5")
    with pytest.raises(UserError, match=r"gave no answer within 0\.05 s in 1 try"):
        judge(slow.url, timeout_seconds=0.05, tries=1)([PROMPTS[0]], ["x"])
    with pytest.raises(UserError, match=r"ppo\.rewards\[0\]: .* cannot be reached"):
        check_judge(
            Endpoint(url="http://127.0.0.1:9/v1", model="m", tries=1), tiny_recipe(), "ppo.rewards[0]"
        )
    with pytest.raises(
        UserError, match=r"evaluate\.judge\.on_prose=ignore: a judge must score every response"
    ):
        check_judge(Endpoint(url=slow.url, model="m", on_prose="ignore"), tiny_recipe(), "evaluate.judge")
    odd = serve(lambda *_: (200, None, {}))
    with pytest.raises(UserError, match="answered ''"):
        judge(odd.url, tries=1)([PROMPTS[0]], ["x"])


def test_the_key_comes_from_the_environment_alone(serve, monkeypatch, tmp_path):
    server = serve(length)
    with pytest.raises(UserError, match=r"evaluate\.judge\.key_variable: JUDGE_KEY is not set"):
        judge(server.url, key_variable="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    judge(server.url, key_variable="JUDGE_KEY")([PROMPTS[0]], ["x"])
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"s3cret" in f.read_bytes()]


def test_questions_are_asked_together(serve):
    together = threading.Barrier(4, timeout=10)
    server = serve(lambda *_: str(together.wait() * 0 + 2))
    assert judge(server.url, concurrency=4)([PROMPTS[0]] * 4, list("abcd")) == [2.0] * 4
