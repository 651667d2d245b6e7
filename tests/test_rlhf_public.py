"""The mixture of public comparisons: shares, drawing, thinning, the binary form, what is kept on disk."""

import itertools
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_rows import jsonl, user

from rlhf.data import mixture as public
from rlhf.data.comparisons import Comparison
from rlhf.data.mixture import (
    NOT_DRAWN,
    Filter,
    binarize,
    check_prefixes,
    sample_mixture,
    shares,
    subsample_responses,
)
from rlhf.errors import UserError
from rlhf.recipe.reward import PmpSource


def rows(name, number, start=0):
    return [
        {"prompt": f"{name} {n}", "responses": ["a", "b"], "ranks": [0, 1]}
        for n in range(start, start + number)
    ]


def source(folder, name, number, weight=1.0, **more):
    return PmpSource(files=[jsonl(folder / f"{name}.jsonl", *rows(name, number, **more))], weight=weight)


def prompts(comparisons):
    return [c.prompt[0].content for c in comparisons]


def mix(sources, total, seed=0, on_bad_rows="stop", **options):
    return sample_mixture(sources, total, seed=seed, on_bad_rows=on_bad_rows, **options)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        mix(*arguments, **options)
    return str(caught.value)


# --- shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1], 7, [7]),
        ([1, 1], 10, [5, 5]),
        ([1, 1, 1], 10, [4, 3, 3]),  # equal remainders: the first ones
        ([3, 1], 10, [8, 2]),  # 7.5 and 2.5
        ([47, 16, 15.8, 12, 6.1, 3.1], 10, [5, 2, 1, 1, 1, 0]),  # 4.7, 1.6, 1.58, 1.2, 0.61, 0.31
    ],
)
def test_shares_are_those_of_the_largest_remainder(weights, total, expected):
    assert shares(weights, total) == expected


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 10_000))
def test_shares_add_up_and_are_less_than_one_off(weights, total):
    result = shares(weights, total)
    assert sum(result) == total
    assert all(
        abs(share - total * w / math.fsum(weights)) < 1 + 1e-6
        for share, w in zip(result, weights, strict=True)
    )


# --- the mixture -----------------------------------------------------------------------------------------


def test_a_source_names_its_own_columns(tmp_path):
    asked = jsonl(tmp_path / "x.jsonl", {"ask": "q", "good": "a", "bad": "b"})
    own = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    plain = source(tmp_path, "plain", 3)
    found, _ = mix([plain, PmpSource(files=[asked], columns=own)], 4)
    assert Comparison((user("q"),), ("a", "b"), (0, 1), "x") in found
    wrong = PmpSource(files=[asked], columns={**own, "prompt": "asks"})
    message = refusal([plain, wrong], 4)
    assert message == f"{asked}:1: no column 'asks', nearest: ask; mend pmp.sources[1].columns"
    message = refusal([plain, PmpSource(files=[jsonl(tmp_path / "y.jsonl", {"x1": 1})])], 4)
    assert "named by pmp.sources[1].columns={prompt: ..." in message


