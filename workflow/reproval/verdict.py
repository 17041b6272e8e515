"""Did a score hold? Equivalence, difference, and what the sample could have shown.

Pure functions of numbers. For every score two questions are asked, of which neither answers the other:

- Equivalence, by two one-sided tests (TOST; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). With d the true
  difference and m the margin, d <= -m and d >= m are both tested; p_equivalence is the larger p-value. Small means: the
  difference is smaller than the margin. Not finding a difference is not evidence of this.
- Difference: d = 0 is tested, two-sided. Small means: there is a difference, however small.

Both families of p-values are corrected over the table by Holm's method (1979), so that the chance of one false
"reproduced" in a table, and that of one false "differs", are each at most alpha. `decide` makes verdicts of them.
Equivalence of paired scores within [0, 1] keeps that level whatever changed; t and score tests are approximations.

Where both sides have samples, questions are paired. Where a reference is only a value, its samples count as others
than ours. They are usually the same questions, so scores agree more than independence would let them: the tests then
keep their levels with room to spare, and say `inconclusive` more often than paired ones would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from reproval import statistics
from reproval.statistics import LEVEL, Floats, Scale, normal_quantile, reach_of_test

Verdict = Literal["identical", "reproduced", "differs", "inconclusive"]

ALPHA = 1 - LEVEL
NUISANCE_POINTS = 120
# The largest bet is the one that pays where nothing changed; 2^-7 suits a spread of 1 and a margin of 0.01.
BETS = 0.5 ** np.arange(8)
BET_WEIGHTS = np.array([1 / 2] + [1 / 14] * 7)


@dataclass(frozen=True)
class Evidence:
    """What the numbers say of one score: ours minus the reference's, or ours over it on a ratio scale.

    `low` and `high` bound the effect at 95 %. `detectable` is the smallest effect that the difference test would have
    found with a power of 80 %, None where it cannot be said. `margin` is on the scale of the effect, both ways: a
    margin of 0.02 on a ratio scale stands for 1/1.02 to 1.02.
    """

    n: int | None
    effect: float
    low: float | None
    high: float | None
    p_equivalence: float
    p_difference: float
    detectable: float | None
    margin: float
    method: str
    scale: Scale = "difference"


def _evidence(compared: statistics.Comparison, p_equivalence: float, margin: float) -> Evidence:
    """What a comparison of the samples says, with the p-value of their equivalence."""
    return Evidence(
        compared.n,
        compared.effect,
        compared.low,
        compared.high,
        p_equivalence,
        compared.p_value,
        compared.detectable,
        margin,
        compared.method,
        compared.scale,
    )


def decide(table: Sequence[Evidence | None], alpha: float = ALPHA) -> list[Verdict]:
    """A verdict for every score of a table, with Holm's correction over each family of tests.

    `reproduced` where equivalence is shown, also if a difference below the margin is certain; else `differs` where a
    difference is shown; else `inconclusive`. None, a score that could not be tested, is `inconclusive`.
    `identical` is nothing that a test could say: the caller sees it in the samples.
    """
    known = [entry for entry in table if entry is not None]
    equivalence = iter(statistics.holm([entry.p_equivalence for entry in known]))
    difference = iter(statistics.holm([entry.p_difference for entry in known]))
    verdicts: list[Verdict] = []
    for entry in table:
        if entry is None:
            verdicts.append("inconclusive")
            continue
        same, other = next(equivalence), next(difference)
        verdicts.append("reproduced" if same < alpha else "differs" if other < alpha else "inconclusive")
    return verdicts


# --- paired 0/1 scores ---------------------------------------------------------------------------------------------


def tango(only_ours: Floats | int, only_theirs: Floats | int, n: int, difference: float) -> Floats:
    """Score statistic of paired proportions for H0: p_ours - p_theirs = `difference`; standard normal under it.

    With b and c the questions that only one side has right, D the difference under H0 and q the probability of c,
    estimated under H0 by maximum likelihood:

        Z = (b - c - nD) / sqrt(n (2q + D(1 - D)))
        q = (sqrt(B² - 4AC) - B) / 2A,   A = 2n,   B = -b - c + (2n - b + c) D,   C = -c D (1 - D)

    For D = 0 it is McNemar's. Source: Tango 1998, Stat. Med. 17:891. Where nothing is left to vary, 0 over 0 is 0.
    """
    b, c, d = np.asarray(only_ours, dtype=np.float64), np.asarray(only_theirs, dtype=np.float64), difference
    linear = -b - c + (2 * n - b + c) * d
    q = (np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0.0)) - linear) / (4 * n)
    spread = np.sqrt(np.maximum(n * (2 * q + d * (1 - d)), 0.0))
    top = b - c - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(spread > 1e-12, top / spread, np.sign(top) * np.inf)
    return np.where(np.isnan(z), 0.0, z)


@lru_cache(maxsize=4096)
def not_inferior(only_ours: int, only_theirs: int, n: int, margin: float) -> float:
    """Exact unconditional p-value of H0: p_ours - p_theirs <= -margin.

    The chance, under H0, of a table whose Tango statistic is at least the observed one, at the worst value of the
    nuisance parameter q = P(only ours is right): over B ~ Bin(n, q) and C | B ~ Bin(n - B, (q + margin) / (1 - q)),
    q from 0 to (1 - margin) / 2 on a grid that is dense near 0. Unlike the normal approximation it keeps its level
    when few questions are answered differently, which is what reproductions look like.
    Source: Hsueh, Liu and Chen 2001, Biometrics 57:478; the boundary of H0 is its worst case there.
    """
    if not 0 < margin < 1:
        return 1.0 if margin <= 0 else 0.0
    observed = float(tango(only_ours, only_theirs, n, -margin)[()])
    # Z falls as c grows: for every b the tables at least as extreme are those with c up to a limit.
    b = np.arange(n + 1, dtype=np.float64)
    low, high = np.full(n + 1, -1.0), n - b
    for _ in range(n.bit_length() + 1):
        middle = np.ceil((low + high) / 2)
        extreme = tango(b, middle, n, -margin) >= observed - 1e-9
        low, high = np.where(extreme, middle, low), np.where(extreme, high, middle - 1)
        high = np.maximum(high, low)
    limit = low
    largest = (1 - margin) / 2
    grid = np.concatenate([[0.0], largest * np.geomspace(1e-5, 1, NUISANCE_POINTS)])
    worst = 0.0
    for q in grid:
        reach = 9 * math.sqrt(n * q * (1 - q)) + 20
        begin, end = max(0, math.floor(n * q - reach)), min(n, math.ceil(n * q + reach)) + 1
        rows = slice(begin, end)
        chance = stats.binom.pmf(b[rows], n, q)
        below = stats.binom.cdf(limit[rows], n - b[rows], min((q + margin) / (1 - q), 1.0))
        worst = max(worst, float(np.sum(chance * below)))
    return min(worst, 1.0)


def tango_interval(only_ours: int, only_theirs: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Score interval for the difference of paired proportions: every D that Tango's statistic does not reject."""
    z = normal_quantile((1 + level) / 2)
    edge = 1 - 1e-12

    def at(d: float, target: float) -> float:
        return float(tango(only_ours, only_theirs, n, d)[()]) - target

    effect = (only_ours - only_theirs) / n
    return _crossing(at, -edge, effect, z, -1.0), _crossing(at, effect, edge, -z, 1.0)


