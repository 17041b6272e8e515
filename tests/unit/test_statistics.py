"""Intervals and tests against published worked examples, and their promises against simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reproval import statistics as st


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombe_1998(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    interval = st.wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.method == "Wilson"


@pytest.mark.parametrize("n", [4, 7, 12, 40, 1319])
def test_wilson_of_none_begins_at_zero_and_of_all_ends_at_one(n: int) -> None:
    """Not at the 2.8e-17 that rounding leaves of 0 of 12, and that a report would show."""
    assert (st.wilson(0, n).low, st.wilson(n, n).high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "p_value"),
    [(1, 1, 7, 12, 0.0703), (59, 6, 16, 80, 0.0525)],
)
def test_mcnemar_gives_the_exact_p_values_of_fagerland_2013(
    both: int, only_a: int, only_b: int, neither: int, p_value: float
) -> None:
    """Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91, tables 1 and 2."""
    a = np.array([1.0] * both + [1.0] * only_a + [0.0] * only_b + [0.0] * neither)
    b = np.array([1.0] * both + [0.0] * only_a + [1.0] * only_b + [0.0] * neither)
    found = st.compare_binary(a, b)
    assert found.p_value == pytest.approx(p_value, abs=5e-5)
    assert found.n == both + only_a + only_b + neither
    assert found.effect == pytest.approx((only_a - only_b) / found.n)


def test_the_interval_of_a_paired_difference_is_near_agrestis_approval_example() -> None:
    """Agresti 2002, Categorical Data Analysis, 10.1: 794, 150, 86, 570; Wald interval 0.02 to 0.06."""
    a = np.array([1.0] * (794 + 150) + [0.0] * (86 + 570))
    b = np.array([1.0] * 794 + [0.0] * 150 + [1.0] * 86 + [0.0] * 570)
    found = st.compare_binary(a, b)
    assert found.effect == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((0.02, 0.06), abs=0.002)


def test_paired_t_gives_the_p_value_of_students_sleep_data() -> None:
    """Student 1908, as in the help of t.test in R: mean difference -1.58, interval -2.46 to -0.70."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    found = st.compare_means(first, second)
    assert found is not None
    assert found.effect == pytest.approx(-1.58)
    assert (found.low, found.high) == pytest.approx((-2.4599, -0.7001), abs=1e-4)
    # Ten pairs are few: the exact permutation test decides. All nine differences that are not 0 have one sign.
    assert found.method == "paired permutation"
    assert found.p_value == pytest.approx(2 / 2**9)
    many = st.compare_means(np.tile(first, 3), np.tile(second, 3))
    assert many is not None
    assert many.method == "paired t"
    assert many.p_value == pytest.approx(stats.ttest_rel(np.tile(first, 3), np.tile(second, 3)).pvalue)


def test_holm_adjusts_as_in_the_worked_example() -> None:
    """p = 0.01, 0.04, 0.03, 0.005: the example of Holm's procedure in many textbooks."""
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([]) == []


def test_the_detectable_difference_inverts_the_published_sample_size() -> None:
    """Chow, Shao and Wang 2008, 5.4.3: discordance 0.2 + 0.5, difference 0.3, alpha 5 %, power 80 %: 59 pairs."""
    assert st.detectable_proportion(59, 0.7, 0.05) == pytest.approx(0.3, abs=0.002)
    assert st.detectable_proportion(2, 0.5, 0.05) is None


def test_the_detectable_mean_inverts_the_published_sample_size() -> None:
    """Cohen 1988, table 2.4.1: 33 or 34 pairs for an effect of half a standard deviation at 5 % and 80 %."""
    assert st.detectable_mean(34, 2.0, 0.05) == pytest.approx(1.0, abs=0.02)
    assert st.detectable_mean(2, 2.0, 0.05) is None
    assert st.detectable_mean(100, 0.0, 0.05) is None


