"""What the measurement of best of N reckons with."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr

from scripts.tiny_pack import best_of

SCORES = np.array([[0.3, 0.9, 0.1, 0.5, 0.7, 0.2], [1.0, 0.0, 0.4, 0.6, 0.8, 0.2]])
VALUES = np.array([[1.0, -2.0, 5.0, 0.5, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_best_of_n_is_a_mean_over_all_draws(count: int) -> None:
    for score, values, found in zip(SCORES, VALUES, best_of.expected(SCORES, VALUES, count), strict=True):
        draws = [values[max(draw, key=lambda i: score[i])] for draw in combinations(range(6), count)]
        assert found == pytest.approx(np.mean(draws))


def test_agreement_is_spearman_s() -> None:
    tied = np.array([[1, 1, 0, 2, 2, 2], [0, 0, 0, 0, 0, 1]], dtype=float)
    for one, other in ((SCORES, VALUES), (tied, VALUES)):
        wanted = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
        assert best_of.agreement(one, other) == pytest.approx(wanted)
    assert best_of.agreement(np.zeros((1, 4)), VALUES[:1, :4]) == [0.0]


def test_an_early_look_that_knows_the_score_keeps_every_winner() -> None:
    assert best_of.early_look(SCORES, SCORES)["winner_stays"]["gain"] == 1.0
    assert best_of.early_look(-SCORES, SCORES)["winner_stays"]["gain"] == 0.0


def test_an_interval_holds_what_it_is_of() -> None:
    gains = np.random.default_rng(1).normal(0.5, 0.1, 200)
    found = best_of.interval(gains)
    assert found["from"] < found["gain"] < found["to"]
    assert found["to"] - found["from"] == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)