def _crossing(at: Callable[[float, float], float], low: float, high: float, target: float, bound: float) -> float:
    """Where `at` reaches the target between low and high, or `bound` where the effect lies at the end of the scale."""
    if low >= high or at(low, target) * at(high, target) > 0:
        return bound
    return float(optimize.brentq(at, low, high, args=(target,)))


def paired_binary(ours: Floats, theirs: Floats, margin: float, alpha: float = ALPHA) -> Evidence:
    """0/1 scores of the same questions in the same order: exact unconditional TOST, exact McNemar, Tango's interval."""
    compared = statistics.compare_binary(ours, theirs, alpha)
    n, b, c = ours.size, int(np.sum(ours > theirs)), int(np.sum(theirs > ours))
    # By symmetry the upper test is the lower one with the sides exchanged; the larger of both has fewer in its favour.
    p_equivalence = not_inferior(min(b, c), max(b, c), n, float(margin))
    low, high = tango_interval(b, c, n)
    return _evidence(replace(compared, low=low, high=high, method="paired proportions, exact"), p_equivalence, margin)


# --- paired means --------------------------------------------------------------------------------------------------


def tost_t(effect: float, stderr: float, margin: float, df: float) -> float:
    """The larger p-value of two one-sided t tests of `effect` against -margin and margin (Schuirmann 1987)."""
    return float(stats.t.sf((margin - abs(effect)) / stderr, df))


