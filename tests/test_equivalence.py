"""Equivalence: two one-sided tests, paired over seeds, against a margin that was written down first."""

import numpy as np
import pytest

from feedbackpath import cli
from feedbackpath.report.equivalence import (
    compare_with_backprop,
    describe,
    look,
    seeds_needed,
    t_quantile,
)
from feedbackpath.train.results import Results, Run, read_results


def results_of(**values):
    return Results(
        runs=[
            Run(rule=rule, seed=seed, status="finished", test=float(value))
            for rule, of in values.items()
            for seed, value in enumerate(of)
        ]
    )


def test_quantiles_are_students():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 9, 10, 11, 60, 999, 1000, 10**6):
        for share in (0.5001, 0.9, 0.95, 0.975, 0.999):
            assert t_quantile(share, freedom) == pytest.approx(
                stats.t.ppf(share, freedom), rel=1e-6, abs=1e-9
            )


def test_the_interval_and_the_verdict_are_those_of_two_one_sided_tests():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for shift in (0.0, 0.3, 0.6, 2.0, -2.0):
        bp = random.normal(3, 1, 12)
        own = bp + random.normal(shift, 0.4, 12)
        (found,) = compare_with_backprop(results_of(bp=bp, kp=own), 0.5)
        low, high = stats.t.interval(0.9, 11, loc=(own - bp).mean(), scale=stats.sem(own - bp))
        assert (found.low, found.high) == pytest.approx((low, high))
        below = stats.ttest_1samp(own - bp, 0.5, alternative="less").pvalue < 0.05
        above = stats.ttest_1samp(own - bp, -0.5, alternative="greater").pvalue < 0.05
        assert (found.verdict == "equivalent") == (below and above)


def test_a_rule_at_the_margin_passes_one_time_in_twenty_and_power_is_as_planned():
    random = np.random.default_rng(1)

    def share_equivalent(shift, n, spread=0.4, trials=1500):
        found = 0
        for _ in range(trials):
            d = random.normal(shift, spread, n)
            half = t_quantile(0.95, n - 1) * d.std(ddof=1) / n**0.5
            found += d.mean() - half > -0.5 and d.mean() + half < 0.5
        return found / trials

    assert share_equivalent(0.5, 12) == pytest.approx(0.05, abs=0.02)
    assert share_equivalent(0.0, seeds_needed(0.4, 0.5)) > 0.75


def test_only_seeds_that_both_have_finished_count():
    results = results_of(bp=(3.0, 3.1, 3.2, 3.3), kp=(3.0, 3.2, 3.2, 9.9))
    results.runs[-1].status = "diverged"
    (found,) = compare_with_backprop(results, 0.5)
    assert found.n == 3
    assert compare_with_backprop(results_of(kp=(1.0, 2.0)), 0.5) == []


def test_a_second_look_is_at_half_the_level_and_the_same_look_is_not_taken_twice():
    results = results_of(bp=(3.0, 3.1, 3.2), kp=(3.1, 3.1, 3.3))
    look(results, 0.5, seeds=3)
    look(results, 0.5, seeds=3)
    assert [test.level for test in results.equivalence] == [0.05]
    look(results, 0.5, seeds=5)
    assert [test.level for test in results.equivalence] == [0.05, 0.025]


def test_the_command_writes_the_margin_down_and_prints_the_verdict(tmp_path, capsys):
    small = [
        "--data",
        "digits",
        "--model",
        "mlp",
        "--samples-per-epoch",
        "128",
        "--epochs",
        "1",
        "--num-threads",
        "1",
    ]
    job = ["compare", *small, "--rules", "bp,fa", "--out", str(tmp_path / "run"), "--equivalence"]
    for arguments, code, message in (
        ([*job, "90", "--seeds", "2"], 0, "fa minus bp:"),
        ([*job, "95", "--seeds", "2", "--resume"], 2, "equivalence (90.0 there, 95.0 now)"),
        ([*job, "90", "--seeds", "3", "--resume"], 0, "95% interval"),
        (["report", str(tmp_path / "run")], 0, "95% interval"),
        (["compare", *small, "--rules", "fa,kp", "--seeds", "2", "--equivalence", "1"], 2, "add bp"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        printed = capsys.readouterr()
        assert stop.value.code == code, printed.err
        assert message in " ".join((printed.out + printed.err).split())
    assert [test.seeds for test in read_results(tmp_path / "run").equivalence] == [2, 3]
    assert "fa minus bp" in (tmp_path / "run" / "report.html").read_text()


def test_a_rule_that_came_after_a_look_joins_it():
    results = results_of(bp=(3.0, 3.1, 3.2), kp=(3.1, 3.1, 3.3))
    look(results, 0.5, seeds=3)
    (kp,) = results.equivalence[0].verdicts
    results.runs += results_of(fa=(5.0, 5.1, 5.3)).runs
    look(results, 0.5, seeds=3)
    (test,) = results.equivalence
    assert [found.rule for found in test.verdicts] == ["kp", "fa"]
    assert test.verdicts[0] == kp


def test_a_rule_that_could_not_be_judged_is_named():
    results = results_of(bp=(3.0, 3.1, 3.2), kp=(3.1, 3.1, 3.3), fa=(1.0,))
    results.runs += [Run(rule="wm", seed=seed, status="diverged") for seed in range(3)]
    look(results, 0.5, seeds=3)
    kp, *others = describe(results)
    assert kp.startswith("kp minus bp: +0.07 points")
    assert others == [
        f"{rule} minus bp: not judged, fewer than two seeds that both have finished" for rule in ("fa", "wm")
    ]


@pytest.mark.parametrize(
    ("margin", "told"),
    [(0.5, "+0.07"), (0.02, "+0.067"), (0.05, "+0.067"), (0.001, "+0.0667"), (5.0, "+0.07")],
)
def test_a_difference_is_told_with_more_digits_than_its_margin(margin, told):
    results = results_of(bp=(3.0, 3.1, 3.2), kp=(3.1, 3.1, 3.3))
    look(results, margin, seeds=3)
    assert describe(results)[0].startswith(f"kp minus bp: {told} points, 90% interval ")


@pytest.mark.parametrize(("spread", "margin"), [(0.5, 0.01), (0.0, 0.5), (3e6, 1e-3)])
def test_a_narrow_margin_is_answered_at_once(spread, margin):
    n = seeds_needed(spread, margin)
    expected = 3 if spread == 0 else min(((1.6449 + 1.2816) * spread / margin) ** 2, 10**9)
    assert n == pytest.approx(expected, rel=1e-3)
