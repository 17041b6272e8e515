"""Verdicts against published examples, and by simulation: how often `reproduced` and `differs` are said wrongly.

`pytest -s tests/unit/test_verdict.py` prints the rates that docs/reproduce.md quotes.
"""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from reproval import verdict
from reproval.verdict import Evidence

ALPHA = 0.05
TRIALS = 20_000
# Three standard errors of a rate of 0.05 over the trials, so that a right method fails this one time in 700.
NOISE = 3 * math.sqrt(ALPHA * (1 - ALPHA) / TRIALS)


def binary(both: int, only_a: int, only_b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [both, only_a, only_b, n - both - only_a - only_b])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [both, only_a, only_b, n - both - only_a - only_b])
    return a, b


# --- published examples ---------------------------------------------------------------------------------------------


def test_tango_1998_the_soft_contact_lenses() -> None:
    # Tango 1998, section 5: 44 patients, one of whom fared worse with the new method; margin 0.1: Z = 1.709.
    assert float(verdict.tango(0, 1, 44, -0.1)[()]) == pytest.approx(1.709, abs=5e-4)
    low, high = verdict.tango_interval(0, 1, 44)
    assert (round(low, 3), round(high, 3)) == (-0.118, 0.059)


def test_tango_interval_of_fagerland_lydersen_and_laake() -> None:
    # Statistical Analysis of Contingency Tables (2017), ch. 8: airway hyper-responsiveness, 1 1 / 7 12.
    low, high = verdict.tango_interval(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


def test_at_a_difference_of_zero_tango_is_mcnemar() -> None:
    assert float(verdict.tango(15, 5, 100, 0.0)[()]) == pytest.approx((15 - 5) / math.sqrt(20))


@pytest.mark.parametrize(
    ("a", "b", "interval"),
    [
        ((56, 70), (48, 80), (0.0533, 0.3377)),
        ((9, 10), (3, 10), (0.1821, 0.8370)),
        ((5, 56), (0, 29), (-0.0313, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((0, 10), (0, 10), (-0.2775, 0.2775)),
        ((10, 10), (0, 20), (0.7225, 1.0)),
        ((10, 10), (0, 10), (0.6777, 1.0)),
    ],
)
def test_intervals_of_newcombe_1998(a: tuple[int, int], b: tuple[int, int], interval: tuple[float, float]) -> None:
    # Newcombe 1998, Stat. Med. 17:873, table II, method 5 (Mee): the inversion of Farrington and Manning's test.
    found = verdict.unpaired_proportions(a[0] / a[1], a[1], b[0] / b[1], b[1], margin=0.1)
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-4)


def test_tost_of_student_s_sleep_data() -> None:
    # Student 1908; TOSTER's vignette tests it at ±0.5: t = -2.777 and -5.348 on 9 degrees of freedom, and -4.062 at 0.
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    found = verdict.paired_means(first, second, margin=0.5)
    assert found is not None
    assert found.effect == pytest.approx(-1.58)
    assert found.p_equivalence == pytest.approx(float(stats.t.sf(-2.777, 9)), abs=1e-4)
    assert (found.low, found.high) == pytest.approx((-2.4599, -0.7001), abs=1e-4)


# --- properties -----------------------------------------------------------------------------------------------------


def test_exact_p_value_without_disagreement_is_what_can_be_said_by_hand() -> None:
    # No disagreement among n questions has probability (1 - margin)^n at worst: 149 questions for a margin of 0.02.
    assert verdict.not_inferior(0, 0, 149, 0.02) == pytest.approx(0.98**149, rel=1e-3)
    assert verdict.not_inferior(0, 0, 149, 0.02) < ALPHA < verdict.not_inferior(0, 0, 148, 0.02)


def test_exact_p_value_is_the_sum_over_all_tables() -> None:
    b, c, n, margin = 2, 3, 30, 0.2
    observed = verdict.tango(b, c, n, -margin)
    rows, columns = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = rows + columns <= n
    rows, columns = rows[inside], columns[inside]
    extreme = np.array([verdict.tango(x, y, n, -margin) >= observed - 1e-9 for x, y in zip(rows, columns, strict=True)])
    tables = np.stack([rows, columns, n - rows - columns], axis=1)
    worst = max(
        stats.multinomial.pmf(tables[extreme], n, [q, q + margin, 1 - 2 * q - margin]).sum()
        for q in np.linspace(1e-9, (1 - margin) / 2 - 1e-9, 200)
    )
    assert verdict.not_inferior(b, c, n, margin) == pytest.approx(worst, abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), data=st.data(), margin=st.floats(0.005, 0.5))
def test_paired_proportions_are_symmetric_and_sane(n: int, data: st.DataObject, margin: float) -> None:
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    here = verdict.paired_binary(*binary(0, b, c, n), margin)
    there = verdict.paired_binary(*binary(0, c, b, n), margin)
    assert here.low is not None
    assert here.high is not None
    assert (here.effect, here.p_equivalence, here.p_difference) == pytest.approx(
        (-there.effect, there.p_equivalence, there.p_difference)
    )
    assert -1 <= here.low <= here.effect <= here.high <= 1
    assert 0 <= here.p_equivalence <= 1
    if abs(here.effect) >= margin:
        assert here.p_equivalence >= 0.3


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 3000), m=st.integers(2, 3000), a=st.floats(0, 1), b=st.floats(0, 1), rounding=st.floats(0, 0.01)
)
@example(n=2, m=2, a=1 - 2**-53, b=1e-9, rounding=0.0)
@example(n=2, m=3, a=0.0, b=1e-5, rounding=1e-12)
def test_rounding_never_helps(n: int, m: int, a: float, b: float, rounding: float) -> None:
    exact = verdict.unpaired_proportions(a, n, b, m, 0.05)
    rounded = verdict.unpaired_proportions(a, n, b, m, 0.05, rounding)
    # The closed form has an arccosine, which near its ends is exact to half of the digits.
    assert rounded.p_equivalence >= exact.p_equivalence - 1e-7
    assert rounded.p_difference >= exact.p_difference - 1e-7
    assert exact.low is not None
    assert exact.high is not None
    assert exact.low - 1e-6 <= exact.effect <= exact.high + 1e-6