def test_a_kept_part_is_not_that_of_other_columns(tmp_path):
    row = {"ask": "q", "good": "a", "bad": "b", "worse": "c"}
    asked, own = jsonl(tmp_path / "x.jsonl", row), {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    for name in ("bad", "worse"):
        one = PmpSource(files=[asked], columns={**own, "rejected": name})
        found, _ = mix([one], 1, cache=tmp_path / "parts")
        assert found[0].responses == ("a", row[name])


def test_each_source_gives_its_share_and_what_is_not_drawn_is_counted(tmp_path):
    sources = [source(tmp_path, "x", 50, 3), source(tmp_path, "y", 40, 1)]
    comparisons, counts = mix(sources, 20)
    assert Counter(name.split()[0] for name in prompts(comparisons)) == {"x": 15, "y": 5}
    assert len(set(prompts(comparisons))) == 20
    first, second = counts.values()
    assert list(counts) == [f"pmp.sources[{i}]: {s.files[0]}" for i, s in enumerate(sources)]
    assert (first.read, first.kept, first.dropped) == (50, 15, {NOT_DRAWN: 35})
    assert (second.read, second.kept, second.dropped) == (40, 5, {NOT_DRAWN: 35})


def test_a_small_source_gives_all_it_has_and_nobody_makes_up_for_it(tmp_path):
    comparisons, counts = mix([source(tmp_path, "x", 3), source(tmp_path, "y", 40)], 20)
    assert Counter(name.split()[0] for name in prompts(comparisons)) == {"x": 3, "y": 10}
    assert [c.kept for c in counts.values()] == [3, 10]


def test_the_seed_decides_what_is_drawn_and_in_which_order(tmp_path):
    sources = [source(tmp_path, "x", 30), source(tmp_path, "y", 5)]
    first = mix(sources, 10)[0]
    assert mix(sources, 10)[0] == first
    other = mix(sources, 10, seed=1)[0]
    assert set(other) != set(first)
    every = [mix(sources, 10, seed=seed)[0] for seed in range(20)]
    assert len({tuple(name[0] for name in prompts(drawn)) for drawn in every}) > 5  # sources are shuffled


def test_every_comparison_is_drawn_equally_often(tmp_path):
    n, k, seeds = 7, 3, 1500
    sources = [source(tmp_path, "x", n)]
    drawn = [frozenset(prompts(mix(sources, k, seed=seed)[0])) for seed in range(seeds)]
    subsets = Counter(drawn)
    possible = math.comb(n, k)
    assert len(subsets) == possible
    chi_square = sum((subsets[s] - seeds / possible) ** 2 / (seeds / possible) for s in subsets)
    assert chi_square < possible - 1 + 4 * math.sqrt(2 * (possible - 1))


def test_repeats_are_removed_within_a_source_and_across_sources(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", *rows("x", 3), *rows("x", 2))
    two = jsonl(tmp_path / "two.jsonl", *rows("x", 2), *rows("y", 1))
    comparisons, counts = mix([PmpSource(files=[one]), PmpSource(files=[two])], 20)
    assert sorted(prompts(comparisons)) == ["x 0", "x 1", "x 2", "y 0"]
    assert [(c.read, c.kept, c.dropped) for c in counts.values()] == [
        (5, 3, {"duplicate comparison": 2}),
        (3, 1, {"duplicate comparison": 2}),
    ]


def test_bad_rows_stop_or_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *rows("x", 2), {**rows("x", 1)[0], "ranks": [0, 0]})
    assert refusal([PmpSource(files=[path])], 5).startswith(f"{path}:3: all responses are tied")
    _, counts = mix([PmpSource(files=[path])], 5, on_bad_rows="skip")
    (only,) = counts.values()
    assert (only.read, only.kept) == (3, 2)


def test_a_source_that_gives_nothing_is_named_with_its_counts(tmp_path):
    good = source(tmp_path, "x", 3)
    bad = jsonl(tmp_path / "bad.jsonl", {**rows("y", 1)[0], "ranks": [0, 0]})
    message = refusal([good, PmpSource(files=[bad])], 4, on_bad_rows="skip")
    assert message.startswith(f"pmp.sources[1]: no usable comparison in {bad}: read 1, kept 0")
    assert refusal([good, good], 6).startswith("pmp.sources[1]: no usable comparison")
    assert refusal([PmpSource(files=["no.jsonl"])], 4) == "no.jsonl: no such file"
    assert refusal([PmpSource(files=["no*.jsonl"])], 4).startswith("pmp.sources[0]: the pattern 'no*.jsonl'")


def test_a_share_of_less_than_one_is_refused_before_anything_is_read(tmp_path):
    sources = [PmpSource(files=["missing.jsonl"], weight=1e-6), source(tmp_path, "x", 3)]
    assert "pmp.sources[0] (missing.jsonl) has a share of less than one of 10" in refusal(sources, 10)


def peak_of_mixture(path):
    tracemalloc.start()
    mix([PmpSource(files=[path])], 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_only_what_is_drawn_is_in_memory(tmp_path):
    long = [{**row, "responses": ["a" * 3000, "b"]} for row in rows("x", 2000)]
    large = jsonl(tmp_path / "large.jsonl", *long)  # 6 MB
    small = jsonl(tmp_path / "small.jsonl", *long[:100])
    peak_of_mixture(small)
    assert peak_of_mixture(large) < peak_of_mixture(small) + 500_000


# --- what a training can use ------------------------------------------------------------------------------


def every(step, name=None):
    """Fits the comparisons whose number is a multiple of ``step``; two reasons for the others."""

    def problem(comparison):
        number = int(comparison.prompt[0].content.split()[1])
        return None if number % step == 0 else f"too {'odd' if number % 2 else 'even'}"

    return Filter(name or f"every {step}", problem)


def test_what_does_not_fit_is_left_out_before_the_drawing_and_counted(tmp_path):
    sources = [source(tmp_path, "x", 60), source(tmp_path, "y", 9)]
    comparisons, counts = mix(sources, 20, fits=every(4))
    first, second = counts.values()
    assert (first.read, first.kept) == (60, 10)
    assert first.dropped == {"too odd": 30, "too even": 15, NOT_DRAWN: 5}
    assert (second.read, second.kept, second.dropped) == (9, 3, {"too odd": 4, "too even": 2})
    assert all(int(name.split()[1]) % 4 == 0 for name in prompts(comparisons))
    # as if the others had never been there
    jsonl(tmp_path / "x.jsonl", *(row for n, row in enumerate(rows("x", 60)) if n % 4 == 0))
    assert mix(sources, 20, fits=every(4))[0] == comparisons
    assert mix([sources[0]], 10)[0] == mix([sources[0]], 10, fits=every(4))[0]


def test_a_source_in_which_nothing_fits_is_named_with_the_reasons(tmp_path):
    sources = [source(tmp_path, "x", 3), source(tmp_path, "y", 3, start=1)]
    message = refusal(sources, 4, fits=every(4))
    assert message.startswith(
        f"pmp.sources[1]: no usable comparison in {sources[1].files[0]}: read 3, kept 0"
    )
    assert "too odd" in message
    assert "too even" in message


# --- what is kept on disk --------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The first file of every source that was read from its files, not from the cache."""
    seen = []
    stream = public.stream_comparisons

    def watched(files, **options):
        seen.append(files[0].rpartition("/")[2])
        return stream(files, **options)

    monkeypatch.setattr(public, "stream_comparisons", watched)
    return seen


def test_an_interrupted_mixture_goes_on_with_the_next_source(tmp_path, reads):
    sources = [source(tmp_path, "x", 30), PmpSource(files=[str(tmp_path / "y.jsonl")])]
    cache = tmp_path / "cache"
    assert "no such file" in refusal(sources, 10, cache=cache)
    source(tmp_path, "y", 30)
    again = mix(sources, 10, cache=cache)
    assert reads == ["x.jsonl", "y.jsonl", "y.jsonl"]
    assert again == mix(sources, 10)  # comparisons and counts
    assert again == mix(sources, 10, cache=cache)
    assert reads[3:] == ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize("change", ["seed", "share", "file", "mode", "nothing"])
def test_a_part_is_used_again_only_where_nothing_changed(tmp_path, reads, change):
    cache = tmp_path / "cache"
    mix([source(tmp_path, "x", 30)], 10, cache=cache)
    if change == "file":
        source(tmp_path, "x", 31)
    options = {"seed": int(change == "seed"), "on_bad_rows": "skip" if change == "mode" else "stop"}
    sources = [PmpSource(files=[str(tmp_path / "x.jsonl")])]
    number = 11 if change == "share" else 10
    assert mix(sources, number, cache=cache, **options) == mix(sources, number, **options)
    assert len(reads) == (2 if change == "nothing" else 3)


def test_a_part_is_used_again_for_the_same_use_only(tmp_path, reads):
    cache, sources = tmp_path / "cache", [source(tmp_path, "x", 30)]
    for number, fits in enumerate((None, every(4), every(2)), start=1):
        for _ in range(2):  # drawn, then remembered, with its counts
            assert mix(sources, 5, cache=cache, fits=fits) == mix(sources, 5, fits=fits)
        assert len(reads) == 3 * number  # two without a cache
    assert mix(sources, 5, cache=cache, fits=every(3, name="every 4")) == mix(sources, 5, fits=every(4))


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_text("{}")]
)
def test_a_damaged_part_is_drawn_again(tmp_path, reads, damage):
    cache = tmp_path / "cache"
    sources = [source(tmp_path, "x", 30)]
    before = mix(sources, 10, cache=cache)
    damage(*cache.iterdir())
    for _ in range(2):
        assert mix(sources, 10, cache=cache) == before
    assert reads == ["x.jsonl", "x.jsonl"]
    assert before[1][f"pmp.sources[0]: {sources[0].files[0]}"].read == 30


