"""Tuning: the same number of trials and the same points for every rule, on validation data alone."""

import json
from statistics import fmean

import pytest
import yaml

from feedbackpath import cli
from feedbackpath.data.dataset import ArraySplit
from feedbackpath.errors import ConfigError
from feedbackpath.jobs.tune import Search, point_of, settings_for, space_of, tune
from feedbackpath.rules import RULES
from feedbackpath.tasks import load_task
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.rules import make_rule
from feedbackpath.train.settings import merge_config

SMALL = {"data": "digits", "model": "mlp", "epochs": 1, "samples_per_epoch": 256, "num_threads": 1}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def search(out, *, trials=2, resume=False, **settings) -> Search:
    config = CompareConfig(**(SMALL | {"rules": ("bp", "ss")} | settings))
    return tune(config, out, trials=trials, resume=resume, command="", tell=lambda *_: None)


def test_every_rule_gets_as_many_trials_at_the_same_points(tmp_path):
    found = search(tmp_path, trials=3)
    by_rule = {rule: [t for t in found.trials if t.rule == rule] for rule in ("bp", "ss")}
    assert [len(trials) for trials in by_rule.values()] == [3, 3]
    for one, other in zip(*by_rule.values(), strict=True):
        assert {name: other.settings[name] for name in one.settings} == one.settings
        assert {"ss.magnitude", "ss.scale"} <= other.settings.keys()
    kept = Search.model_validate_json((tmp_path / "tune.json").read_text())
    assert kept == found
    best = min(by_rule["bp"], key=lambda trial: trial.validation)
    chosen = yaml.safe_load((tmp_path / "chosen.yaml").read_text())
    assert chosen["by_rule"]["bp"] == best.settings
    merged = merge_config(CompareConfig(**SMALL), tmp_path / "chosen.yaml")
    assert merged.for_rule("bp").lr == best.settings["lr"]
    assert merged.for_rule("kp").lr == merged.lr


def test_the_test_split_is_never_looked_at(tmp_path, monkeypatch):
    test = load_task("digits").test
    batch = ArraySplit.batch

    def look(self, indices, epoch):
        assert not (len(self.images) == len(test.images) and self.labels.equal(test.labels))
        return batch(self, indices, epoch)

    monkeypatch.setattr(ArraySplit, "batch", look)
    assert search(tmp_path, trials=1).best("bp") is not None


def test_a_search_goes_on_where_it_was_and_more_trials_leave_the_first_as_they_are(tmp_path):
    whole = search(tmp_path / "whole", trials=3)
    search(tmp_path / "broken", trials=1)
    with pytest.raises(ConfigError, match="already has a search"):
        search(tmp_path / "broken", trials=3)
    found = search(tmp_path / "broken", trials=3, resume=True)

    def numbers(result):
        return [trial.model_dump(exclude={"seconds"}) for trial in result.trials]

    assert numbers(found) == numbers(whole)
    with pytest.raises(ConfigError, match="a search with another config"):
        search(tmp_path / "broken", trials=3, resume=True, epochs=2)


def test_a_trial_of_several_seeds_counts_by_their_mean_and_goes_on_between_seeds(tmp_path):
    found = search(tmp_path, rules=("ss",), seeds=3)
    assert [(t.number, t.repeat) for t in found.trials] == [(n, k) for n in range(2) for k in range(3)]
    alone = search(tmp_path / "alone", rules=("ss",), trials=1, seed=1)
    assert found.trials[1].validation != alone.trials[0].validation  # the points of another seed are others
    means = [fmean(t.validation for t in found.trials if t.number == number) for number in range(2)]
    assert found.best("ss").validation == min(means)
    assert found.best("ss").settings == found.trials[3 * means.index(min(means))].settings
    kept = found.model_copy(deep=True)
    kept.trials = kept.trials[:4]  # broken off within the second trial
    (tmp_path / "tune.json").write_text(kept.model_dump_json())
    again = search(tmp_path, rules=("ss",), seeds=3, resume=True)
    values = [[t.validation for t in result.trials] for result in (found, again)]
    assert values[0] == values[1]
    found.trials[1].validation = None  # one seed of a trial diverged: the trial is no choice
    assert found.best("ss").validation == means[1]


