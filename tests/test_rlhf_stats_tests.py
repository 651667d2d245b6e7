import pytest

from rlhf.stats.tests import sign_test


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (0, 6), (3, 4), (20, 9), (700, 600)])
def test_the_sign_test_is_scipy_s_exact_one(wins, losses):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)