# --- thinning and the binary form ------------------------------------------------------------------------


def ranked(*ranks, **more):
    return Comparison((user("q"),), tuple(f"r{i}" for i in range(len(ranks))), ranks, "s", **more)


@pytest.mark.parametrize(
    ("ranks", "most", "kept", "left"),
    [
        ((0, 1), 2, (0, 1), (0, 1)),
        ((2, 0, 1), 3, (0, 1, 2), (2, 0, 1)),
        ((2, 0, 1), 2, (0, 1), (1, 0)),
        ((4, 3, 2, 1, 0), 3, (0, 2, 4), (2, 1, 0)),
        ((0, 1, 2, 3, 4, 5, 6), 4, (0, 2, 4, 6), (0, 1, 2, 3)),
        ((1, 1, 1, 0), 2, (2, 3), (1, 0)),
        ((0, 0, 0, 0, 1), 3, (0, 2, 4), (0, 0, 1)),
    ],
)
def test_thinning_takes_from_every_part_of_the_order(ranks, most, kept, left):
    result = subsample_responses(ranked(*ranks, confidence=0.5), most)
    assert result == Comparison((user("q"),), tuple(f"r{i}" for i in kept), left, "s", 0.5)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(lambda r: len(set(r)) > 1), st.integers(2, 9)
)
def test_a_thinned_comparison_keeps_best_worst_and_order(ranks, most):
    comparison = ranked(*ranks)
    result = subsample_responses(comparison, most)
    assert len(result.responses) == min(most, len(ranks))
    rank_of = dict(zip(comparison.responses, ranks, strict=True))
    old = [rank_of[response] for response in result.responses]
    assert {min(ranks), max(ranks)} <= set(old)
    for a, b in itertools.combinations(range(len(old)), 2):
        assert (old[a] < old[b]) == (result.ranks[a] < result.ranks[b])
    assert len(result.responses) == len(ranks) or sorted(set(result.ranks)) == list(range(len(set(old))))