def test_points_cover_their_spans():
    space = {"lr": ("log", 0.01, 1.0), "x": ("linear", 2, 4), "kind": ("choice", "a", "b")}
    points = [point_of(space, number, seed=0) for number in range(16)]
    for name, middle in (("lr", 0.1), ("x", 3)):  # half on each side; rounding may move one
        assert abs(sum(point[name] < middle for point in points) - 8) <= 1
    assert {point["kind"] for point in points} == {"a", "b"}
    assert [point_of({"lr": space["lr"]}, number, seed=0)["lr"] for number in range(16)] == [
        p["lr"] for p in points
    ]


def test_a_diverged_trial_counts_and_is_never_the_best(tmp_path):
    found = search(tmp_path, trials=1, rules=("bp",), warmup_epochs=0, clip_norm=None, lr=0.1)
    found.trials[0].validation = None
    assert found.best("bp") is None


def test_a_span_that_makes_no_sense_is_named(monkeypatch):
    from feedbackpath.rules.sign_symmetry import SignSymmetry

    for span in (("log", 0, 1), ("linear", 2, 1), ("choice",), ("most", 1, 2)):
        monkeypatch.setattr(SignSymmetry, "search_space", {"scale": span})
        with pytest.raises(ConfigError, match="search space of ss: ss.scale is"):
            space_of("ss", CompareConfig())


def test_settings_of_a_rule_go_to_the_rule():
    config = settings_for(CompareConfig(), "ss", {"lr": 0.5, "ss.scale": "he"})
    assert config.for_rule("ss").lr == 0.5
    assert config.rule_settings == {"ss": {"scale": "he"}}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_built_with_every_value_that_is_searched(rule):
    for name, (kind, *values) in RULES[rule].search_space.items():
        for value in values:
            assert make_rule(rule, {name: value}).name == rule, kind


def test_a_value_that_its_rule_refuses_is_named_before_the_first_trial(monkeypatch):
    from feedbackpath.rules.exact_mirror import ExactMirror

    span = {"mirror": ("choice", {"target_angle_deg": 5.0})}
    monkeypatch.setattr(ExactMirror, "search_space", span)
    with pytest.raises(ConfigError, match="wm-exact: mirror cannot be searched .*target_angle_deg is for"):
        space_of("wm-exact", CompareConfig())


def test_what_the_config_gives_a_rule_is_not_searched():
    given = CompareConfig(rule_settings={"ss": {"scale": "he"}, "wm": {"mirror": {"noise": "uniform"}}})
    assert "ss.scale" not in space_of("ss", given)
    assert "ss.magnitude" in space_of("ss", given)
    assert space_of("wm", given).keys() == space_of("bp", given).keys()
    assert "wm.mirror" in space_of("wm", CompareConfig())


def test_the_range_of_learning_rates_can_be_given(tmp_path):
    rates = {"rules": ("bp",), "trials": 4}
    config = CompareConfig(**SMALL, rules=("bp",))
    given = {"resume": True, "command": "", "tell": lambda *_: None, "trials": 4}
    found = tune(config, tmp_path, lr_range=(0.0003, 0.001), **given)
    assert all(0.0003 <= trial.settings["lr"] <= 0.001 for trial in found.trials)
    assert found.spaces["bp"]["lr"] == ["log", 0.0003, 0.001]
    with pytest.raises(ConfigError, match="over another space"):
        search(tmp_path, resume=True, **rates)