def test_a_certain_difference_below_the_margin_is_reproduced_and_a_wider_table_asks_for_more() -> None:
    small = Evidence(10_000, 0.005, 0.002, 0.008, 0.001, 0.001, 0.004, 0.02, "")
    large = Evidence(10_000, 0.05, 0.04, 0.06, 1.0, 1e-9, 0.004, 0.02, "")
    vague = Evidence(20, 0.0, -0.2, 0.2, 0.4, 1.0, 0.3, 0.02, "")
    assert verdict.decide([small, large, vague, None]) == ["reproduced", "differs", "inconclusive", "inconclusive"]
    near = Evidence(500, 0.0, -0.02, 0.02, 0.03, 1.0, 0.02, 0.02, "")
    assert verdict.decide([near]) == ["reproduced"]
    assert verdict.decide([near, vague]) == ["inconclusive", "inconclusive"]
    apart = Evidence(500, 0.05, 0.01, 0.09, 1.0, 0.03, 0.02, 0.02, "")
    assert verdict.decide([apart]) == ["differs"]
    assert verdict.decide([apart, vague]) == ["inconclusive", "inconclusive"]


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_apart_are_not_reproduced_whichever_side_is_better(sign: int) -> None:
    low, high = FRACTIONS[:400] - 0.2 * sign, FRACTIONS[:400] + 0.2 * sign
    means = verdict.paired_means(low, high, 0.02)
    group = verdict.paired_strata([(low[:100], high[:100]), (low[100:], high[100:])], [0.5, 0.5], 0.02)
    unbounded = verdict.paired_means(10 * low + np.arange(400) % 2, 10 * high, 0.02)
    perplexity = verdict.paired_log_likelihoods(-300 * low, -300 * high, np.full(400, 50.0), "ratio", 0.02)
    binary_scores = verdict.paired_binary(*(binary(200, 90, 10, 400)[::sign]), 0.02)
    values = verdict.unpaired_values(0.5, 0.01, 0.5 + 0.4 * sign, 0.01, 0.02)
    proportions = verdict.unpaired_proportions(0.5, 400, 0.5 + 0.4 * sign, 400, 0.02)
    for found in (means, group, unbounded, perplexity, binary_scores, values, proportions):
        assert found is not None
        assert found.p_equivalence > 0.99, found.method
        assert verdict.decide([found]) == ["differs"], found.method