def tost_bounded(differences: Floats, margin: float, reach: float) -> float:
    """The larger p-value of two one-sided tests of a mean whose values lie between -reach and reach.

    Whatever the distribution, and if every value has its own. With d_1..d_n the differences, R their reach and m the
    margin, the chance that this is at least e is at most 1/e where the mean is m or more (Markov), so that p = 1/E:

        E = sum over c of w_c prod over i of (1 + c (m - d_i) / (R - m)),   0 < c <= 1, the w_c sum to 1

    Without any difference the term of c = 1 is (1 - m/R)^-n. The smaller c are for many that cancel out. Student's t
    is too bold here: where few documents change, and change a lot, most samples show neither the change nor its spread.
    Source: Waudby-Smith and Ramdas 2024, J. R. Stat. Soc. B 86:1, with a fixed mixture of bets.
    """
    if margin >= reach:
        return 0.0

    def log_e(d: Floats) -> float:
        with np.errstate(divide="ignore"):
            logs = np.log1p(np.maximum(BETS[:, None] * (margin - d) / (reach - margin), -1.0)).sum(axis=1)
        return float(special.logsumexp(logs, b=BET_WEIGHTS))

    return math.exp(-max(0.0, min(log_e(differences), log_e(-differences))))


def too_few_changed(differences: Floats) -> bool:
    """Whether a t test of unbounded differences says nothing: less than half of them, and fewer than 30, are not 0.

    What did not change has no spread, and of the size of a rare change nothing is known.
    """
    changed = int(np.count_nonzero(differences))
    return changed < min(differences.size / 2, statistics.SMALL_SAMPLE)


def _within_unit(*values: Floats) -> bool:
    return all(bool(((x >= 0) & (x <= 1)).all()) for x in values)


def paired_means(ours: Floats, theirs: Floats, margin: float, alpha: float = ALPHA) -> Evidence | None:
    """Scores of any kind of the same questions: `statistics.compare_means` for difference.

    For equivalence `tost_bounded` where all scores lie in [0, 1], else paired t. Without that bound nothing shows
    equivalence, p = 1, where `too_few_changed` or all differ by the same. None for fewer than two questions.
    """
    compared = statistics.compare_means(ours, theirs, alpha)
    if compared is None:
        return None
    n, d = ours.size, ours - theirs
    if _within_unit(ours, theirs):
        p_equivalence = tost_bounded(d, margin, 1.0)
    elif compared.low is None or too_few_changed(d):
        p_equivalence = 1.0
    else:
        p_equivalence = tost_t(compared.effect, float(d.std(ddof=1)) / math.sqrt(n), margin, n - 1)
    return _evidence(compared, p_equivalence, margin)