@pytest.mark.parametrize(("p", "n"), [(0.02, 60), (0.5, 15), (0.97, 100), (0.25, 500)])
def test_intervals_of_proportions_cover_as_they_say(p: float, n: int) -> None:
    counts = np.random.default_rng(7).binomial(n, p, size=4000)
    covered = {int(k): st.wilson(int(k), n).low <= p <= st.wilson(int(k), n).high for k in np.unique(counts)}
    assert np.mean([covered[int(k)] for k in counts]) > 0.92


def test_intervals_stay_inside_what_is_possible_and_never_vanish() -> None:
    perfect = st.mean_interval(np.ones(12))
    assert perfect is not None
    assert perfect.high == 1.0
    assert 0.7 < perfect.low < 0.8
    same = st.mean_interval(np.full(12, 0.5))
    assert same is not None
    assert same.method == "Wilson, bounded mean"
    assert same.low < 0.5 < same.high
    skewed = st.mean_interval(np.array([0.0] * 9 + [0.4]))
    assert skewed is not None
    assert 0 <= skewed.low < 0.04 < skewed.high <= 1
    high = st.mean_interval(np.array([1.0] * 9 + [0.6]))
    assert high is not None
    assert 0 <= high.low < 0.96 < high.high <= 1
    # Scores that may be negative, such as correlations, have no such bounds.
    signed = np.array([-0.5, 0.9, 0.9, 0.9])
    correlation = st.mean_interval(signed)
    assert correlation is not None
    assert correlation.method == "Student t"
    assert correlation.high > 1
    assert st.mean_interval(np.full(3, -0.5)) is None
    assert st.mean_interval(np.array([3.0, 3.0])) is None
    assert st.mean_interval(np.array([])) is None


def test_means_of_other_metrics_use_students_t() -> None:
    values = np.array([2.0, 4.0, 4.0, 5.0, 7.0, 9.0])
    interval = st.mean_interval(values)
    assert interval is not None
    expected = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.method == "Student t"


def test_perplexity_has_its_interval_on_the_log_scale_and_bits_on_their_own() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(50, 400, size=40).astype(float)
    loglik = -words * (2.7 + 0.2 * rng.standard_normal(40))
    ratio = loglik.sum() / words.sum()
    perplexity = st.log_likelihood_interval(math.exp(-ratio), loglik, words)
    bits = st.log_likelihood_interval(-ratio / math.log(2), loglik, words)
    assert perplexity is not None
    assert bits is not None
    assert perplexity[1] == "ratio"
    assert bits[1] == "difference"
    # One interval, on two scales: symmetric for bits, and so for the logarithm of the perplexity.
    assert math.log2(perplexity[0].low) == pytest.approx(bits[0].low)
    assert math.log2(perplexity[0].high) == pytest.approx(bits[0].high)
    assert st.log_likelihood_interval(1.234, loglik, words) is None
    alone = loglik[0] / words[0]
    assert st.log_likelihood_interval(math.exp(-alone), loglik[:1], words[:1]) is None
    assert st.log_likelihood_interval(1.0, np.zeros(3), np.zeros(3)) is None
    assert st.log_likelihood_interval(math.inf, np.array([-math.inf, -1.0]), words[:2]) is None


def test_likelihoods_of_next_to_nothing_overflow_nowhere() -> None:
    """As of a model that was never trained on the bytes of a task: 1,000 nats each."""
    hopeless = np.array([-900.0, -1100.0])
    bits = st.log_likelihood_interval(1000 / math.log(2), hopeless, np.ones(2))
    assert bits is not None
    assert bits[1] == "difference"
    wide = st.log_likelihood_interval(math.exp(550), np.array([-100.0, -1000.0]), np.ones(2))
    assert wide is not None
    assert wide[0].low < math.exp(550) < wide[0].high < math.inf


def test_the_error_of_a_ratio_is_that_of_a_mean_where_all_documents_are_of_one_length() -> None:
    values = np.array([2.0, 4.0, 4.0, 5.0, 7.0, 9.0])
    assert st.ratio_stderr(values, np.ones(6)) == pytest.approx(stats.sem(values))
    assert st.ratio_stderr(values, np.full(6, 50.0)) == pytest.approx(stats.sem(values) / 50)


