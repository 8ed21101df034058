"""The commands that train on chips, and the search for what is tolerated."""

import json
import math
from pathlib import Path

import chip_step
import hardware_counts
import hardware_grid
import hardware_tolerance
import pytest
from matplotlib import rc_context

from feedbackpath import cli
from feedbackpath.errors import ConfigError
from feedbackpath.hardware import theory
from feedbackpath.hardware.devices import PRESETS
from feedbackpath.jobs.tolerance import IMPERFECTIONS, find_tolerance, table_of
from feedbackpath.mirror.noise import RELU_SPREAD
from feedbackpath.report.counts import mean_counts
from feedbackpath.report.parts import FIGURE_STYLE
from feedbackpath.report.tolerance import draw_errors, draw_tolerance
from feedbackpath.train.chips import make_chip
from feedbackpath.train.config import CHIPS, CompareConfig
from feedbackpath.train.results import Metric, Results, Run, read_results

SMALL = [
    "--data",
    "digits",
    "--model",
    "mlp",
    "--epochs",
    "1",
    "--samples-per-epoch",
    "256",
    "--num-threads",
    "1",
]


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    return stop.value.code


def test_the_flag_knows_every_preset():
    assert set(CHIPS) == set(PRESETS)


def test_hardware_trains_and_reports(tmp_path, capsys):
    out = tmp_path / "out"
    costs = tmp_path / "costs.yaml"
    costs.write_text("pulse: 1.0\n")
    flags = [*SMALL, "--read-bits", "8", "--out", str(out), "--costs", str(costs), "--rules"]
    assert command("hardware", *flags, "bp,kp") == 2
    error = capsys.readouterr().err
    assert "pulse_pj" in error
    assert error.count("\n") == 1
    costs.write_text("pulse_pj: 1000.0\n")
    assert command("hardware", *flags, "dtp,pal") == 2
    assert "--costs has no effect" in capsys.readouterr().err
    assert command("hardware", *flags, "bp,kp") == 0
    shown = capsys.readouterr().out
    assert "energy of a training step" in shown
    assert "not counted" not in shown
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["chip"] == "reram"
    assert {run["rule"] for run in results["runs"]} == {"bp", "kp"}
    assert (out / "report.html").exists()
    counted = mean_counts(read_results(out))
    assert {rule: set(arrays) for rule, arrays in counted.items()} == {
        "bp": {"W", "one"},
        "kp": {"W", "B", "one"},
    }
    assert counted["kp"]["W"].work["forward"].reads == 3 * 128  # layers and samples of a step
    assert counted["bp"]["W"] == counted["bp"]["one"]
    assert mean_counts(Results(runs=[Run(rule="dtp", seed=0)])) == {}