def paired_log_likelihoods(
    ours: Floats, theirs: Floats, weights: Floats, scale: Scale, margin: float, alpha: float = ALPHA
) -> Evidence | None:
    """Log-likelihoods of the same documents, weighted by their words or bytes: TOST with t on the ratio of sums.

    On the scale `ratio` (perplexities) the margin is relative: the logarithm of the ratio is tested against
    ±log(1 + margin). On `difference` (bits per byte) it is in bits. A log-likelihood has no bound, so that nothing
    shows equivalence, p = 1, where `too_few_changed` or all differ by the same. None for fewer than two documents.
    """
    compared = statistics.compare_log_likelihoods(ours, theirs, weights, scale, alpha)
    if compared is None:
        return None
    d = ours - theirs
    n, nats = d.size, -float(d.sum() / weights.sum())
    limit = math.log1p(margin) if scale == "ratio" else margin * math.log(2)
    p_equivalence = 1.0
    if compared.low is not None and not too_few_changed(d):
        p_equivalence = tost_t(nats, statistics.ratio_stderr(d, weights), limit, n - 1)
    if compared.detectable is not None and scale == "ratio":
        compared = replace(compared, detectable=compared.detectable - 1)
    return _evidence(compared, p_equivalence, margin)


def paired_strata(
    pairs: Sequence[tuple[Floats, Floats]], weights: Sequence[float], margin: float, alpha: float = ALPHA
) -> Evidence | None:
    """A group of tasks, with the group's own weights (they sum to 1). See `statistics.compare_strata`.

    0/1 scores weighted by size are one table of paired proportions. Otherwise each difference counts w n / n_task, so
    that their plain mean is the group's: `tost_bounded` where all scores lie in [0, 1], else TOST is normal, with each
    task's own variance, and p = 1 as for `paired_means`. None if a task has fewer than two questions.
    """
    if not pairs:
        return None
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    binary = statistics.is_binary(ours) and statistics.is_binary(theirs)
    compared = statistics.compare_strata(ours, theirs, [a.size for a, _ in pairs], weights, binary, alpha)
    if compared is None:
        return None
    if compared.method != "stratified":
        return paired_binary(ours, theirs, margin, alpha)
    n, differences = compared.n, [a - b for a, b in pairs]
    if _within_unit(ours, theirs):
        counts = [w * n / d.size for w, d in zip(weights, differences, strict=True)]
        scaled = np.concatenate([count * d for count, d in zip(counts, differences, strict=True)])
        p_equivalence = tost_bounded(scaled, margin, max(counts))
    elif compared.low is None or too_few_changed(ours - theirs):
        p_equivalence = 1.0
    else:
        variances = [w * w * float(d.var(ddof=1)) / d.size for w, d in zip(weights, differences, strict=True)]
        p_equivalence = tost_t(compared.effect, math.sqrt(sum(variances)), margin, math.inf)
    return _evidence(compared, p_equivalence, margin)


# --- against a published value -------------------------------------------------------------------------------------