def test_the_ratio_interval_covers_as_it_says() -> None:
    rng = np.random.default_rng(11)
    inside = []
    for _ in range(400):
        words = rng.integers(50, 400, size=60).astype(float)
        loglik = words * (-2.5 + 0.3 * rng.standard_normal(60))
        ratio = loglik.sum() / words.sum()
        found = st.log_likelihood_interval(math.exp(-ratio), loglik, words)
        assert found is not None
        inside.append(found[0].low <= math.exp(2.5) <= found[0].high)
    assert 0.92 < np.mean(inside) < 0.98


def test_a_group_of_equal_tasks_has_the_interval_of_its_pooled_questions() -> None:
    # One stratum: the effective n is n - 1, because lm-eval's standard error divides by n - 1.
    values = np.array([1.0] * 70 + [0.0] * 30)
    stderr = float(values.std(ddof=1) / 10)
    group = st.effective_wilson(0.7, stderr, 100)
    assert (group.low, group.high) == pytest.approx((st.wilson(69.3, 99).low, st.wilson(69.3, 99).high))
    assert st.effective_wilson(1.0, 0.0, 40).low == pytest.approx(st.wilson(40, 40).low)
    assert st.effective_wilson(0.5, None, 40).low == pytest.approx(st.wilson(20, 40).low)


def test_the_weights_of_a_group_are_recognized_by_its_value() -> None:
    assert st.group_weights([0.2, 0.8], [30, 10], 0.35) == pytest.approx([0.75, 0.25])
    assert st.group_weights([0.2, 0.8], [30, 10], 0.5) == [0.5, 0.5]
    assert st.group_weights([0.2, 0.8], [30, 10], 0.41) is None


def test_a_group_weighted_by_size_is_one_mcnemar_table() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 2, (2, 120)).astype(float)
    assert st.compare_strata(a, b, [30, 90], [0.25, 0.75], True) == st.compare_binary(a, b)
    equal = st.compare_strata(a, b, [30, 90], [0.5, 0.5], True)
    assert equal is not None
    assert equal.method == "stratified"
    assert equal.effect == pytest.approx(((a - b)[:30].mean() + (a - b)[30:].mean()) / 2)
    assert st.compare_strata(a[:2], b[:2], [1, 1], [0.4, 0.6], False) is None


def test_a_model_that_finds_every_word_half_as_likely_has_twice_the_perplexity_and_a_bit_more() -> None:
    rng = np.random.default_rng(19)
    words = rng.integers(50, 400, size=60).astype(float)
    theirs = -words * (2.5 + 0.3 * rng.standard_normal(60))
    ours = theirs - words * (math.log(2) + 0.1 * rng.standard_normal(60))
    ratio, bits = (st.compare_log_likelihoods(ours, theirs, words, scale) for scale in ("ratio", "difference"))
    for found, expected in ((ratio, 2.0), (bits, 1.0)):
        assert found is not None
        assert found.effect == pytest.approx(expected, rel=0.05)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.effect < found.high
        assert found.detectable is not None
    assert ratio is not None
    assert bits is not None
    assert math.log2(ratio.detectable or 0) == pytest.approx(bits.detectable)
    assert math.log2(ratio.low or 0) == pytest.approx(bits.low)
    # Four documents of sixty are too few to know their spread: a sign test says 1 in 8.
    few = st.compare_log_likelihoods(theirs - 20 * (np.arange(60) < 4), theirs, words, "ratio")
    assert few is not None
    assert few.p_value == 0.125