@pytest.mark.parametrize(
    "rates", [(0.1, 0.01), (0.0, 0.1), (0.1, 0.1), (0.1, float("inf")), (float("nan"), 1)]
)
def test_a_range_that_makes_no_sense_is_refused(rates, tmp_path):
    with pytest.raises(ConfigError, match="lr-range is .*: give the lowest, above 0, and then the highest"):
        tune(
            CompareConfig(**SMALL),
            tmp_path,
            trials=1,
            resume=False,
            command="",
            tell=lambda *_: None,
            lr_range=rates,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_rule_whose_trials_all_diverge_is_named_with_the_next_step(tmp_path, capsys):
    arguments = ["tune", "--rules", "bp", "--trials", "1", "--out", str(tmp_path)]
    arguments += ["--lr-range", "1e20", "1e30", *FLAGS]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    printed = " ".join(capsys.readouterr().out.split())
    assert "compare --config" not in printed
    advice = (
        "no trial of bp gave a result: search again with lower learning rates, --rules bp --lr-range 3e+18"
    )
    assert advice in printed


def test_a_flag_of_what_is_searched_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--data", "digits", "--model", "mlp", "--lr", "0.3", "--out", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert "--lr is what tune searches; leave it out" in capsys.readouterr().err


def test_a_rate_of_the_config_file_that_is_searched_is_told(tmp_path, capsys):
    (tmp_path / "given.yaml").write_text("lr: 0.3\nmomentum: 0.5\nby_rule: {bp: {weight_decay: 0.5}}\n")
    arguments = ["tune", "--rules", "bp", "--trials", "1", "--out", str(tmp_path / "out")]
    arguments += FLAGS
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--config", str(tmp_path / "given.yaml")])
    printed = capsys.readouterr().out
    assert "\nlr 0.3 of the config file has no effect: tune searches it" in "\n" + printed
    assert "by_rule.bp.weight_decay 0.5 of the config file has no effect" in printed
    assert "momentum" not in printed
    chosen = yaml.safe_load((tmp_path / "out" / "chosen.yaml").read_text())
    assert (chosen["momentum"], chosen.get("lr")) == (0.5, None)


def test_the_command_prints_a_table_and_says_how_to_go_on(tmp_path, capsys):
    arguments = ["tune", "--rules", "bp", "--trials", "1", "--out", str(tmp_path)]
    arguments += FLAGS
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "bp trial 1 of 1: lr" in printed
    assert "compare --config" in printed
    assert json.loads((tmp_path / "tune.json").read_text())["trials_per_rule"] == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--evaluate-on", "test", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--evaluate-on has no effect" in capsys.readouterr().err


def test_what_was_searched_with_is_what_is_chosen(tmp_path):
    given = {"momentum": 0.5, "rule_settings": {"ss": {"magnitude": "batchwise"}}, "clip_norm": 3.0}
    found = search(tmp_path, trials=1, by_rule={"bp": {"momentum": 0.7}}, **given)
    chosen = merge_config(CompareConfig(), tmp_path / "chosen.yaml")
    assert {name: getattr(chosen, name) for name in SMALL} == SMALL
    assert (chosen.momentum, chosen.clip_norm) == (0.5, 3.0)
    assert chosen.by_rule["bp"] == {"momentum": 0.7} | found.best("bp").settings
    own = {
        name.removeprefix("ss."): value for name, value in found.best("ss").settings.items() if "." in name
    }
    assert chosen.rule_settings == {"ss": given["rule_settings"]["ss"] | own}
    search(tmp_path, trials=1, resume=True, by_rule={"bp": {"momentum": 0.7}}, **given)  # the same search


def test_every_rule_of_a_folder_gets_as_many_trials(tmp_path):
    search(tmp_path, trials=2, rules=("bp",))
    for rules in (("bp",), ("fa",)):
        with pytest.raises(
            ConfigError, match="holds 2 trials of a rule, and every rule needs the same number"
        ):
            search(tmp_path, trials=1, rules=rules, resume=True)
    found = search(tmp_path, trials=3, rules=("fa",), resume=True)
    assert sorted(trial.rule for trial in found.trials) == ["bp"] * 3 + ["fa"] * 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\ud800"])
def test_a_damaged_search_is_named(tmp_path, text):
    (tmp_path / "tune.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"tune\.json is damaged: "):
        search(tmp_path, resume=True)


def test_a_search_on_several_devices_or_with_a_margin_is_refused_before_it_begins(tmp_path, capsys):
    with pytest.raises(ConfigError, match="one device"):
        search(tmp_path, devices=2)
    with pytest.raises(SystemExit):
        cli.main(["tune", "--equivalence", "1", "--rules", "bp,kp", "--seeds", "2", "--out", str(tmp_path)])
    assert "has no effect in a search" in capsys.readouterr().err
