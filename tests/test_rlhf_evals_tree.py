"""Rows folded into trees: nothing is lost, nothing is read twice, and a token sees its own past only."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.evals.prefix_tree import common_start, fold, lay_out, target_log_probs

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12)


def ancestors(tree, node):
    """The nodes before a node on the path of any row that has it."""
    paths = [path[: path.index(node)] for path in tree.paths.values() if node in path]
    assert all(path == paths[0] for path in paths)
    return set(paths[0])


@given(ROWS, st.integers(6, 30))
def test_every_row_is_a_path_and_shared_beginnings_are_one_node(rows, capacity):
    trees = fold(rows, capacity)
    found = {number: [t.tokens[n] for n in path] for t in trees for number, path in t.paths.items()}
    assert found == dict(enumerate(rows))
    for tree in trees:
        assert len(tree.tokens) <= capacity
        beginnings = {tuple(rows[n][: k + 1]) for n in tree.paths for k in range(len(rows[n]))}
        assert len(tree.tokens) == len(beginnings)  # a trie has one node a different beginning
        assert [len(ancestors(tree, node)) for node in range(len(tree.tokens))] == tree.depths


@given(ROWS)
def test_the_mask_opens_ancestors_the_node_itself_and_what_is_cached(rows):
    trees = fold(rows, 10)
    for batch in (trees[n : n + 2] for n in range(0, len(trees), 2)):
        ids, positions, mask = lay_out(batch, 3, torch.float32, torch.device("cpu"))
        assert mask.shape == (len(batch), 1, ids.shape[1], 3 + ids.shape[1])
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
        for r, tree in enumerate(batch):
            assert ids[r, : len(tree.tokens)].tolist() == tree.tokens
            for node in range(ids.shape[1]):
                real = node < len(tree.tokens)
                expected = {0, 1, 2, 3 + node} | ({3 + a for a in ancestors(tree, node)} if real else set())
                assert set((mask[r, 0, node] == 0).nonzero().flatten().tolist()) == expected
                assert positions[r, node] == (3 + tree.depths[node] if real else 0)


def test_a_row_longer_than_the_capacity_has_a_tree_of_its_own():
    trees = fold([[1, 2, 3, 4, 5], [7], [8, 9]], 3)
    assert sorted(len(tree.tokens) for tree in trees) == [3, 5]
    assert fold([], 3) == []


@given(ROWS)
def test_the_common_start_is_what_all_rows_begin_with(rows):
    expected = [
        column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*rows, strict=False))
    ]
    assert common_start(rows) == expected


def test_no_rows_have_no_common_start():
    assert common_start([]) == []
    assert common_start([[], [1]]) == []


def test_log_probs_of_targets_equal_a_log_softmax_whatever_the_chunk():
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 4), torch.nn.Linear(4, 11)
    node, target = torch.tensor([3, 0, 3, 6, 3, 1]), torch.tensor([2, 10, 5, 0, 2, 9])
    logp = head(hidden).log_softmax(-1)
    best = logp.argmax(-1)
    for chunk in (1, 2, 100):
        found, greedy = target_log_probs(hidden, head, node, target, chunk=chunk)
        torch.testing.assert_close(found, logp[node, target])
        assert greedy.tolist() == (best[node] == target).tolist()


def test_a_node_meets_the_vocabulary_once():
    seen = []

    def head(states):
        seen.append(len(states))
        return states @ torch.ones(2, 5)

    target_log_probs(torch.ones(4, 2), head, torch.tensor([1, 1, 1, 2]), torch.tensor([0, 1, 2, 3]), chunk=10)
    assert seen == [2]
