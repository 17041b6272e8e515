"""Intervals, paired tests and detectable differences for scores.

Pure functions of numbers. Every result names its method, and every method its source, so that the report can print
both where the number stands. `value` is always the number that lm-eval reported: these functions put an interval
around it and never replace it. What the methods' names stand for in print is in workflow/report/methods.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]
Scale = Literal["difference", "ratio"]

LEVEL = 0.95
POWER = 0.80
SMALL_SAMPLE = 30  # below it, paired means are tested by permutation instead of Student's t


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """What one model scores more than another on the same questions: `a` minus `b`, or `a` over `b` for a ratio."""

    n: int
    effect: float
    low: float | None
    high: float | None
    p_value: float
    method: str
    scale: Scale = "difference"
    detectable: float | None = None


# scipy takes a tenth of a millisecond for each, and a report asks for the same few ten thousand times.
@cache
def normal_quantile(p: float) -> float:
    return float(stats.norm.ppf(p))


@cache
def student_quantile(p: float, freedom: int) -> float:
    return float(stats.t.ppf(p, freedom))


def reach_of_test(alpha: float) -> float:
    """How many standard errors a difference must have, to be found by a normal test with a power of 80 %."""
    return normal_quantile(1 - alpha / 2) + normal_quantile(POWER)


def is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())


# --- intervals -----------------------------------------------------------------------------------------------------


# Many scores share a count and an n, and statsmodels takes a tenth of a millisecond for each.
@cache
def wilson(successes: float, n: float, level: float = LEVEL, method: str = "Wilson") -> Interval:
    """Wilson score interval for `successes` of `n`; of none it begins at 0 and of all it ends at 1, exactly.

    Source: Wilson 1927; statsmodels. `n` need not be whole (effective sample sizes). Raises ValueError for n <= 0.
    """
    if n <= 0 or not 0 <= successes <= n * (1 + 1e-12):
        raise ValueError(f"wilson: successes={successes} of n={n}")
    low, high = proportion_confint(min(successes, n), n, alpha=1 - level, method="wilson")
    return Interval(float(low) if successes > 0 else 0.0, float(high) if successes < n else 1.0, method)


def normal(value: float, stderr: float, level: float = LEVEL) -> Interval:
    """value ± z·stderr: the only interval left when nothing but a value and its standard error is known."""
    z = normal_quantile((1 + level) / 2)
    return Interval(value - z * stderr, value + z * stderr, "normal")


def mean_interval(values: Floats, level: float = LEVEL) -> Interval | None:
    """Interval for the mean of a sample.

    0/1 values: Wilson. Others: Student's t; where that would leave [0, 1] although all values lie in it, or all values
    are equal, the conservative Wilson interval for bounded means (Bhatia and Davis 2000: variance <= p(1-p)). None for
    fewer than two values, or for equal values without a bound: such a sample says nothing about its spread.
    """
    n = values.size
    if n == 0:
        return None
    if is_binary(values):
        return wilson(float(values.sum()), n, level)
    mean = float(values.mean())
    bounded = bool(values.min() >= 0 and values.max() <= 1)
    spread = float(values.std(ddof=1)) if n > 1 else 0.0
    if spread > 0:
        half = student_quantile((1 + level) / 2, n - 1) * spread / math.sqrt(n)
        if not bounded or (mean - half >= 0 and mean + half <= 1):
            return Interval(mean - half, mean + half, "Student t")
    return wilson(mean * n, n, level, "Wilson, bounded mean") if bounded else None


def effective_wilson(value: float, stderr: float | None, n: int, level: float = LEVEL) -> Interval:
    """Wilson interval for a group of 0/1 tasks, with the sample size that the group's standard error stands for.

    Source: Franco et al. 2019 (Wilson with n_eff = p(1-p)/stderr²). With a standard error of 0 or none, n itself.
    """
    effective = value * (1 - value) / stderr**2 if stderr else float(n)
    return wilson(value * effective, effective, level, "Wilson, effective n") if effective > 0 else wilson(value * n, n)


def ratio_stderr(numerators: Floats, weights: Floats) -> float:
    """Standard error of sum(numerators)/sum(weights), linearized (Cochran 1977, eq. 6.12)."""
    ratio = numerators.sum() / weights.sum()
    residuals = numerators - ratio * weights
    n = numerators.size
    return float(math.sqrt(np.square(residuals).sum() / (n - 1) / n) / weights.mean())


def log_likelihood_interval(
    value: float, numerators: Floats, weights: Floats, level: float = LEVEL
) -> tuple[Interval, Scale] | None:
    """Interval for a score made of log-likelihoods, recognized by what `value` is.

    r = sum(numerators)/sum(weights) is the mean log-likelihood per unit of weight, in nats. exp(-r) is lm-eval's
    perplexity, and its interval is made for r and carried over; -r/ln 2 is its bits per byte. None if `value` is
    neither, no number, or for fewer than two documents. The second item is the scale on which two such scores compare.
    """
    if not math.isfinite(value) or numerators.size < 2 or weights.sum() <= 0:
        return None
    ratio = float(numerators.sum() / weights.sum())
    half = student_quantile((1 + level) / 2, numerators.size - 1) * ratio_stderr(numerators, weights)
    if -ratio < 700 and math.isclose(value, math.exp(-ratio), rel_tol=1e-6):
        low, high = math.exp(-ratio - half), math.exp(min(-ratio + half, 700))
        return Interval(low, high, "Student t, log scale"), "ratio"
    if math.isclose(value, -ratio / math.log(2), rel_tol=1e-6):
        return Interval(value - half / math.log(2), value + half / math.log(2), "Student t, ratio"), "difference"
    return None


# --- groups --------------------------------------------------------------------------------------------------------


def group_weights(values: Sequence[float], sizes: Sequence[int], reported: float) -> list[float] | None:
    """How lm-eval weighted the subtasks of a group: weights that sum to 1, or None if neither of its two ways fits.

    lm-eval's `aggregate_subtask_metrics` weights by size or equally, and its results do not say which: the reported
    value does.
    """
    if not values or sum(sizes) <= 0:
        return None
    for raw in (list(sizes), [1] * len(sizes)):
        weights = [w / sum(raw) for w in raw]
        if math.isclose(sum(v * w for v, w in zip(values, weights, strict=True)), reported, rel_tol=1e-6, abs_tol=1e-9):
            return weights
    return None


# --- paired comparisons --------------------------------------------------------------------------------------------


def detectable_proportion(n: int, discordance: float, alpha: float, power: float = POWER) -> float | None:
    """Smallest difference of two paired proportions that McNemar's test finds with the given power.

    Solves n = (z_(1-alpha/2) sqrt(psi) + z_power sqrt(psi - d²))² / d² for d, psi being the share of questions answered
    differently (Connor 1987), and at least d. None if even a difference of 1 would be missed.
    """
    za, zb = normal_quantile(1 - alpha / 2), normal_quantile(power)

    def short(d: float) -> float:
        psi = max(discordance, d)
        return (za * math.sqrt(psi) + zb * math.sqrt(max(psi - d * d, 0.0))) - d * math.sqrt(n)

    return float(optimize.brentq(short, 1e-9, 1.0)) if n > 0 and short(1.0) < 0 else None


@cache
def _detectable_effect(n: int, alpha: float, power: float) -> float | None:
    """In standard deviations of the differences. Depends on nothing else, and takes tens of milliseconds."""
    try:
        found: Any = TTestPower().solve_power(effect_size=None, nobs=n, alpha=alpha, power=power)
    except ValueError:
        return None
    size = float(np.ravel(found)[0])
    return size if math.isfinite(size) and size > 0 else None


def detectable_mean(n: int, spread: float, alpha: float, power: float = POWER) -> float | None:
    """Smallest mean difference, in units of the score, that a paired t test finds with this power (noncentral t)."""
    if n < 3 or spread <= 0:
        return None
    effect = _detectable_effect(n, alpha, power)
    return effect * spread if effect is not None else None


def compare_binary(a: Floats, b: Floats, alpha: float = 1 - LEVEL) -> Comparison:
    """Two models' 0/1 scores on the same questions, in the same order: exact McNemar.

    The interval of the difference is Bonett and Price's (2012): one is added to each count of disagreement, two to n.
    """
    n = a.size
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    both = int(np.sum((a == 1) & (b == 1)))
    table = [[both, only_a], [only_b, n - both - only_a - only_b]]
    p_value = float(mcnemar(table, exact=True).pvalue) if only_a + only_b else 1.0
    pa, pb = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = normal_quantile((1 + LEVEL) / 2) * math.sqrt((pa + pb - (pa - pb) ** 2) / (n + 2))
    # An agreement of all questions does not mean that no disagreement exists: psi is taken from the adjusted counts.
    detectable = detectable_proportion(n, min(pa + pb, 1.0), alpha)
    return Comparison(
        n,
        (only_a - only_b) / n,
        max(pa - pb - half, -1.0),
        min(pa - pb + half, 1.0),
        min(p_value, 1.0),
        "McNemar, exact",
        detectable=detectable,
    )


def _at_least_of_signs(p_value: float, differences: Floats) -> float:
    """The p-value, but no smaller than that of a sign test in which all questions that changed agree: 2^(1 - changed).

    Where few changed, their spread is not known well enough for t or z to say more.
    """
    return max(p_value, min(1.0, 2.0 ** (1 - int(np.count_nonzero(differences)))))


def compare_means(a: Floats, b: Floats, alpha: float = 1 - LEVEL) -> Comparison | None:
    """Two models' scores of any kind on the same questions: paired t, or sign-flip permutation below 30 questions.

    None for fewer than two questions.
    """
    d = a - b
    n = d.size
    if n < 2:
        return None
    mean, spread = float(d.mean()), float(d.std(ddof=1))
    small = n < SMALL_SAMPLE
    if spread <= 1e-12 * max(1.0, abs(mean)):
        # Equal everywhere: nothing to test. The same step everywhere: only the permutation test has a distribution.
        return Comparison(n, mean, None, None, _at_least_of_signs(0.0, d), "paired permutation")
    half = student_quantile((1 + LEVEL) / 2, n - 1) * spread / math.sqrt(n)
    if small:
        test = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=9999, vectorized=True, rng=0
        )
        p_value, method = float(test.pvalue), "paired permutation"
    else:
        p_value, method = _at_least_of_signs(float(stats.ttest_1samp(d, 0.0).pvalue), d), "paired t"
    return Comparison(n, mean, mean - half, mean + half, p_value, method, detectable=detectable_mean(n, spread, alpha))


def compare_log_likelihoods(
    a: Floats, b: Floats, weights: Floats, scale: Scale, alpha: float = 1 - LEVEL
) -> Comparison | None:
    """Two models' log-likelihoods of the same documents, weighted by their words or bytes.

    `ratio` compares perplexities: exp(-(r_a - r_b)) is model a's perplexity over model b's. `difference` compares bits
    per byte. The test is Student's t on the linearized ratio of sums (Cochran 1977). None for fewer than two documents.
    """
    d = a - b
    n = d.size
    if n < 2:
        return None
    r, se = float(d.sum() / weights.sum()), ratio_stderr(d, weights)
    t = student_quantile((1 + LEVEL) / 2, n - 1)
    if se <= 1e-12 * max(1.0, abs(r)):
        effect = math.exp(-r) if scale == "ratio" else -r / math.log(2)
        return Comparison(n, effect, None, None, _at_least_of_signs(0.0, d), "paired ratio", scale)
    p_value = _at_least_of_signs(float(2 * stats.t.sf(abs(r) / se, n - 1)), d)
    spread = se * math.sqrt(n)
    detectable = detectable_mean(n, spread, alpha)
    low, high = -r - t * se, -r + t * se
    if scale == "ratio":
        return Comparison(
            n, math.exp(-r), math.exp(low), math.exp(high), p_value, "paired ratio", "ratio",
            math.exp(detectable) if detectable is not None else None,
        )  # fmt: skip
    bits = 1 / math.log(2)
    return Comparison(
        n, -r * bits, low * bits, high * bits, p_value, "paired ratio",
        detectable=detectable * bits if detectable is not None else None,
    )  # fmt: skip


def compare_strata(
    a: Floats, b: Floats, sizes: Sequence[int], weights: Sequence[float], binary: bool, alpha: float = 1 - LEVEL
) -> Comparison | None:
    """Two models on the subtasks of a group, one after the other, with the group's own weights (they sum to 1).

    0/1 scores weighted by size are one pooled McNemar table. Otherwise the weighted mean of the subtasks' differences,
    normal, with each subtask's own variance (Cochran 1977, ch. 5). None if a subtask has fewer than two questions.
    """
    if binary and np.allclose(np.asarray(sizes) / sum(sizes), np.asarray(weights)):
        return compare_binary(a, b, alpha)
    if min(sizes) < 2:
        return None
    differences = np.split(a - b, np.cumsum(sizes)[:-1])
    effect = float(sum(w * d.mean() for w, d in zip(weights, differences, strict=True)))
    se = math.sqrt(sum(w * w * float(d.var(ddof=1)) / d.size for w, d in zip(weights, differences, strict=True)))
    n = sum(sizes)
    if se == 0:
        return Comparison(n, effect, None, None, _at_least_of_signs(float(effect == 0), a - b), "stratified")
    z = normal_quantile((1 + LEVEL) / 2)
    p_value = _at_least_of_signs(float(2 * stats.norm.sf(abs(effect) / se)), a - b)
    return Comparison(
        n, effect, effect - z * se, effect + z * se, p_value, "stratified", detectable=reach_of_test(alpha) * se,
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests, in the order given. Source: Holm 1979; statsmodels."""
    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]