def test_settings_of_a_chip_reach_it():
    config = CompareConfig(
        chip="soft", read_bits=8, read_noise=0.1,
        chip_settings={
            "noise": 0.5, "read": {"backward": {"bits": 4}, "update": {"noise": 0.2}},
            "wiring": {"delay": 2}, "verify": 1, "feedback": {"noise": 0.7},
        },
    )  # fmt: skip
    chip = make_chip(config, 3)
    assert (chip.device.noise, chip.feedback_device.noise, chip.seed) == (0.5, 0.7, 3)
    assert (chip.reads["forward"].bits, chip.reads["backward"].bits) == (8, 4)
    assert (chip.reads["backward"].noise, chip.reads["update"].noise) == (0.1, 0.2)
    assert chip.reads["update"].bits is None
    assert (chip.wiring.delay, chip.verify) == (2, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nois": 0.5}, "--chip soft has .*noise"),
        ({"read": {"forward": {"bit": 4}}}, "read.forward has no 'bit'"),
        ({"wiring": 3}, "wiring must map"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_chip(CompareConfig(chip="soft", chip_settings=settings), 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chip", "memristor"], "choose ideal, linear"),
        (["--read-bits", "8"], "belongs to --chip"),
        (["--chip", "soft", "--compile"], "on one device"),
        (["--chip", "missing.csv"], "cannot read"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(flags, message, tmp_path, capsys):
    assert command("compare", *SMALL, *flags, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def search(out, resume=False, margin=100.0, imperfections=("step", "swapped"), **settings):
    config = CompareConfig(
        data="digits", model="mlp", epochs=1, samples_per_epoch=256, num_threads=1,
        **({"rules": ("bp", "kp")} | settings),
    )  # fmt: skip
    return find_tolerance(
        config,
        out,
        imperfections=imperfections,
        margin=margin,
        bisections=1,
        resume=resume,
        tell=lambda _: None,
    )


def test_a_search_is_kept_resumed_and_drawn(tmp_path):
    kept = search(tmp_path, rules=("kp",))
    assert kept.found == {"kp": {"step": IMPERFECTIONS["step"].worst, "swapped": 1.0}}
    assert len(kept.trials) == 3  # all is within 100 points: the ideal, and the worst of each
    wider = search(tmp_path, resume=True)
    assert wider.trials[:3] == kept.trials
    assert "swapped" not in wider.found["bp"]  # its B gets no updates
    assert table_of(wider) == (
        ["imperfection", "kp", "bp"],
        [["step", "≥ 1", "≥ 1"], ["swapped", "≥ 1", "–"]],
    )
    draw_tolerance(wider.model_dump(), tmp_path)
    with rc_context(FIGURE_STYLE):
        figure = draw_errors(wider.model_dump())
        figure.draw_without_rendering()
        ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert "0.1" in ticks
    assert not any("$" in tick for tick in ticks)  # text in place of mathematics
    assert (tmp_path / "figures" / "tolerance.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="--resume"):
        search(tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        search(tmp_path, resume=True, margin=2.0)


def test_a_search_bisects_between_what_passes_and_what_fails(tmp_path, monkeypatch):
    from feedbackpath.jobs import tolerance

    monkeypatch.setattr(
        tolerance._Search, "_train", lambda self, rule, name, value, seed: 5.0 + (value or 0.0)
    )
    kept = search(tmp_path, margin=0.1, rules=("kp",))
    assert kept.found["kp"] == {"step": pytest.approx(0.0316), "swapped": 0.02}


def test_no_seed_runs_after_a_value_has_failed(tmp_path, monkeypatch):
    from feedbackpath.jobs import tolerance

    found = {
        None: [5.0] * 4,
        1e-3: [5.5, 5.5, 5.0, 5.0],
        1.0: [23.9, 0.0, 0.0, 0.5],
        0.0316: [8.0, 8.0, 8.0, None],
    }
    monkeypatch.setattr(tolerance._Search, "_train", lambda self, rule, name, value, seed: found[value][seed])
    kept = search(tmp_path, margin=1.0, rules=("kp",), seeds=4, imperfections=("step",))
    runs = [(trial.value, trial.seed) for trial in kept.trials]
    # 24 in sum may still pass; 24.4 and 24.0 with one that diverged do not.
    assert [seed for value, seed in runs if value == 1.0] == [0, 1, 2, 3]
    assert [seed for value, seed in runs if value == 0.0316] == [0, 1, 2, 3]
    assert kept.found["kp"] == {"step": 1e-3}
    found[1.0] = [24.1, 0.0, 0.0, 0.0]
    kept = search(tmp_path / "other", margin=1.0, rules=("kp",), seeds=4, imperfections=("step",))
    assert [trial.seed for trial in kept.trials if trial.value == 1.0] == [0]


def test_what_cannot_be_searched_is_refused(tmp_path, monkeypatch):
    from feedbackpath.jobs import tolerance

    monkeypatch.setattr(tolerance._Search, "_train", lambda *_: None)
    with pytest.raises(ConfigError, match="kp diverged on an ideal chip: give it a lower learning rate"):
        search(tmp_path, rules=("kp",))
    monkeypatch.setattr(tolerance, "metric_of", lambda _: Metric(name="accuracy", lower_is_better=False))
    with pytest.raises(ConfigError, match="needs a metric that falls; accuracy of digits rises"):
        search(tmp_path / "other")


def test_theory_and_measurement_part_where_the_page_says():
    file = Path(__file__).parent.parent / "benchmarks" / "hardware-theory" / "theory.json"
    found = json.loads(file.read_text())
    for cell in found["noise"]:
        own = cell["written"] if "soft" in cell["series"] else 0.0  # soft bounds contract as well
        expected = theory.gap_variance(cell["noise"], 1.0, cell["shrink"] + own, sides=cell["sides"])
        if cell["variance"] < 0.1 or own:
            momentum = 1.09 if "momentum" in cell["series"] else 1.0
            assert cell["variance"] == pytest.approx(momentum * expected, rel=0.095)
    for cell in found["contraction"]:
        if cell["part"] > 1 and cell["written"] < 2.0:  # all but whole layers and the cells that write least
            assert cell["left"] == pytest.approx(theory.soft_contraction(cell["written"], 1.0), rel=0.1)
    for cell in found["floor"]:
        expected = math.sqrt(2.0) * theory.symmetry_spread(1.0, cell["spread"])
        assert cell["left"] == pytest.approx(expected, rel=0.145)
    for cell in found["mirror"]:
        spread = 1.0 if cell["series"] == "linear" else RELU_SPREAD
        expected = theory.mirror_angle_deg(64, cell["samples"], cell["noise"], spread)
        assert cell["angle_deg"] == pytest.approx(expected, rel=0.03)


def test_the_page_has_what_the_studies_found():
    root = Path(__file__).parent.parent
    page = (root / "docs/hardware.md").read_text()
    found = hardware_tolerance.read(hardware_tolerance.OUT)
    assert list(found.found) == list(hardware_tolerance.RULES)
    for rule in found.found:
        errors = found.errors(rule, None, None)
        assert len(errors) == hardware_tolerance.SEEDS
        assert f"`{rule}` {sum(errors) / len(errors):.1f}%" in page
    for mark, make in hardware_grid.TABLES.items():
        assert f"<!-- {mark}:begin -->\n{make()}\n<!-- {mark}:end -->" in page
    listed = [
        line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "; from " in line
    ]
    assert listed == list(IMPERFECTIONS)
    marked = f"<!-- counts:begin -->\n{hardware_counts.make_table()}<!-- counts:end -->"
    assert marked in page, "write it anew: python benchmarks/hardware_counts.py --draw"


def test_the_page_has_what_the_simulation_of_a_chip_costs_and_that_is_below_its_goal():
    marked = f"<!-- chip-step:begin -->\n{chip_step.table()}\n<!-- chip-step:end -->"
    page = Path(__file__).parent.parent / "docs" / "hardware.md"
    assert marked in page.read_text(encoding="utf-8"), "write it anew: python benchmarks/chip_step.py --draw"
    rows = json.loads(chip_step.OUT.read_text(encoding="utf-8"))["rows"]
    assert max(row[f"{chip_step.BITS} bits"]["q3"] for row in rows) < 2.5