def farrington_manning(
    ours: Floats | float, n_ours: int, theirs: Floats | float, n_theirs: int, difference: float
) -> Floats:
    """Score statistic of two independent proportions for H0: p_ours - p_theirs = `difference`. Normal under H0.

        Z = (ours - theirs - D) / sqrt(p (1 - p) / n_ours + (p - D) (1 - p + D) / n_theirs)

    with p the maximum likelihood estimate of p_ours under H0, the root of a cubic. Source: Farrington and Manning 1990,
    Stat. Med. 9:1447, with their closed form. (The `score` method of statsmodels 0.14 and 0.15 is meant to be the same;
    for 56 of 70 against 48 of 80 its interval ends at 0.3436 where the published one ends at 0.3377.)
    """
    a, b, d = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64), difference
    theta = n_theirs / n_ours
    k3 = 1 + theta
    k2 = -(1 + theta + a + theta * b + d * (theta + 2))
    k1 = d**2 + d * (2 * a + theta + 1) + a + theta * b
    k0 = -a * d * (1 + d)
    v = k2**3 / (27 * k3**3) - k2 * k1 / (6 * k3**2) + k0 / (2 * k3)
    u = np.where(v < 0, -1.0, 1.0) * np.sqrt(np.maximum(k2**2 / (9 * k3**2) - k1 / (3 * k3), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(u == 0, 0.0, v / u**3)
        angle = (math.pi + np.arccos(np.clip(cosine, -1, 1))) / 3
        p = np.clip(2 * u * np.cos(angle) - k2 / (3 * k3), max(d, 0.0), min(1 + d, 1.0))
        spread = np.sqrt(np.maximum(p * (1 - p) / n_ours + (p - d) * (1 - p + d) / n_theirs, 0.0))
        z = np.where(spread > 1e-12, (a - b - d) / spread, np.sign(a - b - d) * np.inf)
    return np.where(np.isnan(z), 0.0, z)


def unpaired_proportions(
    ours: float, n_ours: int, theirs: float, n_theirs: int, margin: float, rounding: float = 0.0, alpha: float = ALPHA
) -> Evidence:
    """Two proportions of independent samples: Farrington and Manning's score tests, and the interval that inverts them.

    `rounding` is the most by which the published value may be off because it was rounded: the equivalence tests are
    made at the unfavourable end of it, the difference test at the favourable one. The detectable difference is
    (z_(1-alpha/2) + z_power) times the standard error, with one success and one failure added to either side
    (Agresti and Caffo 2000).
    """
    effect = ours - theirs

    def z(difference: float, target: float = 0.0) -> float:
        return float(farrington_manning(ours, n_ours, theirs, n_theirs, difference)[()]) - target

    room = margin - rounding
    p_equivalence = 1.0
    if room >= 1:
        p_equivalence = 0.0
    elif room > abs(effect):
        p_equivalence = float(max(stats.norm.sf(z(-room)), stats.norm.cdf(z(room))))
    p_difference = 1.0
    if abs(effect) > rounding:
        p_difference = float(2 * stats.norm.sf(abs(z(math.copysign(rounding, effect)))))
    reach = normal_quantile((1 + LEVEL) / 2)
    edge = 1 - 1e-9
    low, high = _crossing(z, -edge, effect, reach, -1.0), _crossing(z, effect, edge, -reach, 1.0)
    adjusted = [(p * n + 1) / (n + 2) for p, n in ((ours, n_ours), (theirs, n_theirs))]
    stderr = math.sqrt(sum(p * (1 - p) / (n + 2) for p, n in zip(adjusted, (n_ours, n_theirs), strict=True)))
    return Evidence(
        n_ours,
        effect,
        max(low - rounding, -1.0),
        min(high + rounding, 1.0),
        p_equivalence,
        p_difference,
        reach_of_test(alpha) * stderr + rounding,
        margin,
        "two proportions, score",
    )


def unpaired_values(
    ours: float,
    stderr_ours: float,
    theirs: float,
    stderr_theirs: float,
    margin: float,
    *,
    n: int | None = None,
    rounding: float = 0.0,
    scale: Scale = "difference",
    alpha: float = ALPHA,
) -> Evidence | None:
    """Two values with standard errors: t with `n` - 1 degrees of freedom, n the smaller known sample, normal without.

    On the scale `ratio` the logarithms are compared, with standard errors by the delta method, and the margin is
    relative. `rounding` as for proportions. None if no error is known, or a ratio has no logarithm: then there is
    nothing to test with.
    """
    effect, variance = ours - theirs, stderr_ours**2 + stderr_theirs**2
    limit, rounded = margin, rounding
    if scale == "ratio":
        if ours <= 0 or theirs <= 0:
            return None
        effect = math.log(ours / theirs)
        variance = (stderr_ours / ours) ** 2 + (stderr_theirs / theirs) ** 2
        limit, rounded = math.log1p(margin), rounding / theirs
    if variance <= 0:
        return None
    stderr, df = math.sqrt(variance), (n - 1 if n is not None and n > 1 else math.inf)
    p_equivalence = tost_t(effect, stderr, limit - rounded, df) if limit > rounded else 1.0
    p_difference = min(1.0, float(2 * stats.t.sf((abs(effect) - rounded) / stderr, df)))
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * stderr + rounded
    detectable = reach_of_test(alpha) * stderr + rounded
    shown: Callable[[float], float] = math.exp if scale == "ratio" else float
    return Evidence(
        n,
        shown(effect),
        shown(effect - half),
        shown(effect + half),
        p_equivalence,
        p_difference,
        math.expm1(detectable) if scale == "ratio" else detectable,
        margin,
        "two values, t" if math.isfinite(df) else "two values, normal",
        scale,
    )