def test_a_group_of_one_task_and_of_its_halves_has_the_error_of_the_task() -> None:
    rng = np.random.default_rng(23)
    a, b = rng.random((2, 200))
    once = st.compare_strata(a, b, [200], [1.0], False)
    twice = st.compare_strata(np.tile(a, 2), np.tile(b, 2), [200, 200], [0.5, 0.5], False)
    for found, error in ((once, stats.sem(a - b)), (twice, stats.sem(a - b) / math.sqrt(2))):
        assert found is not None
        assert found.effect == pytest.approx((a - b).mean())
        assert ((found.high or 0) - (found.low or 0)) / 2 == pytest.approx(1.96 * error, rel=1e-4)
        # z_0.975 + z_0.8, as for two-sided tests at 5 % with a power of 80 %.
        assert found.detectable == pytest.approx(2.8016 * error, rel=1e-4)
    assert once is not None
    assert once.method == "stratified"
    # One task all up and the other all down: no spread in either, and no difference of the group.
    apart = st.compare_strata(
        np.array([1.0] * 5 + [0.0] * 5), np.array([0.0] * 5 + [1.0] * 5), [5, 5], [0.5, 0.5], False
    )
    assert apart is not None
    assert (apart.effect, apart.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["binary", "mean", "small mean", "ratio", "stratified"])
def test_equal_models_differ_significantly_no_more_often_than_promised(kind: str) -> None:
    rng = np.random.default_rng(13)
    rejected = []
    for _ in range(120 if kind == "small mean" else 250):
        n = 12 if kind == "small mean" else 80
        if kind == "binary":
            found = st.compare_binary((rng.random(n) < 0.6).astype(float), (rng.random(n) < 0.6).astype(float))
        elif kind == "ratio":
            weights = rng.integers(50, 300, n).astype(float)
            a, b = (-weights * (2 + 0.2 * rng.standard_normal(n)) for _ in range(2))
            found = st.compare_log_likelihoods(a, b, weights, "ratio")
        elif kind == "stratified":
            found = st.compare_strata(rng.random(n), rng.random(n), [20, 40, 20], [0.5, 0.25, 0.25], False)
        else:
            found = st.compare_means(rng.random(n), rng.random(n))
        assert found is not None
        rejected.append(found.p_value < 0.05)
    assert np.mean(rejected) < 0.085


def test_the_detectable_difference_is_detected_as_often_as_promised() -> None:
    rng = np.random.default_rng(17)
    n, discordance = 300, 0.3
    d = st.detectable_proportion(n, discordance, 0.05)
    assert d is not None
    only_a, only_b = (discordance + d) / 2, (discordance - d) / 2
    found = []
    for _ in range(500):
        draw = rng.random(n)
        a = ((draw < only_a) | (draw > 0.6)).astype(float)
        b = (((draw >= only_a) & (draw < only_a + only_b)) | (draw > 0.6)).astype(float)
        found.append(st.compare_binary(a, b).p_value < 0.05)
    # The exact test is a little conservative, the formula is asymptotic.
    assert 0.72 < np.mean(found) < 0.88


def test_answers_that_are_all_equal_are_no_difference_but_not_proof_of_one() -> None:
    same = np.array([1.0, 0.0] * 20)
    found = st.compare_binary(same, same)
    assert (found.effect, found.p_value) == (0.0, 1.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    assert found.detectable is not None
    assert found.detectable > 0
    means = st.compare_means(np.full(5, 0.3), np.full(5, 0.3))
    assert means is not None
    assert means.p_value == 1.0
    assert st.compare_means(np.array([1.0]), np.array([0.0])) is None
    assert st.compare_log_likelihoods(np.array([-1.0]), np.array([-2.0]), np.array([3.0]), "ratio") is None


def test_answers_that_all_changed_one_way_have_an_interval_within_what_is_possible() -> None:
    found = st.compare_binary(np.ones(10), np.zeros(10))
    assert found.low is not None
    assert 0.5 < found.low < 0.6
    assert found.high == 1.0
    other = st.compare_binary(np.zeros(10), np.ones(10))
    assert (other.low, other.high) == (-1.0, -found.low)


def test_a_report_made_twice_has_the_same_p_values() -> None:
    """Where there are too many permutations for all of them."""
    a, b = np.random.default_rng(3).random((2, 25))
    assert st.compare_means(a, b) == st.compare_means(a, b)
