"""HumanEval: programs, pass@k, and the verdicts of the 164 real problems."""

import itertools

import pytest
from conftest import DATA

from rlhf.errors import UserError
from rlhf.evals.sandbox import run as sandbox
from rlhf.evals.sandbox.run import Verdict
from rlhf.evals.tasks import humaneval
from rlhf.evals.tasks.humaneval import Item, pass_at_k

HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
ADD = Item(
    "own/add",
    'def add(x, y):\n    """Sum."""\n',
    "add",
    "    return x + y\n",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n",
)
NEGATE = Item(
    "own/negate", "def negate(x):\n", "negate", "    return -x\n", "def check(f):\n    assert f(2) == -2\n"
)


@pytest.fixture
def shut_in():
    """Skips where programs cannot be shut in."""
    found, why_not = sandbox.isolation()
    if found is None:
        pytest.skip(f"no isolation on this machine: {why_not}")


# ---------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n):
    for c in range(n + 1):
        passed = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(passed, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_is_a_number():
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 101, 100) == 1.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 3, 1) == pytest.approx(3e-4)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_of_impossible_counts_is_refused(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("stop", humaneval.STOP)
def test_a_completion_ends_where_the_function_does(stop):
    body = "    if x:\n        print(x)  # here\n    return x\n"
    assert humaneval.truncated(f"{body}{stop} f\nclass A\n") == body
    assert humaneval.truncated(body) == body


def test_the_stop_strings_are_those_of_the_paper():
    assert set(humaneval.STOP) == {"\nclass", "\ndef", "\n#", "\nif", "\nprint"}


def test_the_program_is_prompt_completion_tests_and_their_call():
    lines = humaneval.program(ADD, ADD.solution).splitlines()
    assert lines[0] == "def add(x, y):"
    assert lines[2] == "    return x + y"
    assert lines[-1] == "check(add)"
    exec(humaneval.program(ADD, ADD.solution), {})
    with pytest.raises(AssertionError):
        exec(humaneval.program(ADD, "    return x - y\n"), {})


# ---------------------------------------------------------------------------------- running


def test_code_runs_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *a: pytest.fail("code was run"))
    for allowed in (False, None, 1, "true"):
        with pytest.raises(UserError, match=r"off unless asked for: set tax\.allow_generated_code=true"):
            humaneval.check([ADD], [[ADD.solution]], allow_code=allowed)
        with pytest.raises(UserError, match="off unless asked for"):
            humaneval.run(Parrot([]), [ADD], allow_code=allowed)


def test_code_is_neither_written_nor_run_without_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: (None, "root: not root"))
    with pytest.raises(UserError, match="no program is run"):
        humaneval.check([ADD], [[ADD.solution]], allow_code=True)
    with pytest.raises(UserError, match="no program is run"):
        humaneval.run(Parrot(None), [ADD], allow_code=True)


@pytest.mark.usefixtures("shut_in")
def test_verdicts_stand_where_their_completions_do():
    good, bad = ADD.solution, "    return 0\n"
    found = humaneval.check([ADD, NEGATE], [[bad, good, bad, good], [NEGATE.solution]], allow_code=True)
    failed = Verdict("failed", "AssertionError")
    assert found == [[failed, Verdict("passed"), failed, Verdict("passed")], [Verdict("passed")]]


def test_equal_programs_are_run_once(monkeypatch):
    ran = []
    monkeypatch.setattr(sandbox, "require", lambda: None)
    monkeypatch.setattr(sandbox, "run", lambda text: ran.append(text) or Verdict("passed"))
    humaneval.check([ADD], [["    x", "    y", "    x\nprint(1)"]], allow_code=True)
    assert len(ran) == 2


class Parrot:
    """Stands for a language model: says given texts, and notes what it was asked."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = None

    def encode(self, text):
        return list(text.encode())

    def generate(self, contexts, **options):
        assert self.texts is not None, "it was asked to write"
        self.asked = contexts, options
        return [self.texts[i % len(self.texts)] for i in range(len(contexts))]


@pytest.mark.usefixtures("shut_in")
def test_a_model_is_asked_for_samples_and_they_are_counted():
    lm = Parrot([ADD.solution, "    return 1 / 0\n", "    return x\n"])
    outcome = humaneval.run(
        lm, [ADD, NEGATE], samples=3, temperature=0.8, top_p=0.95, ks=(1, 2), seed=5, allow_code=True
    )
    contexts, options = lm.asked
    assert [bytes(c).decode() for c in contexts] == [ADD.prompt] * 3 + [NEGATE.prompt] * 3
    assert options["names"] == ["own/add"] * 3 + ["own/negate"] * 3
    assert options["stop"] == humaneval.STOP
    assert (options["temperature"], options["top_p"], options["seed"]) == (0.8, 0.95, 5)
    assert outcome.metric == "pass@1"
    assert outcome.higher_is_better
    assert outcome.ids == ["own/add", "own/negate"]
    assert outcome.values == {
        "pass@1": [pytest.approx(1 / 3), 0.0],
        "pass@2": [pytest.approx(2 / 3), 0.0],
    }
    assert outcome.notes == ["6 programs, 3 a problem: 5 failed, 1 passed"]


@pytest.mark.usefixtures("shut_in")
def test_without_temperature_one_sample_stands_for_all():
    lm = Parrot([ADD.solution])
    outcome = humaneval.run(lm, [ADD], samples=3, ks=(3,), allow_code=True)
    assert len(lm.asked[0]) == 1
    assert outcome.values == {"pass@3": [1.0]}


@pytest.mark.usefixtures("shut_in")
@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_told(k):
    with pytest.raises(UserError, match=rf"pass@{k} cannot be had from 2 samples"):
        humaneval.run(Parrot([]), [ADD], samples=2, ks=(1, k), allow_code=True)


# ---------------------------------------------------------------------------------- the real problems

WRONG = [  # one of these in the place of each solution, in turn
    "    pass\n",
    "    import sys\n    sys.exit(0)\n",
    "    import os\n    os._exit(0)\n",
    "    raise AssertionError\n",
]


@pytest.fixture(scope="module")
def problems():
    if not HUMANEVAL.is_file():
        pytest.skip(f"no {HUMANEVAL}")
    return humaneval.read([str(HUMANEVAL)])


@pytest.mark.slow
@pytest.mark.usefixtures("shut_in")
def test_the_164_solutions_pass_and_164_wrong_ones_fail(problems):
    assert len(problems) == 164
    completions = [[item.solution, WRONG[i % len(WRONG)]] for i, item in enumerate(problems)]
    verdicts = humaneval.check(problems, completions, allow_code=True)
    assert {item.id: v[0].status for item, v in zip(problems, verdicts, strict=True) if not v[0].passed} == {}
    assert {item.id: v[1].status for item, v in zip(problems, verdicts, strict=True) if v[1].passed} == {}
    assert {v[1].status for v in verdicts} == {"failed"}
    outcome = humaneval.outcome(problems, verdicts, ks=(1, 2))
    assert outcome.mean().mean == pytest.approx(0.5)
    assert outcome.mean("pass@2").mean == 1.0
