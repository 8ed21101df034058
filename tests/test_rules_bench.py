"""The bench of all rules: whose settings a run takes, where it goes on, and which orders it reports."""

import json

import pytest
import rules_bench
import studies
import tuned_glyphs
import yaml

from feedbackpath.train.results import Results, Run


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench in an empty folder, whose commands are noted and write what the real ones would."""
    calls, diverging = [], {"digits-mlp/wm": 3, "digits-mlp/wm/choice-2": 3}

    def call(command, *arguments):
        words = [command, *map(str, arguments)]
        calls.append(words)
        rule, out = words[words.index("--rules") + 1], tmp_path / words[words.index("--out") + 1]
        if command == "tune":
            out.mkdir(parents=True)
            status = "diverged" if rule == "ss" else "finished"
            trials = [
                {
                    "settings": {"lr": lr, f"{rule}.rate": 0.1},
                    "status": status,
                    "validation": None if rule == "ss" else 10 * lr,
                }
                for lr in (0.5, 0.3, 0.7, 0.4, 0.6, 0.8, 0.9, 1.0)
            ]
            (out / "tune.json").write_text(json.dumps({"trials": trials}))
        return 2 if rule == "dfa" else diverging.get(str(out.relative_to(tmp_path)), 0)

    monkeypatch.setattr(rules_bench, "RESULTS", tmp_path)
    monkeypatch.setattr(rules_bench, "call", call)
    return calls


def test_glyphs_take_what_was_found_on_fashion_mnist_and_nothing_else_of_it(bench, tmp_path):
    with pytest.raises(SystemExit, match="kp could not be run"):
        rules_bench.run("glyphs-resnet8", None, ["kp"])
    assert bench == []
    rules_bench.run("fashion-mnist-lenet", None, ["kp"])
    rules_bench.run("glyphs-resnet8", None, ["kp"])
    assert [words[0] for words in bench] == ["tune", "compare", "compare"]
    config = bench[2][bench[2].index("--config") + 1]
    assert config == bench[1][bench[1].index("--config") + 1]
    assert yaml.safe_load((tmp_path / config).read_text()) == {
        "by_rule": {"kp": {"lr": 0.3}},
        "rule_settings": {"kp": {"rate": 0.1}},
    }
    assert all("--resume" in words for words in bench)
    assert "--seed" not in bench[0]
    assert bench[1][bench[1].index("--seed") + 1] == "100"


def test_a_rule_that_fails_or_never_finishes_stops_no_other_and_is_named(bench):
    with pytest.raises(SystemExit, match="digits-mlp: dfa, ss could not be run"):
        rules_bench.run("digits-mlp", None, ["dfa", "ss", "kp"])
    done = [(words[0], words[words.index("--rules") + 1]) for words in bench]
    assert done == [("tune", "dfa"), ("tune", "ss"), ("tune", "ss"), ("tune", "kp"), ("compare", "kp")]


def test_a_rule_of_which_no_trial_finishes_is_tuned_again_with_lower_rates(bench, tmp_path):
    with pytest.raises(SystemExit, match="ss could not be run"):
        rules_bench.run("digits-mlp", None, ["ss"])
    first, second = bench
    assert "--lr-range" not in first
    assert second[second.index("--lr-range") + 1 :][:2] == ["0.0003", "0.01"]
    assert second[second.index("--out") + 1] == str(tmp_path / "digits-mlp" / "ss" / "tuned-lower")
    for number, trial in enumerate(trials := rules_bench.trials_of(tmp_path / "digits-mlp/ss/tuned-lower")):
        trial |= {"status": "finished", "validation": 5.0, "settings": {"lr": 0.001 * (number + 1)}}
    (tmp_path / "digits-mlp/ss/tuned-lower/tune.json").write_text(json.dumps({"trials": trials}))
    settings = yaml.safe_load(rules_bench.choices("digits-mlp", "ss")[0].read_text())
    assert settings == {"by_rule": {"ss": {"lr": 0.001}}}


def test_where_a_run_diverges_the_next_best_settings_are_taken(bench, tmp_path):
    rules_bench.run("digits-mlp", None, ["wm"])
    tried = [
        yaml.safe_load((tmp_path / words[words.index("--config") + 1]).read_text()) for words in bench[1:]
    ]
    assert [settings["by_rule"]["wm"]["lr"] for settings in tried] == [0.3, 0.4, 0.5]
    folders = [tmp_path / words[words.index("--out") + 1] for words in bench[1:]]
    assert folders == rules_bench.folders_of("digits-mlp", "wm")


def test_a_rule_of_which_no_trial_finishes_is_told_from_one_that_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rules_bench, "RESULTS", tmp_path)
    folder = tmp_path / "fashion-mnist-lenet" / "wm" / "tuned"
    folder.mkdir(parents=True)
    (folder / "tune.json").write_text(
        json.dumps({"trials": 8 * [{"status": "diverged", "validation": None}]})
    )
    for task in ("fashion-mnist-lenet", "glyphs-resnet8"):
        assert rules_bench.table(task) == (
            f"Not run yet: `python benchmarks/rules_bench.py run {task}`. "
            "`wm`: all 8 trials diverged on fashion-mnist-lenet."
        )
    run = Run(rule="bp", seed=100, status="finished", test=2.0)
    (tmp_path / "fashion-mnist-lenet" / "bp").mkdir()
    file = tmp_path / "fashion-mnist-lenet" / "bp" / "results.json"
    config = {"by_rule": {"bp": {"lr": 0.25}}}
    file.write_text(Results(runs=[run], config=config).model_dump_json(by_alias=True))
    table, not_run, cost = rules_bench.table("fashion-mnist-lenet").split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["`bp`", "`wm`"]
    assert "| `bp` | ruler | 0.25 | 1/1 | " in table
    assert "| `wm` | mirrors | – | all 8 trials diverged | – |" in table
    assert "step time" not in table
    assert not_run.startswith("Not run yet: `fa`, `ss`, `kp`, `wm-exact`, ")
    assert cost.startswith("Not run yet: the time of a step under each rule")


def test_known_orders_are_told_from_the_result_files(tmp_path, monkeypatch):
    monkeypatch.setattr(rules_bench, "RESULTS", tmp_path)
    found = {"bp": [2.0, 2.0], "kp": [2.0, 2.0], "wm": [1.0, 2.0], "ss": [3.0, 4.0], "dfa": [None, None]}
    for rule, tests in found.items():
        folder = tmp_path / "glyphs-resnet8" / rule
        folder.mkdir(parents=True)
        runs = [
            Run(rule=rule, seed=seed, status="diverged" if test is None else "finished", test=test)
            for seed, test in enumerate(tests)
        ]
        (folder / "results.json").write_text(Results(runs=runs).model_dump_json(by_alias=True))
    assert rules_bench.orders("glyphs-resnet8").splitlines()[4:] == [
        "| `bp` ≤ `kp` | yes | +0.00(0) |",
        "| `bp` ≤ `wm` | no | -0.5(5) |",
        "| `kp` ≤ `ss` | yes | +1.5(5) |",
        "| `wm` ≤ `ss` | yes | +2.00(0) |",
        "| `ss` < `dfa` | not decided: no seed has finished under both | – |",
        "| `ss` < `fa` | not run | not run |",
    ]


def test_a_search_of_a_study_that_broke_off_is_kept_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_glyphs, "OUT", tmp_path / "kept")
    searched = []

    def call(command, *arguments):
        folder = arguments[arguments.index("--out") + 1]
        file = folder / "tune.json"
        trials = json.loads(file.read_text())["trials"] if file.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"trials": [*trials, len(trials)]}))
        searched.append(folder.name)
        if len(trials) == 0:
            raise SystemExit(130)
        return 0

    monkeypatch.setattr(studies, "call", call)
    monkeypatch.setattr(tuned_glyphs, "WORK", tmp_path / "one machine")
    with pytest.raises(SystemExit):
        tuned_glyphs.tune(("sgd", "adamw"))
    assert searched == ["sgd"]
    monkeypatch.setattr(tuned_glyphs, "WORK", tmp_path / "another")
    tuned_glyphs.tune(("sgd",))
    assert json.loads((tmp_path / "kept" / "sgd" / "tune.json").read_text())["trials"] == [0, 1]