def test_a_margin_of_nothing_shows_nothing_and_one_of_the_whole_scale_everything() -> None:
    equal = binary(30, 0, 0, 60)
    assert verdict.paired_binary(*equal, 0.0).p_equivalence == 1.0
    assert verdict.paired_binary(*equal, 1.0).p_equivalence == 0.0
    for margin, expected in ((0.0, 1.0), (1.0, 0.0)):
        means = verdict.paired_means(FRACTIONS[:60], FRACTIONS[:60], margin)
        assert means is not None
        assert means.p_equivalence == expected
        assert verdict.unpaired_proportions(0.5, 60, 0.5, 60, margin).p_equivalence == expected


@pytest.mark.parametrize(
    ("changed", "of", "too_few"), [(4, 10, True), (5, 10, False), (29, 1000, True), (30, 1000, False)]
)
def test_unbounded_scores_need_half_of_the_documents_or_thirty_that_changed(
    changed: int, of: int, too_few: bool
) -> None:
    """As docs/reproduce.md says."""
    assert verdict.too_few_changed(np.where(np.arange(of) < changed, 0.3, 0.0)) == too_few


def test_the_smallest_difference_that_could_have_been_shown_is_shown_four_times_in_five() -> None:
    n, rng = 400, np.random.default_rng(5)
    table = binary(200, 20, 20, n)
    found = verdict.paired_binary(*table, margin=0.02).detectable
    assert found is not None
    # Discordance as in the table it was computed for, with the difference that it claims to find.
    psi = 42 / 402
    up, down = (psi + found) / 2, (psi - found) / 2
    draws = rng.multinomial(n, [up, down, 1 - psi], size=4000)
    z = verdict.tango(draws[:, 0], draws[:, 1], n, 0.0)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.80, abs=0.03)


def test_ratio_scales_speak_in_ratios() -> None:
    found = verdict.unpaired_values(66.0, 2.5, 65.3, 2.5, 0.08, scale="ratio")
    assert found is not None
    assert found.effect == pytest.approx(66 / 65.3)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 1 < found.high
    assert found.low * found.high == pytest.approx(found.effect**2)
    assert verdict.unpaired_values(0.0, 2.5, 65.3, 2.5, 0.08, scale="ratio") is None
    assert verdict.unpaired_values(0.5, 0.0, 0.5, 0.0, 0.08) is None


def test_a_margin_in_bits_is_the_same_as_that_of_the_perplexity_of_a_byte() -> None:
    """0.02 bits a byte are a perplexity of 2^0.02 times as much."""
    rng = np.random.default_rng(4)
    ours = -rng.uniform(100, 300, 60)
    theirs = ours + rng.normal(0, 3, 60)
    bits, ratio = (
        verdict.paired_log_likelihoods(ours, theirs, np.full(60, 50.0), scale, margin)
        for scale, margin in (("difference", 0.02), ("ratio", 2**0.02 - 1))
    )
    assert bits is not None
    assert ratio is not None
    assert 0.001 < bits.p_equivalence < 0.9
    assert bits.p_equivalence == pytest.approx(ratio.p_equivalence)


