"""Whether a rule is as good as backprop: two one-sided tests against a margin that was written down first.

Seeds are paired: runs of one seed start from the same forward weights and see the same samples. With d the
differences to backprop over n seeds, the interval is ``mean(d) ± t(1 - level, n - 1) sd(d) / sqrt(n)``. A
rule is equivalent at the level if the whole interval lies within the margin (Schuirmann 1987): at 5% that is
the 90% interval. What an interval does not show is not shown; it is no difference either.
"""

import bisect
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from feedbackpath.report.curves import finished, group_by_rule
from feedbackpath.train.results import EquivalenceTest, Results, Verdict

LEVEL = 0.05
POWER = 0.8
FEW = 10  # seeds: with fewer it is a pilot
MOST_SEEDS = 10**9
MANY = 1000  # degrees of freedom: from here on a series is exact to seven digits


def look(results: Results, margin: float, seeds: int) -> None:
    """Test a job that has ended, once: a look at more seeds than before is a new one, at half the level.

    Rules that came after a look join it.
    """
    looks = results.equivalence
    if not looks or looks[-1].seeds < seeds:
        level = LEVEL / 2 ** len(looks)
        looks.append(EquivalenceTest(margin=margin, level=level, seeds=seeds, verdicts=[]))
    judged = {found.rule for found in looks[-1].verdicts}
    found = compare_with_backprop(results, margin, looks[-1].level)
    looks[-1].verdicts += [verdict for verdict in found if verdict.rule not in judged]


def describe(results: Results) -> list[str]:
    """Return the last look in words, a line per rule; of a few seeds, how many a study needs.

    Example:
        >>> from feedbackpath.train.results import EquivalenceTest, Verdict
        >>> found = {"n": 12, "difference": 0.1, "low": 0.0, "high": 0.2, "seeds_needed": 8}
        >>> kp = Verdict(rule="kp", verdict="equivalent", **found)
        >>> test = EquivalenceTest(margin=0.5, level=0.05, seeds=12, verdicts=[kp])
        >>> describe(Results(runs=[], equivalence=[test]))
        ['kp minus bp: +0.10 points, 90% interval +0.00 to +0.20, n = 12: equivalent within 0.5']
    """
    if not results.equivalence:
        return []
    test = results.equivalence[-1]
    unit = {"%": " points", "": ""}.get(results.metric.unit, f" {results.metric.unit}")
    unjudged = {run.rule: None for run in results.runs if run.rule != "bp"}
    for found in test.verdicts:
        unjudged.pop(found.rule, None)
    interval = f"{100 * (1 - 2 * test.level):g}% interval"
    digits = max(2, 1 + math.ceil(-math.log10(test.margin)))  # one more than the margin has
    return [
        f"{found.rule} minus bp: {found.difference:+.{digits}f}{unit}, {interval} {found.low:+.{digits}f} to "
        f"{found.high:+.{digits}f}, n = {found.n}: {found.verdict} within {test.margin:g}"
        + (f"; a study needs n = {max(found.seeds_needed, FEW)}" if found.n < FEW else "")
        for found in test.verdicts
    ] + [f"{rule} minus bp: not judged, fewer than two seeds that both have finished" for rule in unjudged]


def compare_with_backprop(results: Results, margin: float, level: float = LEVEL) -> list[Verdict]:
    """Test each rule of a job against backprop, over the seeds that both have finished; two at least.

    Example:
        >>> from feedbackpath.train.results import Run
        >>> values = {"bp": (3.0, 3.2, 2.9), "kp": (3.1, 3.2, 3.0)}
        >>> runs = [
        ...     Run(rule=rule, seed=seed, status="finished", test=value)
        ...     for rule, found in values.items()
        ...     for seed, value in enumerate(found)
        ... ]
        >>> (kp,) = compare_with_backprop(Results(runs=runs), margin=0.5)
        >>> kp.verdict, f"{kp.low:.2f} to {kp.high:.2f}"
        ('equivalent', '-0.03 to 0.16')
    """
    groups = group_by_rule(finished(results.runs))
    values = {rule: {run.seed: run.test for run in runs} for rule, runs in groups.items()}
    baseline = values.pop("bp", {})
    found = []
    for rule, own in values.items():
        pairs = [(own[seed], baseline[seed]) for seed in own if seed in baseline]
        differences = [value - base for value, base in pairs if value is not None and base is not None]
        if len(differences) > 1:
            found.append(_compare(rule, differences, margin, level))
    return found


def _compare(rule: str, differences: Sequence[float], margin: float, level: float) -> Verdict:
    n, mean, spread = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    half = t_quantile(1 - level, n - 1) * spread / math.sqrt(n)
    low, high = mean - half, mean + half
    return Verdict(
        rule=rule,
        n=n,
        difference=mean,
        low=low,
        high=high,
        verdict=_judge(low, high, margin),
        seeds_needed=seeds_needed(spread, margin, level),
    )


def _judge(low: float, high: float, margin: float) -> Literal["equivalent", "not equivalent", "not shown"]:
    if -margin < low and high < margin:
        return "equivalent"
    if low > margin or high < -margin:
        return "not equivalent"
    return "not shown"


def seeds_needed(spread: float, margin: float, level: float = LEVEL, power: float = POWER) -> int:
    """Return how many seeds show equivalence with a power, if the true difference is none.

    Args:
        spread: Standard deviation of paired differences, from pilot seeds that are then discarded.
        margin: How far a difference may go.
        level: Of each of the two tests.
        power: Chance of showing it.

    Example:
        >>> seeds_needed(spread=0.5, margin=0.5), seeds_needed(spread=0.1, margin=0.5)
        (11, 3)
    """

    def shows(n: int) -> bool:
        reach = t_quantile(1 - level, n - 1) + t_quantile((1 + power) / 2, n - 1)
        return reach * spread / math.sqrt(n) <= margin

    return 3 + bisect.bisect_left(range(3, MOST_SEEDS), True, key=shows)


def t_quantile(share: float, freedom: int) -> float:
    """Return the value below which a share of Student's t distribution lies, for shares from 0.5.

    Example:
        >>> round(t_quantile(0.95, 11), 3), round(t_quantile(0.975, 2), 3)
        (1.796, 4.303)
    """
    if freedom >= MANY:  # Abramowitz & Stegun 1964, 26.7.5
        z = statistics.NormalDist().inv_cdf(share)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_share(t: float, freedom: int) -> float:
    """Return the share of the distribution below t (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, total, term = math.cos(angle), 0.0, 1.0
    if freedom % 2:
        for k in range(1, freedom - 1, 2):
            term = cosine if k == 1 else term * cosine * cosine * (k - 1) / k
            total += term
        return 0.5 + (angle + math.sin(angle) * total) / math.pi
    for k in range(0, freedom - 1, 2):
        term = 1.0 if k == 0 else term * cosine * cosine * (k - 1) / k
        total += term
    return 0.5 + math.sin(angle) * total / 2
