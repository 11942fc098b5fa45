"""The figures of `meiqa eval` against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from meiqa.evaluation.metrics import (
    deviation_agreement,
    distinct,
    effective_bins,
    js_divergence,
    krcc,
    plcc,
    reliability,
    rmse,
    srcc,
    srcc_ci95,
    summarise,
    tie_rate,
    tied_pairs,
)


def test_srcc_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert srcc([1.0, 1.5, 2.0, 5.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert srcc([1, 2, 3], [5, 4, 1]) == -1.0


def test_srcc_shares_ranks_among_ties() -> None:
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2.
    assert srcc([2, 2, 3], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3.0))


def test_the_interval_of_the_srcc_is_as_wide_as_fishers() -> None:
    random = np.random.default_rng(0)
    human = random.normal(size=400)
    predicted = human + random.normal(size=400)
    found = srcc(predicted, human)
    # Of Fisher's z = artanh(SRCC) the standard error is about 1.03 / sqrt(n - 3).
    away = 1.96 * 1.03 / math.sqrt(397)
    expected = [math.tanh(math.atanh(found) + side * away) for side in (-1, 1)]
    assert srcc_ci95(predicted, human) == pytest.approx(expected, abs=0.015)
    assert srcc_ci95(predicted, human) == srcc_ci95(predicted, human)
    assert srcc_ci95([1, 2], [2, 4]) == pytest.approx((0.0, 1.0))


def test_plcc_by_hand() -> None:
    # Deviations -1 0 1 against -4/3 -1/3 5/3: 3 / sqrt(2 * 42/9).
    assert plcc([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 42 / 9))


def test_krcc_by_hand() -> None:
    # Four pairs agree, two do not.
    assert krcc([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(2 / 6)
    # Two pairs agree, one of the three is tied in the predictions: 2 / sqrt(2 * 3).
    assert krcc([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))


def test_rmse_by_hand() -> None:
    assert rmse([1, 2, 3], [1, 4, 4]) == pytest.approx(math.sqrt(5 / 3))


def test_js_divergence_by_hand() -> None:
    assert js_divergence([1.01, 2.01], [2.02, 1.02]) == 0.0
    assert js_divergence([1.5], [4.5, 4.6]) == pytest.approx(1.0)
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) - (0 + 1) / 2 bits.
    mixture = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert js_divergence([2.0, 2.0], [2.0, 3.0]) == pytest.approx(mixture - 0.5)


def test_scores_outside_the_scale_fall_into_the_end_bins() -> None:
    assert js_divergence([0.2, 7.0], [1.0, 5.0]) == 0.0


def test_effective_bins_by_hand() -> None:
    assert effective_bins([3.0, 3.0, 3.0]) == 1.0
    assert effective_bins([1.5, 2.5, 3.5, 4.5]) == pytest.approx(4.0)
    assert effective_bins(np.linspace(1.02, 4.98, 100)) == pytest.approx(100.0)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    assert effective_bins([2.0, 2.0, 3.0, 4.0]) == pytest.approx(2**1.5)


def test_distinct_and_ties_by_hand() -> None:
    scores = [3.001, 3.004, 3.0, 3.01, 4.0, 4.0]
    assert distinct(scores) == 3
    # Three pairs at 3.00 and one at 4.00, of fifteen.
    assert tie_rate(scores) == pytest.approx(4 / 15)
    assert tie_rate([3.0]) == 0.0


@pytest.mark.parametrize("constant", [[3.1] * 7, [3.1]])
def test_constant_predictions_correlate_with_nothing(constant: list[float]) -> None:
    figures = summarise(constant, np.linspace(1, 5, len(constant)))
    assert (figures["srcc"], figures["plcc"], figures["krcc"]) == (0.0, 0.0, 0.0)
    assert figures["effective_bins"] == 1.0
    assert figures["distinct"] == 1


@pytest.mark.parametrize("count", [3, 7, 97])
def test_correlations_agree_with_scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    human = rng.uniform(1, 5, count)
    predicted = (human + rng.normal(0, 0.5, count)).round(1)
    assert srcc(predicted, human) == pytest.approx(spearmanr(predicted, human).statistic)
    assert plcc(predicted, human) == pytest.approx(pearsonr(predicted, human).statistic)


def test_summary_has_the_names_that_other_tools_parse() -> None:
    assert list(summarise([1, 2], [1, 2])) == [
        "srcc",
        "plcc",
        "krcc",
        "rmse",
        "js",
        "effective_bins",
        "distinct",
        "tie_rate",
    ]


@pytest.mark.parametrize(
    ("predicted", "human"),
    [([], []), ([1.0], [1.0, 2.0]), ([np.nan], [1.0]), ([1.0], [np.inf]), ([[1.0]], [[1.0]])],
)
def test_what_cannot_be_compared_is_refused(predicted: list, human: list) -> None:
    with pytest.raises(ValueError, match="scores"):
        summarise(predicted, human)


def test_tied_pairs_against_every_pair_in_turn() -> None:
    random = np.random.default_rng(7)
    initial = random.integers(1, 6, 60).astype(float)
    fused = np.round(initial + random.normal(0, 0.4, 60), 1)
    human = np.round(initial + random.normal(0, 0.6, 60), 2)
    points = []
    for a in range(60):
        for b in range(a):
            if initial[a] == initial[b] and abs(human[a] - human[b]) > 0.1:
                told = (fused[a] - fused[b]) * np.sign(human[a] - human[b])
                points.append(1.0 if told > 0 else 0.5 if told == 0 else 0.0)
    found = tied_pairs(initial, fused, human)
    assert found["pairs"] == len(points) > 100
    assert found["agreement"] == pytest.approx(np.mean(points))


def test_tied_pairs_that_people_hardly_tell_apart_do_not_count() -> None:
    found = tied_pairs([3.0, 3.0], [2.0, 4.0], [3.0, 3.05])
    assert found["pairs"] == 0
    assert np.isnan(found["agreement"])


def test_a_fused_score_that_keeps_the_ties_gets_half() -> None:
    assert tied_pairs([3.0] * 4, [3.2] * 4, [1, 2, 3, 4]) == {"pairs": 6, "agreement": 0.5}


def test_a_deviation_that_is_the_photos_own_goes_with_its_error() -> None:
    random = np.random.default_rng(0)
    human, deviations = random.uniform(1, 5, 20_000), random.uniform(0.2, 0.8, 20_000)
    scores = human + deviations * random.normal(size=20_000)
    told = deviation_agreement(scores, deviations, human)
    assert 0.25 < told["srcc"] < 0.5
    assert told["coverage95"] == pytest.approx([0.95] * 4, abs=0.012)
    alike = deviation_agreement(scores, np.full(20_000, 0.5), human)
    assert alike["srcc"] is None
    shuffled = deviation_agreement(scores, random.permutation(deviations), human)
    assert abs(shuffled["srcc"]) < 0.03
    assert shuffled["coverage95"][0] < 0.85


def test_reliability_of_errors_as_wide_as_promised() -> None:
    random = np.random.default_rng(0)
    human, deviations = random.uniform(1, 5, 20_000), random.uniform(0.2, 0.8, 20_000)
    rows = reliability(human + deviations * random.normal(size=20_000), deviations, human)
    assert [row["nominal"] for row in rows] == [0.5, 0.68, 0.8, 0.9, 0.95, 0.99]
    for row in rows:
        assert row["observed"] == pytest.approx(row["nominal"], abs=0.012)