def test_what_rounding_explains_is_no_difference() -> None:
    """A published 0.50 may be 0.505; of two million questions even a difference of 0.005 would else be certain."""
    assert verdict.unpaired_proportions(0.5055, 10**6, 0.50, 10**6, 0.02, rounding=0.005).p_difference > 0.3
    assert verdict.unpaired_proportions(0.5055, 10**6, 0.50, 10**6, 0.02).p_difference < 1e-9
    values = [
        verdict.unpaired_values(0.5055, 0.0005, 0.50, 0.0005, 0.02, rounding=rounding) for rounding in (0.005, 0.0)
    ]
    assert [found is not None and found.p_difference > 0.3 for found in values] == [True, False]


def test_log_likelihoods_that_differ_by_rounding_are_reproduced() -> None:
    rng = np.random.default_rng(1)
    ours = -rng.uniform(100, 300, 10)
    theirs = ours + rng.normal(0, 1e-3, 10)
    found = verdict.paired_log_likelihoods(ours, theirs, np.full(10, 50.0), "ratio", 0.02)
    assert found is not None
    assert verdict.decide([found]) == ["reproduced"]
    assert found.detectable is not None
    assert 0 < found.detectable < 1e-3
    half_as_likely = verdict.paired_log_likelihoods(ours + 50 * math.log(2), ours, np.full(10, 50.0), "ratio", 0.02)
    assert half_as_likely is not None
    assert half_as_likely.effect == pytest.approx(0.5)


def test_a_group_weighted_by_size_is_one_table_and_by_task_is_stratified() -> None:
    a, b = binary(30, 3, 2, 50), binary(60, 1, 6, 150)
    pooled = verdict.paired_strata([a, b], [0.25, 0.75], 0.05)
    assert pooled == verdict.paired_binary(*(np.concatenate(side) for side in zip(a, b, strict=True)), 0.05)
    equal = verdict.paired_strata([a, b], [0.5, 0.5], 0.05)
    assert equal is not None
    assert equal.effect == pytest.approx(0.5 * 1 / 50 - 0.5 * 5 / 150)
    assert equal.method == "stratified"
    assert verdict.paired_strata([], [], 0.05) is None


# --- how often a verdict is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "margin"), [(60, 0.1), (200, 0.05), (1319, 0.02), (1319, 0.04)])
@pytest.mark.parametrize("disagreement", [0.0, 0.02, 0.2])
def test_false_reproduced_of_paired_proportions(n: int, margin: float, disagreement: float) -> None:
    """A true difference of exactly the margin: `reproduced` is wrong. `disagreement` comes on top of it, both ways."""
    rng = np.random.default_rng(n)
    p = [disagreement / 2, disagreement / 2 + margin, 1 - disagreement - margin]
    tables, counts = np.unique(rng.multinomial(n, p, size=TRIALS)[:, :2], axis=0, return_counts=True)
    # Far from the limit the exact test agrees with z; a z above 1.95 is counted as rejected, which can only add.
    z = verdict.tango(tables[:, 0], tables[:, 1], n, -margin)
    near = (z > 1.55) & (z <= 1.95)
    rate = counts[z > 1.95].sum() + sum(
        int(count)
        for (b, c), count in zip(tables[near], counts[near], strict=True)
        if verdict.not_inferior(min(b, c), max(b, c), n, margin) < ALPHA
    )
    print(f"\nfalse reproduced, paired 0/1, n={n}, margin {margin}, disagreement {disagreement}: {rate / TRIALS:.4f}")
    assert rate / TRIALS <= ALPHA + NOISE