def test_thinning_to_less_than_two_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        subsample_responses(ranked(0, 1), 1)


def test_a_ranked_pair_becomes_two_binary_ones():
    result = binarize(ranked(1, 0, confidence=0.9), "GOOD:", "BAD:")
    assert [(c.responses, c.ranks) for c in result] == [
        (("GOOD:r1", "BAD:r1"), (0, 1)),
        (("BAD:r0", "GOOD:r0"), (0, 1)),
    ]
    assert {(c.prompt, c.source, c.confidence) for c in result} == {((user("q"),), "s", 0.9)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=6))
def test_a_response_is_called_good_for_every_worse_one_and_bad_for_every_better_one(ranks):
    counts = Counter(c.responses for c in binarize(ranked(*ranks), "+", "-"))
    for i, rank in enumerate(ranks):
        assert counts[f"+r{i}", f"-r{i}"] == sum(other > rank for other in ranks)
        assert counts[f"-r{i}", f"+r{i}"] == sum(other < rank for other in ranks)
    better = sum(a < b for a, b in itertools.combinations(sorted(ranks), 2))
    assert counts.total() == 2 * better


# --- control prefixes ------------------------------------------------------------------------------------

VOCABULARY = {"GOOD": [5], "BAD": [6, 7], "good": [5], "": [], "☺": [6, 0]}


@pytest.mark.parametrize(
    ("good", "bad", "unknown", "message"),
    [
        ("", "BAD", None, "pmp.good_prefix '' has no tokens"),
        ("GOOD", "", 0, "pmp.bad_prefix '' has no tokens"),
        ("GOOD", "☺", 0, "pmp.bad_prefix '☺' holds characters that the tokenizer does not know"),
        ("☺", "BAD", 0, "pmp.good_prefix '☺' holds characters that the tokenizer does not know"),
        ("GOOD", "good", 0, "pmp.good_prefix and pmp.bad_prefix ('GOOD', 'good') are the same tokens [5]"),
    ],
)
def test_prefixes_that_a_tokenizer_cannot_tell_apart_are_refused(good, bad, unknown, message):
    with pytest.raises(UserError) as caught:
        check_prefixes(VOCABULARY.__getitem__, unknown, good, bad)
    assert str(caught.value).startswith(message)


def test_prefixes_that_differ_are_taken():
    check_prefixes(VOCABULARY.__getitem__, 0, "GOOD", "BAD")
    check_prefixes(VOCABULARY.__getitem__, None, "GOOD", "☺")
