"""compare as its users meet it: result files, resume after a kill, refusals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from feedbackpath import cli
from feedbackpath.rules import RULES, register_rule
from feedbackpath.rules.kolen_pollack import KolenPollack

SMALL = ["--data", "digits", "--model", "mlp", "--samples-per-epoch", "256", "--num-threads", "1"]


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


def compare(out: Path, *arguments: str) -> int:
    return run_cli("compare", *SMALL, "--out", str(out), *arguments)


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_times(results: dict) -> list:
    return [
        {
            **{key: run[key] for key in ("rule", "seed", "status", "test_error")},
            "history": [{k: v for k, v in entry.items() if k != "seconds"} for entry in run["history"]],
        }
        for run in results["runs"]
    ]


def test_result_files(tmp_path, capsys):
    assert compare(tmp_path, "--rules", "bp,kp,wm", "--seeds", "2", "--epochs", "2") == 0
    results = results_of(tmp_path)
    assert results["schema"] == 1
    assert [(run["rule"], run["seed"]) for run in results["runs"]] == [
        (rule, seed) for seed in (0, 1) for rule in ("bp", "kp", "wm")
    ]
    for run in results["runs"]:
        assert run["status"] == "finished"
        assert [entry["epoch"] for entry in run["history"]] == [1, 2]
        assert run["test_error"] == run["history"][-1]["test_error"]
        for entry in (run["start"], *run["history"]):
            layers = list(entry["matrix_angle_deg"])
            assert layers == list(entry["delta_angle_deg"]) == list(entry["gain"])
    errors = [run["test_error"] for run in results["runs"] if run["rule"] == "kp"]
    assert results["summary"]["kp"]["test_error_mean"] == pytest.approx(sum(errors) / 2)
    assert results["summary"]["kp"]["test_error_se"] == pytest.approx(abs(errors[0] - errors[1]) / 2)
    assert results["data"]["name"] == "digits"
    assert "torch" in results["versions"]
    assert (tmp_path / "config.yaml").exists()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 12
    assert (tmp_path / "report.html").stat().st_size > 1e6
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png", ".pdf", ".svg"}
    assert not list(tmp_path.glob("checkpoints/*"))
    printed = capsys.readouterr().out
    assert "kp" in printed
    assert "finished" in printed


def test_a_second_comparison_in_the_folder_is_refused_unless_it_resumes(tmp_path, capsys):
    assert compare(tmp_path, "--rules", "fa", "--epochs", "1") == 0
    before = without_times(results_of(tmp_path))
    assert compare(tmp_path, "--rules", "fa", "--epochs", "1") == 2
    assert "--resume" in capsys.readouterr().err
    assert compare(tmp_path, "--rules", "fa", "--epochs", "1", "--resume") == 0
    assert without_times(results_of(tmp_path)) == before
    assert compare(tmp_path, "--rules", "fa", "--epochs", "1", "--lr", "0.1", "--resume") == 2
    assert "lr (0.2 there, 0.1 now)" in capsys.readouterr().err
    assert compare(tmp_path, "--rules", "fa,bp", "--epochs", "1", "--resume") == 0
    assert [run["rule"] for run in results_of(tmp_path)["runs"]] == ["fa", "bp"]


ENDLESS = ("--rules", "bp,wm", "--epochs", "40")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> list:
    out = tmp_path_factory.mktemp("unbroken")
    assert compare(out, *ENDLESS) == 0
    return without_times(results_of(out))


def kill_after_epochs(out: Path, count: int, number: int) -> tuple[int, str]:
    """Start the job in a process of its own, send it a signal after some epochs, return code and output."""
    command = [sys.executable, "-c", "from feedbackpath.cli import main; main()", "compare", *SMALL]
    process = subprocess.Popen(
        [*command, "--out", str(out), *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while sum(len(run["history"]) for run in runs_so_far(out)) < count:
        assert time.monotonic() < deadline, "the epochs did not come in two minutes"
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def runs_so_far(out: Path) -> list:
    return results_of(out)["runs"] if (out / "results.json").exists() else []


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_job_keeps_its_epochs_and_resumes_to_the_same_results(tmp_path, unbroken, number):
    code, output = kill_after_epochs(tmp_path, 3, number)
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert "--resume" in output
        assert "interrupted" in [run["status"] for run in runs_so_far(tmp_path)]
        assert (tmp_path / "report.html").exists()
    kept = sum(len(run["history"]) for run in runs_so_far(tmp_path))
    assert 3 <= kept < 80
    assert compare(tmp_path, *ENDLESS, "--resume") == 0
    assert without_times(results_of(tmp_path)) == unbroken


def test_a_diverged_rule_is_recorded_and_the_others_go_on(tmp_path, capsys):
    # Feedback weights of this size make FA's updates overflow; backprop at the same settings learns.
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.2\nmomentum: 0.99\nschedule: constant\nwarmup_epochs: 0\nweight_decay: 0\n")
    code = compare(
        tmp_path / "out", "--rules", "fa,bp", "--epochs", "30", "--config", str(file), "--lr", "1e4"
    )
    runs = {run["rule"]: run for run in results_of(tmp_path / "out")["runs"]}
    assert code == 3
    assert runs["fa"]["status"] == "diverged"
    assert runs["fa"]["diverged_epoch"] >= 1
    assert runs["bp"]["status"] in ("finished", "diverged")
    assert "diverged" in capsys.readouterr().out


def test_all_rules_can_be_compared_by_one_word(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "feedbackpath.cli.compare.run", lambda settings, out, resume: given.append(settings) or 0
    )
    assert compare(tmp_path, "--rules", "all") == 0
    assert given[0].rules == tuple(RULES)


def test_rules_are_listed_by_group(capsys):
    assert run_cli("rules") == 0
    shown = capsys.readouterr().out
    groups = ["ruler", "transports", "fixed", "learned", "broadcast", "targets", "mirrors"]
    assert [line.split(":")[0] for line in shown.splitlines() if line and line[0] != " "] == groups
    assert all(f"  {rule} ({RULES[rule].__name__}): " in shown for rule in RULES)


def test_rules_are_listed_as_json_with_all_that_is_known_of_them(capsys):
    assert run_cli("rules", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [rule["rule"] for rule in listed] == list(RULES)
    for rule in listed:
        assert all(rule[fact] for fact in ("class", "group", "what", "paper", "equation", "needs", "verdict"))
        assert 1.0 <= rule["flops"] < 15.0


def test_a_rule_of_ones_own_has_no_facts_of_the_rule_it_comes_from(capsys):
    class Mine(KolenPollack):
        """Do as Kolen-Pollack does."""

        name = "a-rule-of-ones-own-with-a-name-that-is-longer-than-most-of-them-are-in-any-terminal"

    with mock.patch.dict(RULES):
        register_rule(Mine)
        assert run_cli("rules") == 0
    shown = capsys.readouterr().out
    assert f"  {Mine.name} (Mine): Do as Kolen-Pollack does.\n      audit    run feedbackpath audit" in shown


def test_report_renders_a_folder_anew(tmp_path):
    assert compare(tmp_path, "--rules", "bp", "--epochs", "1") == 0
    (tmp_path / "report.html").unlink()
    assert run_cli("report", tmp_path) == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--epoch", "3"], "--epochs"),
        (["compar"], "compare"),
        (["compare", "--epochs", "x"], "--epochs is 'x': it must be a whole number"),
        (["compare", "--lr", "0"], "--lr is '0': it must be more than 0"),
        (["compare", "--norm", "befor"], "--norm is 'befor': choose 'after', 'before' or 'scaling'"),
        (["compare", "--rules", "bq"], "unknown rule 'bq'; known rules are bp"),
        (["compare", "--model", "resnet9"], "did you mean resnet8"),
        (["compare", "--data", "glyph"], "did you mean 'glyphs'"),
        (["compare", "--data", "mnist", "--data-dir", "."], "mnist"),
        (["compare", "--config", "none.yaml"], "none.yaml"),
        (["compare", "--device", "gpu"], "gpu"),
        (["compare", "--data", "digits", "--model", "lenet"], "lenet"),
        (["compare", "--data", "digits", "--classes", "5"], "digits takes no"),
        (["report", "."], "has no results.json"),
        (["compare", "--rules", ","], "name at least one rule"),
        (["compare", "--seed", str(10**14)], "--seed"),
        (["compare", "--data", "digits", "--model", "mlp", "--device", "meta"], "meta"),
        (["compare", "--data", "digits", "--model", "mlp", "--out", "/proc/none/x"], "/proc/none"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "Traceback" not in printed.err + printed.out


def test_help_and_errors_do_not_import_torch():
    script = (
        "import sys; from feedbackpath import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('torch' in sys.modules, code)"
    )
    for arguments, code in ((["--help"], 0), (["compare", "--help"], 0), (["compare", "--epochs", "x"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == f"False {code}"