@pytest.mark.parametrize(("n", "disagreement"), [(60, 0.2), (200, 0.1), (1319, 0.05), (1319, 0.5)])
def test_false_differs_of_paired_proportions(n: int, disagreement: float) -> None:
    rng = np.random.default_rng(n)
    p = [disagreement / 2, disagreement / 2, 1 - disagreement]
    draws = rng.multinomial(n, p, size=TRIALS)
    discordant, fewer = draws[:, :2].sum(axis=1), draws[:, :2].min(axis=1)
    rate = np.mean(np.minimum(2 * stats.binom.cdf(fewer, discordant, 0.5), 1) < ALPHA)
    print(f"\nfalse differs, paired 0/1, n={n}, disagreement {disagreement}: {rate:.4f}")
    assert rate <= ALPHA + NOISE
    # The rate above is that of the p-value which `paired_binary` gives.
    b, c = (int(x) for x in draws[0, :2])
    expected = min(1.0, 2 * float(stats.binom.cdf(min(b, c), b + c, 0.5)))
    assert verdict.paired_binary(*binary(0, b, c, n), 0.02).p_difference == pytest.approx(expected)


# Shares of correct answers, as an F1 score gives them: far from 0 and 1, so that a change of 0.4 fits both ways.
FRACTIONS = 0.5 + 0.05 * np.sin(np.arange(2000))


def sparse(n: int, changed: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Fractional scores of n documents, of which the first few changed by `size`."""
    theirs = FRACTIONS[:n]
    return theirs + np.where(np.arange(n) < changed, size, 0.0), theirs


@pytest.mark.parametrize("n", [40, 100, 300, 1000])
@pytest.mark.parametrize("size", [0.04, 0.1, 0.4])
def test_false_reproduced_of_paired_means_where_few_change_much(n: int, size: float) -> None:
    """A true difference of exactly the margin, all of it from a share of margin / size of the documents.

    The verdict depends on how many changed alone, so that the rate is a sum and not a simulation.
    """
    margin, rate = 0.02, 0.0
    for changed in range(n + 1):
        chance = float(stats.binom.pmf(changed, n, margin / size))
        if chance > 1e-7:
            found = verdict.paired_means(*sparse(n, changed, size), margin)
            rate += chance * (found is not None and found.p_equivalence < ALPHA)
    print(f"\nfalse reproduced, paired means, n={n}, changes of {size}: {rate:.4f}")
    assert rate <= ALPHA


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_false_reproduced_of_groups_where_few_change(noise: float) -> None:
    """0/1 scores of three tasks with equal weights; `noise` is the share of answers that change both ways."""
    rng, margin, trials, sizes = np.random.default_rng(7), 0.02, 2000, (200, 300, 500)
    wrong = 0
    for _ in range(trials):
        pairs = []
        for size in sizes:
            draw = rng.random(size)
            better, worse = draw < margin + noise / 2, draw > 1 - noise / 2
            pairs.append((np.where(better, 1.0, 0.0), np.where(worse, 1.0, 0.0)))
        found = verdict.paired_strata(pairs, [1 / 3] * 3, margin)
        assert found is not None
        assert found.method == "stratified"
        wrong += found.p_equivalence < ALPHA
    print(f"\nfalse reproduced, group of equal weights, noise {noise}: {wrong / trials:.4f}")
    assert wrong / trials <= ALPHA


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_false_reproduced_of_scores_without_a_bound(share: float) -> None:
    """Log-likelihoods of which a share changed, one way and by very unequal sizes; a true difference of the margin.

    Below 30 changes nothing is said. Above, Student's t is too bold for so skewed a change; the docs say by how much.
    """
    rng, margin, n, trials = np.random.default_rng(8), 0.02, 300, 2000
    wrong = 0
    for _ in range(trials):
        theirs = -rng.uniform(100, 300, n)
        ours = theirs - np.where(rng.random(n) < share, rng.exponential(50 * math.log1p(margin) / share, n), 0.0)
        found = verdict.paired_log_likelihoods(ours, theirs, np.full(n, 50.0), "ratio", margin)
        assert found is not None
        wrong += found.p_equivalence < ALPHA
    print(f"\nfalse reproduced, perplexity, {share} of the documents change: {wrong / trials:.4f}")
    assert wrong / trials <= (0.0 if share < 0.1 else 0.1)


def test_many_small_changes_and_no_change_are_reproduced_with_enough_documents() -> None:
    rng, n = np.random.default_rng(9), 1319
    theirs = rng.uniform(0.2, 0.8, n)
    for ours in (theirs, theirs + rng.normal(0, 0.05, n), np.where(rng.random(n) < 0.1, rng.uniform(0, 1, n), theirs)):
        found = verdict.paired_means(ours, theirs, 0.02)
        assert found is not None
        assert verdict.decide([found]) == ["reproduced"]
    assert {margin: reproduced_from(margin) for margin in (0.02, 0.01)} == DOCUMENTS_WITHOUT_CHANGE


def reproduced_from(margin: float) -> int:
    """The least number of documents of a mean that shows equivalence if none of them changed."""
    return next(n for n in range(2, 1000) if verdict.tost_bounded(np.zeros(n), margin, 1.0) < ALPHA)


# docs/reproduce.md gives it.
DOCUMENTS_WITHOUT_CHANGE = {0.02: 180, 0.01: 362}


def test_what_did_not_change_is_no_evidence_where_nothing_bounds_a_change() -> None:
    five = np.array([0.2, 0.4, 0.5, 0.6, 0.9])
    means = verdict.paired_means(five, five, 0.02)
    assert means is not None
    assert means.p_equivalence > 0.5
    unbounded = verdict.paired_means(10 * five, 10 * five, 0.02)
    perplexity = verdict.paired_log_likelihoods(-five, -five, np.ones(5), "ratio", 0.02)
    shifted = verdict.paired_log_likelihoods(-five - 0.001, -five, np.ones(5), "ratio", 0.02)
    # Five of a hundred that changed by next to nothing, and a step that is the same for all.
    hundred = np.arange(100.0)
    few = verdict.paired_means(hundred, hundred + 1e-6 * (np.arange(100) < 5), 0.02)
    step = verdict.paired_means(hundred, hundred + 0.001, 0.02)
    few_of_group = verdict.paired_strata(
        [(hundred, hundred), (five * 10, five * 10 + [1e-6, 0, 0, 0, 0])], [0.5, 0.5], 1
    )
    few_texts = verdict.paired_log_likelihoods(
        -hundred, -hundred - 1e-6 * (np.arange(100) < 5), hundred + 1, "ratio", 1
    )
    for found in (unbounded, perplexity, shifted, few, step, few_of_group, few_texts):
        assert found is not None
        assert found.p_equivalence == 1.0
    assert verdict.decide([unbounded, perplexity, shifted]) == ["inconclusive"] * 3
    group = verdict.paired_strata([(np.zeros(2), np.zeros(2)), (np.ones(3), np.ones(3))], [0.5, 0.5], 0.02)
    assert group is not None
    assert group.p_equivalence > 0.5


def test_two_changed_answers_do_not_show_a_difference() -> None:
    group = verdict.paired_strata([(np.zeros(2), np.ones(2)), (np.zeros(3), np.zeros(3))], [0.5, 0.5], 0.02)
    assert group is not None
    assert (group.effect, group.low, group.high, group.p_difference) == (-0.5, None, None, 0.5)
    assert verdict.decide([group]) == ["inconclusive"]
    few = verdict.paired_means(*sparse(400, 4, 0.4), 0.001)
    assert few is not None
    assert few.p_difference == 0.125


@pytest.mark.parametrize("n", [10, 40, 400])
def test_rates_of_paired_means(n: int) -> None:
    rng = np.random.default_rng(n)
    noise = rng.normal(0, 0.1, (TRIALS, n))
    errors = noise.std(axis=1, ddof=1) / math.sqrt(n)
    margin = 0.04
    at_margin = (noise + margin).mean(axis=1)
    reproduced = np.mean(stats.t.sf((margin - np.abs(at_margin)) / errors, n - 1) < ALPHA)
    differs = np.mean(2 * stats.t.sf(np.abs(noise.mean(axis=1)) / errors, n - 1) < ALPHA)
    print(f"\npaired means, n={n}: false reproduced {reproduced:.4f}, false differs {differs:.4f}")
    assert reproduced <= ALPHA + NOISE
    assert differs == pytest.approx(ALPHA, abs=NOISE)
    found = verdict.paired_means(noise[0] + margin, np.zeros(n), margin)
    assert found is not None
    assert found.p_equivalence == pytest.approx(
        float(stats.t.sf((margin - abs(at_margin[0])) / errors[0], n - 1)), rel=1e-6
    )


@pytest.mark.parametrize(("n", "m"), [(250, 250), (1319, 1319), (1000, 10042), (100, 1319)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.76])
def test_rates_of_two_proportions(n: int, m: int, p: float) -> None:
    rng = np.random.default_rng(n + m)
    margin, z = 0.08, float(stats.norm.ppf(1 - ALPHA))
    ours, theirs = rng.binomial(n, p + margin, TRIALS) / n, rng.binomial(m, p, TRIALS) / m
    inside = (verdict.farrington_manning(ours, n, theirs, m, -margin) > z) & (
        verdict.farrington_manning(ours, n, theirs, m, margin) < -z
    )
    equal = rng.binomial(n, p, TRIALS) / n
    apart = np.abs(verdict.farrington_manning(equal, n, theirs, m, 0.0)) > stats.norm.ppf(1 - ALPHA / 2)
    print(f"\ntwo proportions of {n} and {m} at {p}: false reproduced {inside.mean():.4f}, differs {apart.mean():.4f}")
    # The score test is not exact: its level is kept to within half a point.
    assert inside.mean() <= ALPHA + NOISE + 0.005
    assert apart.mean() <= ALPHA + NOISE + 0.005
    found = verdict.unpaired_proportions(float(ours[0]), n, float(theirs[0]), m, margin)
    assert (found.p_equivalence < ALPHA) == inside[0]


def test_the_same_questions_asked_twice_make_unpaired_tests_cautious_not_wrong() -> None:
    """A published value is usually of the same questions. Their agreement makes false verdicts rarer."""
    rng = np.random.default_rng(3)
    n, p, margin, z = 1319, 0.54, 0.0432, float(stats.norm.ppf(1 - ALPHA))
    draws = rng.multinomial(n, [p - 0.03, 0.03 + margin, 0.03, 1 - p - 0.03 - margin], size=TRIALS)
    ours, theirs = (draws[:, 0] + draws[:, 1]) / n, (draws[:, 0] + draws[:, 2]) / n
    rate = np.mean(
        (verdict.farrington_manning(ours, n, theirs, n, -margin) > z)
        & (verdict.farrington_manning(ours, n, theirs, n, margin) < -z)
    )
    print(f"\nfalse reproduced, value only, same questions: {rate:.4f}")
    assert rate <= ALPHA / 2


@pytest.mark.parametrize("scores", [1, 10])
def test_a_whole_table_keeps_its_level(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance that any verdict of a table is a false one, by the code that makes the verdicts."""
    # statsmodels collects garbage at every correction, which takes a tenth of a second each time.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    rng = np.random.default_rng(scores)
    tables, margin, error = 400, 0.05, 0.015

    def any_of(word: str, truth: float) -> float:
        said = 0
        for values in truth + rng.normal(0, error, (tables, scores)):
            found = [verdict.unpaired_values(v, error, 0.0, 1e-9, margin) for v in values]
            said += word in verdict.decide(found)
        return said / tables

    reproduced, differs = any_of("reproduced", margin), any_of("differs", 0.0)
    print(f"\ntable of {scores}: any false reproduced {reproduced:.3f}, any false differs {differs:.3f}")
    allowed = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / tables)
    assert reproduced <= allowed
    assert differs <= allowed
    assert min(reproduced, differs) > 0.01
